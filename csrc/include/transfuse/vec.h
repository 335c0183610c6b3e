// The vector layer: the few SIMD operations the kernels need, for one instruction set per compilation.
//
// Arithmetic uses the compilers' vector extension (GCC and Clang), so the same source compiles for every processor;
// only what the extension cannot say well (half-precision conversion, the bf16 dot product) uses intrinsics.
// Everything lives in a namespace named after the ISA level: two levels linked into one library never share a symbol.
//
// Levels (TRANSFUSE_ISA): portable, avx2, avx512, avx512_bf16, and emulated512, which is the AVX-512+bf16 tiling
// compiled for the baseline processor: slow, and there so that the widest tiling is tested on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "transfuse/types.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef TRANSFUSE_ISA
#define TRANSFUSE_ISA portable
#endif
#ifndef TRANSFUSE_VECTOR_BYTES
#define TRANSFUSE_VECTOR_BYTES 16
#endif
#ifndef TRANSFUSE_BF16_DOT
#define TRANSFUSE_BF16_DOT 0
#endif

#define TRANSFUSE_INLINE static inline __attribute__((always_inline))

namespace transfuse {
namespace TRANSFUSE_ISA {

constexpr int kVectorBytes = TRANSFUSE_VECTOR_BYTES;

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using V = VecF;
  static constexpr int W = kVectorBytes / 4;
};
template <>
struct Simd<double> {
  using V = VecD;
  static constexpr int W = kVectorBytes / 8;
};

// Rows of one register tile. 12 (or 24) accumulators of three vectors leave room for the operands in 16 (or 32)
// registers.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4;

template <class V, class T>
TRANSFUSE_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
TRANSFUSE_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
// A vector store past the cache where there is one; `p` is aligned to the vector.
template <class V, class T>
TRANSFUSE_INLINE void store_past_cache(T* p, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}

TRANSFUSE_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
TRANSFUSE_INLINE typename Simd<T>::V splat(T x) {
  return x - typename Simd<T>::V{};
}
// Returns b where a is NaN's comparison partner: a NaN in `b` survives, which keeps bad inputs visible.
template <class V>
TRANSFUSE_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
// Compilers turn the line above into a compare and a blend; the max instruction has the same NaN rule.
#if defined(__AVX512F__)
TRANSFUSE_INLINE VecF vmax(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
TRANSFUSE_INLINE VecF vmax(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
#endif
// Folds a vector in halves; the order of the additions is fixed by the width alone.
template <class T>
TRANSFUSE_INLINE T horizontal_max(typename Simd<T>::V v) {
  T lanes[Simd<T>::W];
  store(lanes, v);
  for (int step = Simd<T>::W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
  return lanes[0];
}
template <class T>
TRANSFUSE_INLINE T horizontal_sum(typename Simd<T>::V v) {
  T lanes[Simd<T>::W];
  store(lanes, v);
  for (int step = Simd<T>::W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}
#if defined(__AVX2__)
TRANSFUSE_INLINE float fold_max(__m256 v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
TRANSFUSE_INLINE float fold_sum(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
#if defined(__AVX512F__)
template <>
inline __attribute__((always_inline)) float horizontal_max<float>(VecF v) {
  return fold_max(_mm256_max_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1)));
}
template <>
inline __attribute__((always_inline)) float horizontal_sum<float>(VecF v) {
  return fold_sum(_mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1)));
}
#else
template <>
inline __attribute__((always_inline)) float horizontal_max<float>(VecF v) {
  return fold_max((__m256)v);
}
template <>
inline __attribute__((always_inline)) float horizontal_sum<float>(VecF v) {
  return fold_sum((__m256)v);
}
#endif
#endif

// 2^x for x <= ~120; x below -126 (and -inf) gives 0 or a subnormal, NaN stays NaN. Relative error below 2 ulp.
// Range reduction by the 1.5*2^23 addition trick, degree-6 minimax polynomial of 2^f on [-1/2, 1/2] (1.9e-9).
TRANSFUSE_INLINE VecF vexp2(VecF x) {
  const VecF low = splat<float>(-127.0f), magic = splat<float>(12582912.0f);
  x = vmax(low, x);
  const VecF t = x + magic;
  const VecF f = x - (t - magic);
  VecF p = splat<float>(1.534581036881557e-4f);
  p = p * f + splat<float>(1.3399931205830655e-3f);
  p = p * f + splat<float>(9.618488963182889e-3f);
  p = p * f + splat<float>(5.550328777006429e-2f);
  p = p * f + splat<float>(2.402264689057807e-1f);
  p = p * f + splat<float>(6.931472057372419e-1f);
  p = p * f + splat<float>(1.0f);
  VecI bits = (VecI)p + ((VecI)t << 23);
  return (VecF)bits;
}
TRANSFUSE_INLINE VecD vexp2(VecD x) {
  double lanes[Simd<double>::W];
  store(lanes, x);
  for (int i = 0; i < Simd<double>::W; ++i) lanes[i] = std::exp2(lanes[i]);
  return load<VecD>(lanes);
}

// log2(x) for positive, normal, finite x. The mantissa m in [sqrt(1/2), sqrt(2)): with s = (m - 1) / (m + 1),
// log2 m = 2 log2(e) (s + s^3 / 3 + ...); |s| < 0.172, so the first term left out is below 1e-9 of the result.
TRANSFUSE_INLINE VecF vlog2(VecF x) {
  const VecI exponent = ((VecI)x - 0x3f3504f3) >> 23;
  const VecF m = (VecF)((VecI)x - (exponent << 23));
  const VecF s = (m - 1.0f) / (m + 1.0f), z = s * s;
  VecF p = splat<float>(0.32059889797532525f);
  p = p * z + splat<float>(0.4121985831111324f);
  p = p * z + splat<float>(0.5770780163555854f);
  p = p * z + splat<float>(0.9617966939259756f);
  p = p * z + splat<float>(2.8853900817779268f);
  return p * s + __builtin_convertvector(exponent, VecF);
}
TRANSFUSE_INLINE VecD vlog2(VecD x) {
  double lanes[Simd<double>::W];
  store(lanes, x);
  for (int i = 0; i < Simd<double>::W; ++i) lanes[i] = std::log2(lanes[i]);
  return load<VecD>(lanes);
}

// ---- half precision -------------------------------------------------------------------------------------------
TRANSFUSE_INLINE float bf16_to_float(uint16_t h) {
  const uint32_t bits = (uint32_t)h << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// Round to nearest even; NaN stays a (quiet) NaN.
TRANSFUSE_INLINE uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
TRANSFUSE_INLINE float f16_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
  uint32_t bits;
  float f;
  if (exponent == 0x1fu) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
  } else {
    f = (float)mantissa * 5.9604644775390625e-8f;  // subnormal: mantissa * 2^-24
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}
TRANSFUSE_INLINE uint16_t float_to_f16(float f) {
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(f, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {                                    // subnormal or zero: let the adder round
    float g;
    std::memcpy(&g, &magnitude, 4);
    g += 0.5f;
    uint32_t r;
    std::memcpy(&r, &g, 4);
    return (uint16_t)(sign | (r - 0x3f000000u));
  }
  return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
#endif
}

template <class T>
TRANSFUSE_INLINE T load_scalar(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return (T)((const float*)p)[i];
    case DType::f64: return (T)((const double*)p)[i];
    case DType::bf16: return (T)bf16_to_float(((const uint16_t*)p)[i]);
    case DType::f16: return (T)f16_to_float(((const uint16_t*)p)[i]);
  }
  return T(0);
}

// Contiguous widening loads: dst[0..n) = src[0..n).
// Rows are short: a call of memcpy would cost as much as the copy.
TRANSFUSE_INLINE void copy_row(const float* src, int64_t n, float* dst) {
  constexpr int W = Simd<float>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load<VecF>(src + i));
  for (; i < n; ++i) dst[i] = src[i];
}
TRANSFUSE_INLINE void copy_row(const double* src, int64_t n, double* dst) { std::memcpy(dst, src, n * sizeof(double)); }
static inline void widen(const float* src, int64_t n, float* dst) { copy_row(src, n, dst); }
static inline void widen_bf16(const uint16_t* src, int64_t n, float* dst) {
  int64_t i = 0;
  constexpr int W = Simd<float>::W;
  for (; i + W <= n; i += W) {
    const VecU u = __builtin_convertvector(load<VecU16>(src + i), VecU) << 16;
    store(dst + i, (VecF)u);
  }
  for (; i < n; ++i) dst[i] = bf16_to_float(src[i]);
}
static inline void widen_f16(const uint16_t* src, int64_t n, float* dst) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(src + i))));
#endif
  for (; i < n; ++i) dst[i] = f16_to_float(src[i]);
}
static inline void narrow_bf16(const float* src, int64_t n, uint16_t* dst) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + 16 <= n; i += 16) {
    const __m256bh h = _mm512_cvtneps_pbh(_mm512_loadu_ps(src + i));
    std::memcpy(dst + i, &h, 32);
  }
