// 16-bit floating point as bits: conversions from and to fp32 that need no compiler support.
#pragma once

#include <cstdint>
#include <cstring>

namespace fork_attn::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return bits_float(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // Inf, NaN
  if (rest < 0x400u) {  // subnormal: an integer multiple of 2^-24, exact in fp32
    return bits_float(sign | float_bits(static_cast<float>(rest) * 0x1p-24f));
  }
  return bits_float(sign | ((rest << 13) + (112u << 23)));
}

// The converters below round to nearest, ties to even. NaN stays NaN; beyond the largest finite
// value comes Inf.

inline void from_float(float x, float& out) { out = x; }

inline void from_float(float x, BFloat16& out) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out.bits = static_cast<uint16_t>((nan ? bits | 0x400000u : rounded) >> 16);
}

inline void from_float(float x, Float16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and above
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: adding 1/2, whose last place is 2^-24, rounds to
                                    // subnormals
    half = float_bits(bits_float(rest) + 0.5f) - float_bits(0.5f);
  } else {
    half = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace fork_attn::cpu
