// Products over the columns of rows that live in cache: every row of one matrix with every row of another.
#pragma once

#include <algorithm>

#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

constexpr int64_t kDotColumns = 1024;  // columns per block
constexpr int kDotTile = 4;            // rows of one register tile

template <class T>
TRANSFUSE_INLINE T lane_sum(typename Simd<T>::V v) {
  return horizontal_sum<T>(v);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
inline __attribute__((always_inline)) float lane_sum<float>(VecF v) {
  return fold_sum((__m256)v);
}
#endif

// sums[i][j] += sum_k f(x_i[k]) v_j[k] over n columns, f the square or nothing.
template <class T, bool kSquares, int kColumns>
TRANSFUSE_INLINE void dot_tile(int64_t n, const T* const* x, const T* const* v, T (*sums)[kColumns]) {
  using V = typename Simd<T>::V;
  constexpr int64_t W = Simd<T>::W;
  V acc[kDotTile][kColumns];
#pragma GCC unroll 4
  for (int i = 0; i < kDotTile; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kColumns; ++j) acc[i][j] = V{};
  int64_t k = 0;
  for (; k + W <= n; k += W) {
    V vk[kColumns];
#pragma GCC unroll 3
    for (int j = 0; j < kColumns; ++j) vk[j] = load<V>(v[j] + k);
#pragma GCC unroll 4
    for (int i = 0; i < kDotTile; ++i) {
      V xk = load<V>(x[i] + k);
      if (kSquares) xk *= xk;
#pragma GCC unroll 3
      for (int j = 0; j < kColumns; ++j) acc[i][j] = xk * vk[j] + acc[i][j];
    }
  }
  for (int i = 0; i < kDotTile; ++i)
    for (int j = 0; j < kColumns; ++j) {
      T sum = lane_sum<T>(acc[i][j]);
      for (int64_t t = k; t < n; ++t) sum += (kSquares ? x[i][t] * x[i][t] : x[i][t]) * v[j][t];
      sums[i][j] += sum;
    }
}

template <class T, bool kSquares, int kColumns>
static __attribute__((noinline)) void dot_panel(int64_t rows, int64_t n, const T* x, int64_t ldx, const T* v,
                                                int64_t ldv, T* out, int64_t ldo) {
  const T* vs[kColumns];
  for (int j = 0; j < kColumns; ++j) vs[j] = v + j * ldv;
  for (int64_t i = 0; i < rows; i += kDotTile) {
    const int live = (int)std::min<int64_t>(kDotTile, rows - i);
    const T* xs[kDotTile];
    // Rows beyond the last are the last once more, and are dropped.
    for (int r = 0; r < kDotTile; ++r) xs[r] = x + (i + std::min(r, live - 1)) * ldx;
    T sums[kDotTile][kColumns] = {};
    dot_tile<T, kSquares, kColumns>(n, xs, vs, sums);
    for (int r = 0; r < live; ++r)
      for (int j = 0; j < kColumns; ++j) out[(i + r) * ldo + j] += sums[r][j];
  }
}

// out[i][c] = start[c * step] + sum_k f(x_i[k]) v_c[k].
template <class T, bool kSquares>
static void dots(int64_t rows, int64_t columns, int64_t classes, const T* x, int64_t ldx, const T* v, int64_t ldv,
                 const T* start, int64_t step, T* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < classes; ++c) out[i * ldo + c] = start == nullptr ? T(0) : start[c * step];
  for (int64_t k = 0; k < columns; k += kDotColumns) {
    const int64_t n = std::min(kDotColumns, columns - k);
    // Threes, but four as two and two: a single one would leave the multipliers waiting.
    for (int64_t c = 0, width; c < classes; c += width) {
      const int64_t left = classes - c;
      width = left == 4 || left == 2 ? 2 : left >= 3 ? 3 : 1;
      const auto panel = width == 3   ? dot_panel<T, kSquares, 3>
                         : width == 2 ? dot_panel<T, kSquares, 2>
                                      : dot_panel<T, kSquares, 1>;
      panel(rows, n, x + k, ldx, v + c * ldv + k, ldv, out + c, ldo);
    }
  }
}

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
