// Cosine nearest neighbours: the tile loop of a matrix product with a running (max, argmax) in place of its result.
//
// A task is a run of rows of one batch entry. References come in blocks of columns, packed and normalised once per task
// and block; the depth is cut so that a slice of the rows and a slice of the block stay in the second-level cache. What
// is kept of the scores is one strip of rows x block. A row's result does not depend on the tasks' sizes.
#pragma once

#include <cmath>

#include "panels.h"
#include "transfuse/token_merging.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

constexpr int64_t kNearestColumns = 96;  // whole panels of three vectors at every width
constexpr int64_t kNearestTile = 32;     // rows of one call of the matrix kernel
constexpr int64_t kNearestRows = 384;    // rows of a task
constexpr int64_t kNearestDepth = 384;   // units of a slice

// 1 / |row|, 0 for a row that counts as zero. NaN gives 0 too: 0 * NaN is NaN, so the row stays visible.
template <class A>
static A inverse_norm(const A* row, int64_t n) {
  using V = typename Simd<A>::V;
  constexpr int W = Simd<A>::W;
  V even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const V a = load<V>(row + i), b = load<V>(row + i + W);
    even += a * a;
    odd += b * b;
  }
  A sum = horizontal_sum<A>(even + odd);
  for (; i < n; ++i) sum += row[i] * row[i];
  const A norm = std::sqrt(sum);
  return norm > A(kMergeSmallestNorm) ? A(1) / norm : A(0);
}

// Rows of units for the matrix kernel. Plain accumulation takes normalised rows; bf16 pairs stay as they came, so that
// products are exact, and the norms are applied to the scores.
template <class P>
struct NearestRow {
  using A = typename P::Acc;
  static constexpr bool kScaleScores = false;
  static void pack(const View& v, int64_t offset, int64_t n, A*, A* dst, A* inverse) {
    load_row(v.ptr, v.dtype, offset, v.stride[2], n, dst);
    const A scale = inverse_norm(dst, n);
    for (int64_t i = 0; i < n; ++i) dst[i] *= scale;
    *inverse = A(1);
  }
};

#if TRANSFUSE_BF16_DOT
template <>
struct NearestRow<DotBf16> {
  static constexpr bool kScaleScores = true;
  static void pack(const View& v, int64_t offset, int64_t n, float* wide, uint32_t* dst, float* inverse) {
    load_row(v.ptr, v.dtype, offset, v.stride[2], n, wide);
    *inverse = inverse_norm(wide, n);
    uint16_t* half = reinterpret_cast<uint16_t*>(dst);
    half[(n + 1) / 2 * 2 - 1] = 0;
    narrow_bf16(wide, n, half);
  }
};
#endif

template <class P>
struct NearestTask {
  using A = typename P::Acc;
  using Unit = typename P::Unit;
  using V = typename Simd<A>::V;
  static constexpr int W = Simd<A>::W;

  const NearestArgs& args;
  int64_t chunk, units, slices, slice, ldq, ldk, lds;
  Unit *rows, *keys, *panels;
  A *scores, *row_inverse, *key_inverse, *best, *wide;
  int64_t* index;

  NearestTask(const NearestArgs& a, int64_t chunk_rows) : args(a), chunk(chunk_rows) {
    units = (a.depth + P::kDepth - 1) / P::kDepth;
    slices = units == 0 ? 1 : (units + kNearestDepth - 1) / kNearestDepth;
    slice = (units + slices - 1) / slices;
    ldq = padded_columns<Unit>(units);
    ldk = padded_columns<Unit>(units);
    lds = padded_columns<A>(kNearestColumns);
  }

  size_t carve(char* base) {
    Carver c{base};
    rows = c.take<Unit>(chunk * ldq);
    keys = c.take<Unit>(kNearestColumns * ldk);
    panels = c.take<Unit>(panels_size<P>(kNearestColumns, slice));
    scores = c.take<A>(chunk * lds);
    row_inverse = c.take<A>(chunk);
    key_inverse = c.take<A>(kNearestColumns);
    best = c.take<A>(chunk);
    index = c.take<int64_t>(chunk);
    wide = c.take<A>(args.depth + W);
    return c.used;
  }

  void pack(const View& v, int64_t b, int64_t token, Unit* dst, A* inverse) {
    if (units == 0) {
      *inverse = A(0);
    } else {
      NearestRow<P>::pack(v, b * v.stride[0] + token * v.stride[1], args.depth, wide, dst, inverse);
    }
  }

  bool allowed(int64_t b, int64_t row, int64_t column) const {
    if (args.exclude_self && row == column) return false;
    return args.mask == nullptr || args.mask[b * args.mask_stride[0] + column * args.mask_stride[1]] != 0;
  }

