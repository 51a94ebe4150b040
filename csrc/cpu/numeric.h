// Floating point of 16 and 8 bits as bits: conversions from and to fp32 that need neither compiler
// support nor CUDA headers. GPUs use their own instructions where they have them, which give the
// same bits but for the sign and payload of NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fork_attn::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// e4m3fn: 4 bits of exponent, 3 of mantissa, no Inf, one NaN per sign (OCP 8-bit floating point).
struct Float8E4M3 {
  uint8_t bits;
};

FORK_ATTN_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

FORK_ATTN_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

FORK_ATTN_HD float to_float(float x) { return x; }

FORK_ATTN_HD float to_float(BFloat16 x) { return bits_float(uint32_t{x.bits} << 16); }

FORK_ATTN_HD float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // Inf, NaN
  if (rest < 0x400u) {  // subnormal: an integer multiple of 2^-24, exact in fp32
    return bits_float(sign | float_bits(static_cast<float>(rest) * 0x1p-24f));
  }
  return bits_float(sign | ((rest << 13) + (112u << 23)));
#endif
}

FORK_ATTN_HD float to_float(Float8E4M3 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t{x.bits}));
  return to_float(Float16{static_cast<uint16_t>(halves)});
#else
  const uint32_t sign = uint32_t{x.bits & 0x80u} << 24;
  const uint32_t rest = x.bits & 0x7fu;
  if (rest == 0x7fu) return bits_float(sign | 0x7fc00000u);
  if (rest < 0x8u) {  // subnormal: an integer multiple of 2^-9
    return bits_float(sign | float_bits(static_cast<float>(rest) * 0x1p-9f));
  }
  return bits_float(sign | ((rest << 20) + (120u << 23)));
#endif
}

// The converters below round to nearest, ties to even. NaN stays NaN; beyond the largest finite
// value comes Inf, and in e4m3, which has none, the largest finite value (448).

FORK_ATTN_HD void from_float(float x, float& out) { out = x; }

FORK_ATTN_HD void from_float(float x, BFloat16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out.bits = static_cast<uint16_t>((nan ? bits | 0x400000u : rounded) >> 16);
#endif
}

FORK_ATTN_HD void from_float(float x, Float16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
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
#endif
}

FORK_ATTN_HD void from_float(float x, Float8E4M3& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  out.bits = static_cast<uint8_t>(pair);
#else
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t rest = bits & 0x7fffffffu;
  uint32_t code;
  if (rest > 0x7f800000u) {
    code = 0x7fu;
  } else if (rest >= 0x43e00000u) {  // 448 and above
    code = 0x7eu;
  } else if (rest < 0x3c800000u) {  // below 2^-6: adding 2^14, whose last place is 2^-9
    code = float_bits(sum(bits_float(rest), 0x1p14f)) - float_bits(0x1p14f);
  } else {
    code = (rest - (120u << 23) + 0x7ffffu + ((rest >> 20) & 1u)) >> 20;
  }
  out.bits = static_cast<uint8_t>(sign | code);
#endif
}

}  // namespace fork_attn::cpu
