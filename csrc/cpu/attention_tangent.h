// Fused attention, forward mode: out' = (P T) V + P V' - mu out,  mu = rowsum(P T) = lse',  with P recomputed from lse.
#pragma once

#include "attention_backward.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

constexpr int kTangentRows = 256;  // query rows of a task

template <class A>
struct TangentTask {
  using V = typename Simd<A>::V;
  using P = DotPlain<A>;
  static constexpr int W = Simd<A>::W;

  const AttentionTangent& args;
  int64_t ldd, ldv, ldk;
  int value_vecs;
  A *q, *qt, *out, *mu, *key_t, *key_tangent_t, *rows, *value, *value_tangent, *s, *t, *bias_row;

  explicit TangentTask(const AttentionTangent& a) : args(a) {
    ldd = padded_columns<A>(a.shape.key_dim);
    ldv = padded_columns<A>(round_up(a.shape.value_dim, W));
    ldk = padded_columns<A>(kBlockKeys);
    value_vecs = (int)((a.shape.value_dim + W - 1) / W);
  }

  size_t carve(char* base) {
    Carver c{base};
    q = c.take<A>(kTangentRows * ldd);
    qt = c.take<A>(kTangentRows * ldd);
    out = c.take<A>(kTangentRows * ldv);
    mu = c.take<A>(kTangentRows);
    key_t = c.take<A>(panels_size<P>(kBlockKeys, args.shape.key_dim));
    key_tangent_t = c.take<A>(panels_size<P>(kBlockKeys, args.shape.key_dim));
    rows = c.take<A>(kBlockKeys * ldd);
    value = c.take<A>(kBlockKeys * ldv);
    value_tangent = c.take<A>(kBlockKeys * ldv);
    s = c.take<A>(kBlockRows * ldk);
    t = c.take<A>(kBlockRows * ldk);
    bias_row = c.take<A>(kBlockKeys);
    return c.used;
  }