  // Folds the scores of one row against columns [j0, j0 + count) into its running maximum.
  void fold(int64_t b, int64_t i0, int64_t r, int64_t j0, int64_t count, int64_t padded) {
    A* s = scores + r * lds;
    if (NearestRow<P>::kScaleScores)
      for (int64_t j = 0; j < padded; j += W) store(s + j, load<V>(s + j) * load<V>(key_inverse + j));
    for (int64_t j = count; j < padded; ++j) s[j] = negative_infinity<A>();
    if (args.mask != nullptr) {
      const uint8_t* m = args.mask + b * args.mask_stride[0] + j0 * args.mask_stride[1];
      for (int64_t j = 0; j < count; ++j)
        if (m[j * args.mask_stride[1]] == 0) s[j] = negative_infinity<A>();
    }
    const int64_t self = i0 + r - j0;
    if (args.exclude_self && self >= 0 && self < count) s[self] = negative_infinity<A>();
    V top = splat<A>(A(0)) + negative_infinity<A>();
    for (int64_t j = 0; j < padded; j += W) top = vmax(load<V>(s + j), top);  // in this order a NaN loses
    const A high = horizontal_max<A>(top);
    if (!(high > best[r])) return;
    int64_t j = 0;
    while (s[j] != high) ++j;
    best[r] = high;
    index[r] = j0 + j;
  }

  // A row without a winner: nothing was allowed, or everything that was is NaN.
  void settle(int64_t b, int64_t i, int64_t r) {
    if (best[r] != negative_infinity<A>()) return;
    for (int64_t j = 0; j < args.columns; ++j) {
      if (!allowed(b, i, j)) continue;
      index[r] = j;
      best[r] = A(__builtin_nan(""));
      return;
    }
  }

  void run(int64_t b, int64_t i0, int64_t count) {
    const int64_t tiled = round_up(count, kTileRows);
    std::memset(rows, 0, tiled * ldq * sizeof(Unit));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = args.row_token != nullptr ? args.row_token[i0 + r] : i0 + r;
      pack(args.x, b, token, rows + r * ldq, row_inverse + r);
      best[r] = negative_infinity<A>();
      index[r] = -1;
    }
    for (int64_t j0 = 0; j0 < args.columns; j0 += kNearestColumns) {
      const int64_t left = args.columns - j0, cols = left < kNearestColumns ? left : kNearestColumns;
      const int64_t padded = round_up(cols, W);
      for (int64_t j = 0; j < padded; ++j) key_inverse[j] = A(0);
      for (int64_t j = 0; j < cols; ++j) {
        const int64_t token = args.column_token != nullptr ? args.column_token[j0 + j] : j0 + j;
        pack(args.reference, b, token, keys + j * ldk, key_inverse + j);
      }
      if (units == 0) std::memset(scores, 0, tiled * lds * sizeof(A));
      for (int64_t k = 0; k < units; k += slice) {
        const int64_t depth = units - k < slice ? units - k : slice;
        transpose_panels<P>(keys + k, ldk, cols, padded, depth, panels);
        for (int64_t r = 0; r < tiled; r += kNearestTile) {
          const int64_t n = tiled - r < kNearestTile ? tiled - r : kNearestTile;
          gemm_panels<P>((int)n, (int)(padded / W), depth, rows + r * ldq + k, ldq, panels, scores + r * lds, lds,
                         k > 0);
        }
      }
      for (int64_t r = 0; r < count; ++r) fold(b, i0, r, j0, cols, padded);
    }
    A* similarity = static_cast<A*>(args.similarity) + b * args.rows + i0;
    for (int64_t r = 0; r < count; ++r) {
      if (NearestRow<P>::kScaleScores && index[r] >= 0) best[r] *= row_inverse[r];
      settle(b, i0 + r, r);
      similarity[r] = best[r];
      args.index[b * args.rows + i0 + r] = index[r];
    }
  }
};

template <class P>
static void nearest_with(const NearestArgs& args, const Parallel& parallel) {
  int64_t chunk = kNearestRows;
  while (chunk > kNearestTile && args.batch * ((args.rows + chunk - 1) / chunk) < 4 * parallel.threads) chunk /= 2;
  if (chunk > round_up(args.rows, kTileRows)) chunk = round_up(args.rows, kTileRows);
  if (chunk == 0) return;
  const int64_t chunks = (args.rows + chunk - 1) / chunk;
  for_each_task(parallel, args.batch * chunks, [&](int64_t task) {
    NearestTask<P> t(args, chunk);
    t.carve(static_cast<char*>(thread_scratch(t.carve(nullptr))));
    const int64_t i0 = task % chunks * chunk, left = args.rows - i0;
    t.run(task / chunks, i0, left < chunk ? left : chunk);
  });
}

static void nearest_tokens(const NearestArgs& args, const Parallel& parallel) {
  if (args.dtype == DType::f64) return nearest_with<DotPlain<double>>(args, parallel);
#if TRANSFUSE_BF16_DOT
  if (args.dtype == DType::bf16) return nearest_with<DotBf16>(args, parallel);
#endif
  nearest_with<DotPlain<float>>(args, parallel);
}

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
