// Shapes of well-known models' KV caches, and how big a page and a block of
// each are on a machine that is `scale` times smaller than a GPU.
//
// A page is what the broker lends: 2 MiB of each layer's K and of its V, so 128
// MiB for Llama-3.1-8B. A block is 16 tokens. Everything in bytes is divided by
// the scale, everything in tokens and blocks stays as it is on the GPU.
#ifndef KVBROKER_CLIENT_REPLAY_MODEL_PRESETS_H_
#define KVBROKER_CLIENT_REPLAY_MODEL_PRESETS_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "broker/base/bytes.h"

namespace kvbroker::replay {

// From the model's published configuration; keys and values in 16 bits.
struct ModelPreset {
  std::string_view name;
  int64_t layers = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
};

// By name, in lower case; an unknown one is an error that lists the known.
absl::StatusOr<ModelPreset> FindModelPreset(std::string_view name);
std::span<const ModelPreset> ModelPresets();
// "llama-3.1-8b, llama-3.1-70b, ..."
std::string ModelPresetNames();

inline constexpr int64_t kDefaultScale = 512;

struct KvGeometry {
  Bytes token_bytes;
  Bytes block_bytes;
  Bytes page_bytes;
};

// InvalidArgument where `scale` leaves no whole number of bytes a token, a page
// that is no multiple of 4096 bytes or a block that is none of 64.
absl::StatusOr<KvGeometry> ScaledGeometry(const ModelPreset& model,
                                          int64_t scale);

}  // namespace kvbroker::replay

#endif  // KVBROKER_CLIENT_REPLAY_MODEL_PRESETS_H_