#else
  constexpr int W = Simd<float>::W;
  for (; i + W <= n; i += W) {
    const VecU u = load<VecU>(src + i);
    const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const VecU quiet = (u >> 16) | 0x40u;
    const VecU r = (VecU)((u & 0x7fffffffu) > 0x7f800000u ? (VecI)quiet : (VecI)rounded);
    store(dst + i, __builtin_convertvector(r, VecU16));
  }
#endif
  for (; i < n; ++i) dst[i] = float_to_bf16(src[i]);
}
static inline void narrow_f16(const float* src, int64_t n, uint16_t* dst) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(dst + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), 0));
#endif
  for (; i < n; ++i) dst[i] = float_to_f16(src[i]);
}

// dst[0..n) = src[i * stride], converted to the accumulation type. `offset` and `stride` count elements.
static inline void load_row(const void* src, DType dtype, int64_t offset, int64_t stride, int64_t n, float* dst) {
  if (stride == 1) {
    switch (dtype) {
      case DType::f32: widen((const float*)src + offset, n, dst); return;
      case DType::bf16: widen_bf16((const uint16_t*)src + offset, n, dst); return;
      case DType::f16: widen_f16((const uint16_t*)src + offset, n, dst); return;
      case DType::f64: break;
    }
  }
  for (int64_t i = 0; i < n; ++i) dst[i] = load_scalar<float>(src, dtype, offset + i * stride);
}
static inline void load_row(const void* src, DType dtype, int64_t offset, int64_t stride, int64_t n, double* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = load_scalar<double>(src, dtype, offset + i * stride);
}
static inline void store_row(void* dst, DType dtype, int64_t offset, int64_t stride, int64_t n, const float* src) {
  if (stride == 1) {
    switch (dtype) {
      case DType::f32: copy_row(src, n, (float*)dst + offset); return;
      case DType::bf16: narrow_bf16(src, n, (uint16_t*)dst + offset); return;
      case DType::f16: narrow_f16(src, n, (uint16_t*)dst + offset); return;
      case DType::f64: break;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = offset + i * stride;
    switch (dtype) {
      case DType::f32: ((float*)dst)[at] = src[i]; break;
      case DType::f64: ((double*)dst)[at] = src[i]; break;
      case DType::bf16: ((uint16_t*)dst)[at] = float_to_bf16(src[i]); break;
      case DType::f16: ((uint16_t*)dst)[at] = float_to_f16(src[i]); break;
    }
  }
}
static inline void store_row(void* dst, DType dtype, int64_t offset, int64_t stride, int64_t n, const double* src) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = offset + i * stride;
    if (dtype == DType::f64)
      ((double*)dst)[at] = src[i];
    else
      ((float*)dst)[at] = (float)src[i];
  }
}

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
