// Packing for the matrix micro-kernels of gemm_tile.h: rows transposed into panels, and the memory of a task.
#pragma once

#include <cstdlib>
#include <new>

#include "transfuse/gemm_tile.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

template <class A>
constexpr A negative_infinity() {
  return -__builtin_inf();
}

// A plain heap array: std::vector would share its instantiation between ISA levels.
template <class T>
struct HeapArray {
  T* data;
  explicit HeapArray(int64_t count) : data(static_cast<T*>(std::malloc((count > 0 ? count : 1) * sizeof(T)))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~HeapArray() { std::free(data); }
  HeapArray(const HeapArray&) = delete;
  HeapArray& operator=(const HeapArray&) = delete;
};

// Hands out 64-byte aligned pieces of one allocation. Run once with base == nullptr to learn the size.
struct Carver {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (size_t)round_up(count * (int64_t)sizeof(T), 64);
    return p;
  }
};

#if defined(__AVX2__)
// An 8 x 8 block of 32-bit units, rows[i][0..8) to dst[.][i]: pairs, then quads, then halves change places.
template <class Unit>
TRANSFUSE_INLINE void transpose_8x8(const Unit* const* rows, int64_t from, Unit* dst, int64_t ld) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i] + from));
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      r[i + 2 * half] = _mm256_shuffle_ps(t[i + half], t[i + half + 2], 0x44);
      r[i + 2 * half + 1] = _mm256_shuffle_ps(t[i + half], t[i + half + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(reinterpret_cast<float*>(dst + i * ld), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(dst + (i + 4) * ld), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// Rows that are transposed together: an 8 x 8 block, or a vector where that is shorter.
template <class P>
constexpr int64_t kTransposed = Simd<typename P::Acc>::W < 8 ? Simd<typename P::Acc>::W : 8;

// rows[i][0..n) to dst[.][i] for kTransposed rows; dst has rows of ld units.
template <class P>
TRANSFUSE_INLINE void transpose_rows(const typename P::Unit* const* rows, int64_t n, typename P::Unit* dst,
                                     int64_t ld) {
  constexpr int64_t kStep = kTransposed<P>;
  int64_t d = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(typename P::Unit) == 4 && kStep == 8)
    for (; d + 8 <= n; d += 8) transpose_8x8(rows, d, dst + d * ld, ld);
#endif
  for (; d < n; ++d)
    for (int64_t i = 0; i < kStep; ++i) dst[d * ld + i] = rows[i][d];
}

// Packs rows src[j][0..n), j < count, as columns of panels (see gemm_panels); columns up to `padded` are zero.
template <class P>
static void transpose_panels(const typename P::Unit* src, int64_t src_ld, int64_t count, int64_t padded, int64_t n,
                             typename P::Unit* dst) {
  using Unit = typename P::Unit;
  constexpr int64_t W = Simd<typename P::Acc>::W, width = kPanelVecs * W, kStep = kTransposed<P>;
  for (int64_t j = 0; j < padded; j += kStep) {
    Unit* panel = dst + j / width * width * n + j % width;
    const Unit* s = src + j * src_ld;
    if (j + kStep <= count) {
      const Unit* rows[kStep];
      for (int64_t i = 0; i < kStep; ++i) rows[i] = s + i * src_ld;
      transpose_rows<P>(rows, n, panel, width);
    } else {
      for (int64_t d = 0; d < n; ++d)
        for (int64_t i = 0; i < kStep; ++i) panel[d * width + i] = j + i < count ? s[i * src_ld + d] : Unit(0);
    }
  }
}

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
