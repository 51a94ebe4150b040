// Vectors of kLanes floats with the compiler's vector extensions. Included by one translation unit
// per instruction set level, which defines FORK_ATTN_LANES first; everything has internal linkage,
// so that code for a wide level can never stand in for the same function of a narrow one.
#pragma once

#ifndef FORK_ATTN_LANES
#error "define FORK_ATTN_LANES (floats in a vector) before including simd.h"
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "numeric.h"

#define FORK_ATTN_INLINE inline __attribute__((always_inline))

namespace fork_attn::cpu {
namespace {

constexpr int kLanes = FORK_ATTN_LANES;
constexpr float kInfinity = __builtin_huge_valf();

typedef float VecF __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t VecI __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t VecU __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t VecH __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint8_t VecB __attribute__((vector_size(kLanes * sizeof(uint8_t))));
typedef int16_t VecSH __attribute__((vector_size(kLanes * sizeof(int16_t))));
typedef int8_t VecSB __attribute__((vector_size(kLanes * sizeof(int8_t))));
using Lanes = std::make_integer_sequence<int, kLanes>;

FORK_ATTN_INLINE VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

FORK_ATTN_INLINE void store(float* p, VecF v) { std::memcpy(p, &v, sizeof(v)); }

// Not 0 + x: that is not x for -0, so compilers add.
FORK_ATTN_INLINE VecF broadcast(float x) { return x - VecF{}; }

FORK_ATTN_INLINE VecF load_as_float(const float* p) { return load(p); }

FORK_ATTN_INLINE VecF load_as_float(const BFloat16* p) {
  VecH bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (VecF)(__builtin_convertvector(bits, VecU) << 16);
}

FORK_ATTN_INLINE VecF halves_to_float(VecH bits) {
#if defined(FORK_ATTN_F16C) && FORK_ATTN_LANES == 16
  return _mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);  // gcc 12 warns about the unmasked form
#elif defined(FORK_ATTN_F16C) && FORK_ATTN_LANES == 8
  return _mm256_cvtph_ps((__m128i)bits);
#else
  const VecU wide = __builtin_convertvector(bits, VecU);
  const VecU sign = (wide & 0x8000u) << 16;
  const VecU rest = wide & 0x7fffu;
  const VecU normal = (rest << 13) + (112u << 23);
  const VecU special = (rest << 13) | 0x7f800000u;  // Inf, NaN
  const VecU subnormal = (VecU)(__builtin_convertvector((VecI)rest, VecF) * 0x1p-24f);
  const VecU magnitude = rest >= 0x7c00u ? special : (rest < 0x400u ? subnormal : normal);
  return (VecF)(sign | magnitude);
#endif
}

FORK_ATTN_INLINE VecF load_as_float(const Float16* p) {
  VecH bits;
  std::memcpy(&bits, p, sizeof(bits));
  return halves_to_float(bits);
}

FORK_ATTN_INLINE VecF load_as_float(const Float8E4M3* p) {
#if defined(FORK_ATTN_F16C)
  // The bits of e4m3 are those of an fp16 number 2^8 times smaller, subnormals too; but for NaN.
  VecSB bits;
  std::memcpy(&bits, p, sizeof(bits));
  const VecSH moved = __builtin_convertvector(bits, VecSH) << 7;
  const VecSH nan = (moved & 0x3f80) == 0x3f80;
  const VecH half = (VecH)((moved & (int16_t)0xbf80) | (nan & 0x7fff));
  return halves_to_float(half) * 256.0f;
#else
  VecB bits;
  std::memcpy(&bits, p, sizeof(bits));
  const VecU wide = __builtin_convertvector(bits, VecU);
  const VecU sign = (wide & 0x80u) << 24;
  const VecU rest = wide & 0x7fu;
  const VecU normal = (rest << 20) + (120u << 23);
  const VecU nan = VecU{} + 0x7fc00000u;
  const VecU subnormal = (VecU)(__builtin_convertvector((VecI)rest, VecF) * 0x1p-9f);
  const VecU magnitude = rest == 0x7fu ? nan : (rest < 8u ? subnormal : normal);
  return (VecF)(sign | magnitude);
#endif
}

FORK_ATTN_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }

