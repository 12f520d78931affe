// Eight floats at a time, in the compiler's own vector types: one source for every instruction set.
//
// Owns: loads, stores, conversions, the few functions the operators need.
// Must not know: operators. Included once per instruction set; all names live in that set's namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef STRONGROOM_ISA
#error "the build names the instruction set"
#endif

namespace strongroom {
namespace STRONGROOM_ISA {

typedef float f8 __attribute__((vector_size(32)));
typedef std::int32_t i8 __attribute__((vector_size(32)));
typedef std::uint32_t u8x __attribute__((vector_size(32)));
typedef std::uint16_t h8 __attribute__((vector_size(16)));

constexpr int LANES = 8;

inline f8 load(const float* from) {
  f8 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, f8 value) { std::memcpy(to, &value, sizeof value); }

inline f8 splat(float value) { return f8{value, value, value, value, value, value, value, value}; }

inline f8 to_float(i8 value) { return __builtin_convertvector(value, f8); }

inline float sum(f8 value) {
  return ((value[0] + value[4]) + (value[2] + value[6])) + ((value[1] + value[5]) + (value[3] + value[7]));
}

inline f8 max(f8 a, f8 b) { return a > b ? a : b; }

inline float largest(f8 value) {
  float result = value[0];
  for (int lane = 1; lane < LANES; ++lane) result = value[lane] > result ? value[lane] : result;
  return result;
}

inline f8 magnitude(f8 value) {
  return reinterpret_cast<f8>(reinterpret_cast<u8x>(value) & (u8x{} + 0x7fffffffu));
}

// bfloat16: the upper half of a float.
inline f8 load_bf16(const std::uint16_t* from) {
  h8 halves;
  std::memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<f8>(__builtin_convertvector(halves, u8x) << 16);
}

// Rounds to nearest, ties to even. NaN stays NaN: its rounding could carry into the sign.
inline void store_bf16(std::uint16_t* to, f8 value) {
  const u8x bits = reinterpret_cast<u8x>(value);
  const u8x rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u8x quiet = (bits >> 16) | 0x40u;
  const u8x kept = value == value ? rounded : quiet;
  const h8 halves = __builtin_convertvector(kept, h8);
  std::memcpy(to, &halves, sizeof halves);
}

// exp(x) for x <= 0 and moderate x > 0, relative error below 2e-7: 2^n times a polynomial on half a unit of the
// exponent (Cephes' expf). Below -87 the result is 0.
inline f8 exp(f8 x) {
  const f8 limited = x < splat(-87.0f) ? splat(-87.0f) : (x > splat(88.0f) ? splat(88.0f) : x);
  const f8 scaled = limited * splat(1.44269504088896341f);
  const i8 whole = __builtin_convertvector(scaled + (scaled < f8{} ? splat(-0.5f) : splat(0.5f)), i8);
  const f8 n = to_float(whole);
  f8 r = limited - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  f8 p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const f8 power = reinterpret_cast<f8>((whole + 127) << 23);
  return x < splat(-87.0f) ? f8{} : p * power;
}

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
