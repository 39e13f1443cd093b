#include "client/replay/model_presets.h"

#include "absl/strings/str_cat.h"
#include "client/replay/block_source.h"
#include "client/replay/pattern.h"

namespace kvbroker::replay {
namespace {

constexpr int64_t kElementBytes = 2;  // bfloat16
constexpr int64_t kKeysAndValues = 2;
constexpr Bytes kLayerPageBytes = MiB(2);  // of one layer's K or V
constexpr int64_t kSystemPageBytes = 4096;

constexpr ModelPreset kModels[] = {
    {"llama-3.1-8b", 32, 8, 128}, {"llama-3.1-70b", 80, 8, 128},
    {"llama-3.2-1b", 16, 8, 64},  {"llama-3.2-3b", 28, 8, 128},
    {"qwen2.5-7b", 28, 4, 128},   {"qwen3-0.6b", 28, 8, 128},
    {"qwen3-1.7b", 28, 8, 128},   {"qwen3-4b", 36, 8, 128},
    {"qwen3-8b", 36, 8, 128},     {"qwen3-14b", 40, 8, 128},
    {"qwen3-32b", 64, 8, 128},    {"mistral-7b", 32, 8, 128},
};

absl::string_view ToAbsl(std::string_view text) {
  return absl::string_view(text.data(), text.size());
}

}  // namespace

absl::StatusOr<ModelPreset> FindModelPreset(std::string_view name) {
  for (const ModelPreset& model : kModels) {
    if (model.name == name) return model;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "no such model preset: ", ToAbsl(name), "; known: ", ModelPresetNames()));
}

std::span<const ModelPreset> ModelPresets() { return kModels; }

std::string ModelPresetNames() {
  std::string names;
  for (const ModelPreset& model : kModels) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", ToAbsl(model.name));
  }
  return names;
}

absl::StatusOr<KvGeometry> ScaledGeometry(const ModelPreset& model,
                                          int64_t scale) {
  const int64_t token_bytes = kKeysAndValues * model.layers * model.kv_heads *
                              model.head_dim * kElementBytes;
  const int64_t page_bytes =
      (kLayerPageBytes * (kKeysAndValues * model.layers)).count();
  if (scale < 1 || token_bytes % scale != 0 || page_bytes % scale != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "scale must be a positive divisor of the model's bytes: ", scale, "; ",
        ToAbsl(model.name), " has ", token_bytes, " bytes a token and ",
        page_bytes, " a page"));
  }
  const KvGeometry geometry = {
      .token_bytes = Bytes(token_bytes / scale),
      .block_bytes = Bytes(token_bytes / scale * kBlockTokens),
      .page_bytes = Bytes(page_bytes / scale)};
  if (geometry.page_bytes.count() % kSystemPageBytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("scale makes a page that is no multiple of ",
                     kSystemPageBytes, " bytes: ", scale, " gives ",
                     geometry.page_bytes.count(), " for ", ToAbsl(model.name)));
  }
  if (geometry.block_bytes.count() % kPatternLineBytes != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "scale makes a block that is no multiple of ", kPatternLineBytes,
        " bytes: ", scale, " gives ", geometry.block_bytes.count(), " for ",
        ToAbsl(model.name)));
  }
  return geometry;
}

}  // namespace kvbroker::replay