template <int X, bool kSwapA, bool kSwapB, int... I>
FORK_ATTN_INLINE VecF mix_lanes(VecF a, VecF b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(
      a, b, ((I & X) ? kLanes + (I ^ (kSwapB ? X : 0)) : (I ^ (kSwapA ? X : 0)))...);
}

// Lane i is that of b where bit X of i is set, else that of a; a swapped operand gives lane i ^ X
// instead of i.
template <int X, bool kSwapA, bool kSwapB>
FORK_ATTN_INLINE VecF mix(VecF a, VecF b) {
  return mix_lanes<X, kSwapA, kSwapB>(a, b, Lanes{});
}

template <int X = kLanes / 2>
FORK_ATTN_INLINE float max_of_lanes(VecF v) {
  v = max(v, mix<X, true, true>(v, v));
  if constexpr (X > 1) {
    return max_of_lanes<X / 2>(v);
  } else {
    return v[0];
  }
}

template <int X = kLanes / 2>
FORK_ATTN_INLINE float sum_of_lanes(VecF v) {
  v += mix<X, true, true>(v, v);
  if constexpr (X > 1) {
    return sum_of_lanes<X / 2>(v);
  } else {
    return v[0];
  }
}

// Lane i of the result is the sum of the lanes of v[i].
template <int X = kLanes / 2>
FORK_ATTN_INLINE VecF sum_each(VecF* v) {
#pragma GCC unroll 16
  for (int i = 0; i < X; ++i)
    v[i] = mix<X, false, false>(v[i], v[i + X]) + mix<X, true, true>(v[i], v[i + X]);
  if constexpr (X > 1) {
    return sum_each<X / 2>(v);
  } else {
    return v[0];
  }
}

// Transposes kLanes vectors in place.
template <int X = kLanes / 2>
FORK_ATTN_INLINE void transpose(VecF* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & X) != 0) continue;
    const VecF low = v[i];
    const VecF high = v[i + X];
    v[i] = mix<X, false, true>(low, high);
    v[i + X] = mix<X, true, false>(low, high);
  }
  if constexpr (X > 1) transpose<X / 2>(v);
}

// e^x for x <= 88, within 2 units in the last place; 0 where the result would be subnormal. NaN
// stays NaN.
FORK_ATTN_INLINE VecF exp(VecF x) {
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  const VecF shifted = x * 1.44269504f + kRound;
  const VecF n = shifted - kRound;
  const VecF r = (x - n * 0x1.62e4p-1f) -
                 n * 0x1.7f7d1cp-20f;  // ln 2 in two parts: the first product is exact
  VecF p = r * 1.3814596e-3f + 8.3687175e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  p = (p * r) * r + r + 1.0f;
  const VecF scale = (VecF)((((VecI)shifted - 0x4b400000) + 127) << 23);
  return x < -87.33654f ? VecF{} : p * scale;
}

FORK_ATTN_INLINE VecF tanh(VecF x) {
  const VecF magnitude = (VecF)((VecU)x & 0x7fffffffu);
  const VecF z = x * x;
  VecF p = z * -5.0856462e-3f + 2.0034231e-2f;
  p = p * z - 5.3537436e-2f;
  p = p * z + 1.3328803e-1f;
  p = p * z - 3.3333176e-1f;
  const VecF small = (p * z) * x + x;
  const VecF limited = magnitude > 10.0f ? broadcast(10.0f) : magnitude;
  const VecF large = 1.0f - 2.0f / (exp(limited + limited) + 1.0f);
  const VecF signed_large = (VecF)((VecU)large | ((VecU)x & 0x80000000u));
  return magnitude < 0.7f ? small : signed_large;
}

}  // namespace
}  // namespace fork_attn::cpu
