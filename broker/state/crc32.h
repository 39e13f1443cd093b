// CRC-32 as zlib's and Ethernet's (polynomial 0x04c11db7, reflected): finds
// every burst of up to 32 wrong bits.
#ifndef KVBROKER_BROKER_STATE_CRC32_H_
#define KVBROKER_BROKER_STATE_CRC32_H_

#include <cstdint>
#include <string_view>

namespace kvbroker {

// Of `before`, whose checksum `crc` is, with `text` behind it.
uint32_t ExtendCrc32(uint32_t crc, std::string_view text);

inline uint32_t Crc32(std::string_view text) { return ExtendCrc32(0, text); }

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_STATE_CRC32_H_
