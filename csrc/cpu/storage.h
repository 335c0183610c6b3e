// Stored numbers (float, double, bfloat16, float16) as vectors and single numbers of the type they are computed in.
#pragma once

#include <type_traits>

#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
template <class S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

TRANSFUSE_INLINE VecF read(const float* p) { return load<VecF>(p); }
TRANSFUSE_INLINE VecD read(const double* p) { return load<VecD>(p); }
TRANSFUSE_INLINE VecF read(const Bf16* p) { return (VecF)(__builtin_convertvector(load<VecU16>(p), VecU) << 16); }
TRANSFUSE_INLINE VecF read(const F16* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  float lanes[Simd<float>::W];
  for (int i = 0; i < Simd<float>::W; ++i) lanes[i] = f16_to_float(p[i].bits);
  return load<VecF>(lanes);
#endif
}
TRANSFUSE_INLINE float read_one(const float* p) { return *p; }
TRANSFUSE_INLINE double read_one(const double* p) { return *p; }
TRANSFUSE_INLINE float read_one(const Bf16* p) { return bf16_to_float(p->bits); }
TRANSFUSE_INLINE float read_one(const F16* p) { return f16_to_float(p->bits); }

TRANSFUSE_INLINE VecF stored(const float*, VecF v) { return v; }
TRANSFUSE_INLINE VecD stored(const double*, VecD v) { return v; }
TRANSFUSE_INLINE VecU16 stored(const Bf16*, VecF v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  VecU16 r;
  std::memcpy(&r, &h, sizeof r);
  return r;
#else
  const VecU u = (VecU)v;
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU quiet = (u >> 16) | 0x40u;
  const VecU r = (VecU)((u & 0x7fffffffu) > 0x7f800000u ? (VecI)quiet : (VecI)rounded);
  return __builtin_convertvector(r, VecU16);
#endif
}
TRANSFUSE_INLINE VecU16 stored(const F16*, VecF v) {
#if defined(__AVX512F__)
  return (VecU16)_mm512_cvtps_ph((__m512)v, 0);
#elif defined(__F16C__)
  return (VecU16)_mm256_cvtps_ph((__m256)v, 0);
#else
  float lanes[Simd<float>::W];
  uint16_t bits[Simd<float>::W];
  store(lanes, v);
  for (int i = 0; i < Simd<float>::W; ++i) bits[i] = float_to_f16(lanes[i]);
  return load<VecU16>(bits);
#endif
}
TRANSFUSE_INLINE void write_one(float* p, float v) { *p = v; }
TRANSFUSE_INLINE void write_one(double* p, double v) { *p = v; }
TRANSFUSE_INLINE void write_one(Bf16* p, float v) { p->bits = float_to_bf16(v); }
TRANSFUSE_INLINE void write_one(F16* p, float v) { p->bits = float_to_f16(v); }

// A vector store past the cache where there is one; `p` is aligned to the vector.
template <class V>
TRANSFUSE_INLINE void store_past_cache(void* p, V v) {
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 16) _mm_stream_si128((__m128i*)p, (__m128i)v);
  if constexpr (sizeof(V) == 32) _mm256_stream_si256((__m256i*)p, (__m256i)v);
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
#else
  std::memcpy(p, &v, sizeof(V));
#endif
}

// A vector of arithmetic numbers as float64 vectors.
struct Wide {
  VecD part[2];
};
TRANSFUSE_INLINE Wide widen_vector(VecF v) {
  typedef float HalfF __attribute__((vector_size(kVectorBytes / 2)));
  HalfF halves[2];
  std::memcpy(halves, &v, sizeof v);
  return {{__builtin_convertvector(halves[0], VecD), __builtin_convertvector(halves[1], VecD)}};
}
TRANSFUSE_INLINE Wide widen_vector(VecD v) { return {{v, VecD{}}}; }

}  // namespace
}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