  void run(int64_t b, int64_t h, const Run& positions) {
    const AttentionShape& shape = args.shape;
    const Tokens tokens = query_tokens(shape);
    const int64_t i0 = positions.begin, count = positions.end - i0;
    const int64_t padded_rows = round_up(count, kTileRows);
    load_tokens(args.query, tokens, b, h, i0, count, padded_rows, shape.key_dim, q, ldd);
    load_tokens(args.query_tangent, tokens, b, h, i0, count, padded_rows, shape.key_dim, qt, ldd);
    std::memset(out, 0, padded_rows * ldv * sizeof(A));
    for (int64_t r = 0; r < count; ++r) mu[r] = A(0);
    for (int i = 0; i < args.source_count; ++i) source(i, b, h, positions.window, i0, count);
    const int64_t at = (b * shape.heads + h) * shape.queries;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = tokens[i0 + r];
      static_cast<A*>(args.lse_tangent)[at + token] = mu[r];
      A* row = value;  // the key blocks are done: their buffer serves as one row of scratch
      const int64_t* os = args.out.stride;
      load_row(args.out.ptr, args.out.dtype, b * os[0] + h * os[1] + token * os[2], os[3], shape.value_dim, row);
      A* o = out + r * ldv;
      for (int64_t d = 0; d < shape.value_dim; ++d) o[d] -= mu[r] * row[d];
      const int64_t* ts = args.out_tangent.stride;
      store_row(args.out_tangent.ptr, args.out_tangent.dtype, b * ts[0] + h * ts[1] + token * ts[2], ts[3],
                shape.value_dim, o);
    }
  }

  void source(int index, int64_t b, int64_t h, int64_t window, int64_t i0, int64_t count) {
    const SourceView& src = args.sources[index];
    const SourceTangent& tangent = args.tangents[index];
    const AttentionShape& shape = args.shape;
    const int64_t sb = source_batch(src, b), kv_head = h / (shape.heads / shape.kv_heads);
    const Range keys = keys_of(src, shape.windows, window);
    const Tokens tokens = key_tokens(src, shape);
    const int64_t block = key_block<A>(src, keys);
    for (int64_t j0 = keys.begin; j0 < keys.end; j0 += block) {
      const int64_t cols = keys.end - j0 < block ? keys.end - j0 : block, padded = round_up(cols, W);
      bool packed = false;
      for (int64_t r = 0; r < count; r += kBlockRows) {
        const int64_t n = count - r < kBlockRows ? count - r : kBlockRows;
        const Visible vis = block_visible(src, shape, b, h, i0 + r, n, j0, cols);
        if (vis == Visible::none) continue;
        if (!packed) {
          load_tokens(src.key, tokens, sb, kv_head, j0, cols, cols, shape.key_dim, rows, ldd);
          transpose_panels<P>(rows, ldd, cols, padded, shape.key_dim, key_t);
          load_tokens(tangent.key, tokens, sb, kv_head, j0, cols, cols, shape.key_dim, rows, ldd);
          transpose_panels<P>(rows, ldd, cols, padded, shape.key_dim, key_tangent_t);
          load_tokens(src.value, tokens, sb, kv_head, j0, cols, cols, shape.value_dim, value, ldv);
          load_tokens(tangent.value, tokens, sb, kv_head, j0, cols, cols, shape.value_dim, value_tangent, ldv);
          packed = true;
        }
        tile(src, tangent, b, h, i0 + r, r, n, j0, cols, padded, vis);
      }
    }
  }

  void tile(const SourceView& src, const SourceTangent& tangent, int64_t b, int64_t h, int64_t i0, int64_t r0,
            int64_t count, int64_t j0, int64_t cols, int64_t padded, Visible vis) {
    const AttentionShape& shape = args.shape;
    const int tile_rows = (int)round_up(count, kTileRows), vecs = (int)(padded / W);
    gemm_panels<P>(tile_rows, vecs, shape.key_dim, q + r0 * ldd, ldd, key_t, s, ldk, false);
    gemm_panels<P>(tile_rows, vecs, shape.key_dim, qt + r0 * ldd, ldd, key_t, t, ldk, false);
    gemm_panels<P>(tile_rows, vecs, shape.key_dim, q + r0 * ldd, ldd, key_tangent_t, t, ldk, true);
    A factor = (A)(src.scale * kLog2E);
    if (vis != Visible::all || src.bias.present() || cols != padded) {
      finish_logits(src, shape, b, h, i0, count, j0, cols, padded, vis, factor, s, ldk, bias_row);
      factor = A(1);
    }
    const A scale = (A)src.scale;
    const A* lse = static_cast<const A*>(args.lse) + (b * shape.heads + h) * shape.queries;
    const Tokens tokens = query_tokens(shape);
    const BiasRow moving = bias_row_kind(tangent.bias, src, shape, j0, cols);
    for (int64_t j = 0; j < padded; ++j) bias_row[j] = A(0);
    for (int64_t r = 0; r < count; ++r) {
      A *sr = s + r * ldk, *tr = t + r * ldk;
      const A shift = shift_of(lse[tokens[i0 + r]]);
      if (moving != BiasRow::none) {
        const A* row = load_bias(tangent.bias, moving, src, shape, b, h, i0 + r, j0, cols, bias_row);
        if (row != bias_row) copy_row(row, cols, bias_row);
      }
      V total{};
      for (int v = 0; v < vecs; ++v) {
        const V p = vexp2(load<V>(sr + v * W) * factor - shift);
        const V pt = p * (load<V>(tr + v * W) * scale + load<V>(bias_row + v * W));
        store(sr + v * W, p);
        store(tr + v * W, pt);
        total += pt;
      }
      mu[r0 + r] += horizontal_sum<A>(total);
    }
    for (int64_t r = count; r < tile_rows; ++r) {
      std::memset(s + r * ldk, 0, ldk * sizeof(A));
      std::memset(t + r * ldk, 0, ldk * sizeof(A));
    }
    A* o = out + r0 * ldv;
    gemm<P, false>(tile_rows, value_vecs, cols, t, ldk, value, ldv, o, ldv, true);
    gemm<P, false>(tile_rows, value_vecs, cols, s, ldk, value_tangent, ldv, o, ldv, true);
  }
};

template <class A>
static void tangent_with(const AttentionTangent& args, const Parallel& parallel) {
  const AttentionShape& s = args.shape;
  const Runs runs(s, kTangentRows);
  for_each_task(parallel, s.batch * s.heads * runs.count, [&](int64_t task) {
    TangentTask<A> t(args);
    t.carve(static_cast<char*>(thread_scratch(t.carve(nullptr))));
    const int64_t bh = task / runs.count;
    t.run(bh / s.heads, bh % s.heads, runs.list.data[task % runs.count]);
  });
}

static void attention_tangent(const AttentionTangent& args, const Parallel& parallel) {
  if (args.shape.dtype == DType::f64) return tangent_with<double>(args, parallel);
  tangent_with<float>(args, parallel);
}

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
