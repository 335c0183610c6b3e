// Fused attention, forward: online softmax over key blocks; blends in the loaders, groups and gates in the epilogue.
//
// A task is one head of one batch entry and a run of query rows long enough (up to 512) that packing a key block costs
// little against using it. Nothing larger than a tile and the task's own rows is stored.
#pragma once

#include "attention_window.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

// Packed operands of one key block, for plain accumulation: K^T in panels [d][key], V [key][d].
template <class P>
struct KeyBlockPacker {
  using A = typename P::Acc;
  static void keys(const SourceView& s, Tokens tokens, int64_t sb, int64_t h, int64_t j0, int64_t cols, int64_t padded,
                   int64_t n, A* rows, A* other, typename P::Unit* dst) {
    const View& k = s.key;
    const bool in_place = k.dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32) && k.stride[3] == 1 &&
                          tokens.list == nullptr && !s.key_blend.other.present();
    if (in_place) {
      const A* first = static_cast<const A*>(k.ptr) + sb * k.stride[0] + h * k.stride[1] + j0 * k.stride[2];
      transpose_panels<P>(first, k.stride[2], cols, padded, n, dst);
      return;
    }
    for (int64_t j = 0; j < cols; ++j) load_token(s.key, sb, h, tokens[j0 + j], n, &s.key_blend, rows + j * n, other);
    transpose_panels<P>(rows, n, cols, padded, n, dst);
  }
  static void values(const SourceView& s, Tokens tokens, int64_t sb, int64_t h, int64_t j0, int64_t cols, int64_t n,
                     typename P::Unit* dst, int64_t ld) {
    load_tokens(s.value, tokens, sb, h, j0, cols, cols, n, dst, ld);
  }
  static void query(const AttentionForward& args, int64_t b, int64_t h, int64_t token, A* other,
                    typename P::Unit* dst) {
    load_token(args.query, b, h, token, args.shape.key_dim, &args.query_blend, dst, other);
  }
};

#if TRANSFUSE_BF16_DOT
// Pairs along the depth: K^T in panels [d/2][key][2], V [key/2][d][2].
template <>
struct KeyBlockPacker<DotBf16> {
  static void keys(const SourceView& s, Tokens tokens, int64_t sb, int64_t h, int64_t j0, int64_t cols, int64_t padded,
                   int64_t n, float* rows, float* other, uint32_t* dst) {
    const int64_t pairs = (n + 1) / 2;
    uint32_t* packed = reinterpret_cast<uint32_t*>(rows);  // rows holds cols * (n + 1) floats: room for the pairs
    const bool direct = !s.key_blend.other.present() && s.key.stride[3] == 1;
    for (int64_t j = 0; j < cols; ++j) {
      uint16_t* half = reinterpret_cast<uint16_t*>(packed + j * pairs);
      half[2 * pairs - 1] = 0;
      if (direct) {
        const uint16_t* k =
            (const uint16_t*)s.key.ptr + sb * s.key.stride[0] + h * s.key.stride[1] + tokens[j0 + j] * s.key.stride[2];
        std::memcpy(half, k, n * sizeof(uint16_t));
      } else {
        load_token(s.key, sb, h, tokens[j0 + j], n, &s.key_blend, other, other + n);
        narrow_bf16(other, n, half);
      }
    }
    transpose_panels<DotBf16>(packed, pairs, cols, padded, pairs, dst);
  }
  static void values(const SourceView& s, Tokens tokens, int64_t sb, int64_t h, int64_t j0, int64_t cols, int64_t n,
                     uint32_t* dst, int64_t ld) {
    const uint16_t* base = (const uint16_t*)s.value.ptr + sb * s.value.stride[0] + h * s.value.stride[1];
    const int64_t step = s.value.stride[3];
    for (int64_t j = 0; j < cols; j += 2) {
      uint32_t* out = dst + j / 2 * ld;
      const uint16_t* v = base + tokens[j0 + j] * s.value.stride[2];
      if (j + 1 < cols) {
        const uint16_t* next = base + tokens[j0 + j + 1] * s.value.stride[2];
        for (int64_t d = 0; d < n; ++d) out[d] = (uint32_t)v[d * step] | (uint32_t)next[d * step] << 16;
      } else {
        for (int64_t d = 0; d < n; ++d) out[d] = v[d * step];
      }
      for (int64_t d = n; d < ld; ++d) out[d] = 0;
    }
  }
  static void query(const AttentionForward& args, int64_t b, int64_t h, int64_t token, float* other, uint32_t* dst) {
    const int64_t n = args.shape.key_dim;
    load_token(args.query, b, h, token, n, &args.query_blend, other, other + n);
    uint16_t* half = reinterpret_cast<uint16_t*>(dst);
    half[(n + 1) / 2 * 2 - 1] = 0;
    narrow_bf16(other, n, half);
  }
};
#endif

template <class P>
struct ForwardTask {
  using A = typename P::Acc;
  using Unit = typename P::Unit;
  using V = typename Simd<A>::V;
  static constexpr int W = Simd<A>::W;

  const AttentionForward& args;
  int64_t chunk;               // query rows of a run
  const Run* ahead = nullptr;  // windows only: the run that follows, in the same head
  int64_t depth_units, ldq, ldo, ldv, lds, ldp;
  int value_vecs;

  Unit *queries, *key_t, *values, *probs_packed;
  A *out, *sum, *row_max, *row_sum, *scores, *rows, *other, *bias_row;
  Visible* visible;

  ForwardTask(const AttentionForward& a, int64_t chunk_rows) : args(a), chunk(chunk_rows) {
    const AttentionShape& s = a.shape;
    depth_units = (s.key_dim + P::kDepth - 1) / P::kDepth;
    ldq = padded_columns<Unit>(depth_units);
    ldo = padded_columns<A>(round_up(s.value_dim, W));
    ldv = ldo;
    lds = padded_columns<A>(kBlockKeys);
    ldp = padded_columns<Unit>(kBlockKeys / P::kDepth);
    value_vecs = (int)((s.value_dim + W - 1) / W);
  }

  size_t carve(char* base) {
    Carver c{base};
    const AttentionShape& s = args.shape;
    queries = c.take<Unit>(chunk * ldq);
    out = c.take<A>(chunk * ldo);
    sum = args.group_count > 1 ? c.take<A>(chunk * ldo) : nullptr;
    row_max = c.take<A>(chunk);
    row_sum = c.take<A>(chunk);
    key_t = c.take<Unit>(panels_size<P>(kBlockKeys, depth_units));
    values = c.take<Unit>((kBlockKeys / P::kDepth) * ldv);
    scores = c.take<A>(kBlockRows * lds);
    probs_packed = P::kDepth > 1 ? c.take<Unit>(kBlockRows * ldp) : nullptr;
    rows = c.take<A>(kBlockKeys * (s.key_dim + 1));
    other = c.take<A>(2 * s.key_dim + W);
    bias_row = c.take<A>(kBlockKeys);
    visible = c.take<Visible>(chunk / kBlockRows);
    return c.used;
  }

  // Rows [r0, r0 + count) of the task against the packed key block.
  void softmax_tile(const SourceView& s, int64_t b, int64_t h, int64_t i0, int64_t r0, int64_t count, int64_t j0,
                    int64_t cols, int64_t padded, Visible vis) {
    const int tile_rows = (int)round_up(count, kTileRows);
    const int vecs = (int)(padded / W);
    gemm_panels<P>(tile_rows, vecs, depth_units, queries + r0 * ldq, ldq, key_t, scores, lds, false);
    A factor = (A)(s.scale * kLog2E);
    const bool plain = vis == Visible::all && !s.bias.present() && cols == padded && factor >= A(0);
    if (!plain) {
      finish_logits(s, args.shape, b, h, i0, count, j0, cols, padded, vis, factor, scores, lds, bias_row);
      factor = A(1);
    }
    // Two passes over the rows: the folds of one row's maximum hide behind the loads of the next, and the exponentials
    // of the second pass wait for nothing.
    A shifts[kBlockRows];
    for (int64_t r = 0; r < count; ++r) {
      const A* x = scores + r * lds;
      V top = load<V>(x);
      for (int v = 1; v < vecs; ++v) top = vmax(top, load<V>(x + v * W));
      const A tile_max = horizontal_max<A>(top) * factor;
      const A old_max = row_max[r0 + r];
      const A new_max = old_max > tile_max ? old_max : tile_max;
      shifts[r] = new_max == negative_infinity<A>() ? A(0) : new_max;
      if (new_max != old_max) rescale(r0 + r, old_max - shifts[r], new_max);
    }
    const V scale = splat<A>(factor);
    for (int64_t r = 0; r < count; ++r) {
      A* x = scores + r * lds;
      const V shift = splat<A>(shifts[r]);
      V total{};
      for (int v = 0; v < vecs; ++v) {
        const V p = vexp2(load<V>(x + v * W) * scale - shift);
        store(x + v * W, p);
        total += p;
      }
      row_sum[r0 + r] += horizontal_sum<A>(total);
      if (ahead != nullptr) prefetch(b, h, ahead->begin + r0 + r);
      pack_probs(r, x, padded);
    }
    accumulate(r0, count, tile_rows, cols);
  }

  // Asks for the rows of a position of the next window. One position per softmax row: a core waits when it asks for
  // more lines than it can keep in flight.
  void prefetch(int64_t b, int64_t h, int64_t position) {
    if (position >= ahead->end) return;
    const SourceView& source = args.sources[0];
    const int64_t sb = source_batch(source, b), kv_head = h / (args.shape.heads / args.shape.kv_heads);
    const int64_t token = args.shape.windows.tokens[position];
    prefetch_row(args.query, b, h, token, args.shape.key_dim);
    prefetch_row(source.key, sb, kv_head, token, args.shape.key_dim);
    prefetch_row(source.value, sb, kv_head, token, args.shape.value_dim);
  }

  // Brings a row's running sum and output to a new maximum.
  void rescale(int64_t row, A exponent, A new_max) {
    row_max[row] = new_max;
    if (row_sum[row] == A(0)) return;  // nothing accumulated yet
    const A alpha = vexp2(splat<A>(exponent))[0];
    row_sum[row] *= alpha;
    A* o = out + row * ldo;
    for (int v = 0; v < value_vecs; ++v) store(o + v * W, load<V>(o + v * W) * alpha);
  }

  void pack_probs(int64_t r, const A* x, int64_t padded) {
    if constexpr (P::kDepth > 1) narrow_bf16(x, padded, reinterpret_cast<uint16_t*>(probs_packed + r * ldp));
  }

  void accumulate(int64_t r0, int64_t count, int tile_rows, int64_t cols) {
    A* o = out + r0 * ldo;
    if constexpr (P::kDepth > 1) {
      if (tile_rows > count) std::memset(probs_packed + count * ldp, 0, (tile_rows - count) * ldp * sizeof(Unit));
      gemm<P, false>(tile_rows, value_vecs, (cols + 1) / 2, probs_packed, ldp, values, ldv, o, ldo, true);
    } else {
      // Padding rows hold zero queries, hence zero scores, and contribute nothing.
      gemm<P, false>(tile_rows, value_vecs, cols, scores, lds, values, ldv, o, ldo, true);
    }
  }

  void source(const SourceView& s, int64_t b, int64_t h, int64_t window, int64_t i0, int64_t count) {
    const int64_t sb = source_batch(s, b), kv_head = h / (args.shape.heads / args.shape.kv_heads);
    const Range keys = keys_of(s, args.shape.windows, window);
    const Tokens tokens = key_tokens(s, args.shape);
    const int64_t block = key_block<A>(s, keys);
    for (int64_t j0 = keys.begin; j0 < keys.end; j0 += block) {
      const int64_t cols = keys.end - j0 < block ? keys.end - j0 : block;
      const int64_t padded = round_up(cols, W);
      bool any = false;
      for (int64_t r = 0; r < count; r += kBlockRows) {
        const int64_t n = count - r < kBlockRows ? count - r : kBlockRows;
        const Visible v = block_visible(s, args.shape, b, h, i0 + r, n, j0, cols);
        visible[r / kBlockRows] = v;
        any = any || v != Visible::none;
      }
      if (!any) continue;
      KeyBlockPacker<P>::keys(s, tokens, sb, kv_head, j0, cols, padded, args.shape.key_dim, rows, other, key_t);
      KeyBlockPacker<P>::values(s, tokens, sb, kv_head, j0, cols, args.shape.value_dim, values, ldv);
      for (int64_t r = 0; r < count; r += kBlockRows) {
        const int64_t n = count - r < kBlockRows ? count - r : kBlockRows;
        if (visible[r / kBlockRows] == Visible::none) continue;
        softmax_tile(s, b, h, i0 + r, r, n, j0, cols, padded, visible[r / kBlockRows]);
      }
    }
  }

  void run(int64_t b, int64_t h, const Run& positions) {
    const AttentionShape& shape = args.shape;
    const Tokens tokens = query_tokens(shape);
    const int64_t i0 = positions.begin, count = positions.end - i0;
    const int64_t rows_padded = round_up(count, kTileRows);
    for (int64_t r = 0; r < count; ++r) KeyBlockPacker<P>::query(args, b, h, tokens[i0 + r], other, queries + r * ldq);
    std::memset(queries + count * ldq, 0, (rows_padded - count) * ldq * sizeof(Unit));
    const bool single = args.group_count == 1;
    if (!single) std::memset(sum, 0, count * ldo * sizeof(A));
    for (int g = 0; g < args.group_count; ++g) {
      const Weight& gate = args.gates[g];
      const bool skip = !gate.view.present() && gate.value == 0.0 && args.lse == nullptr;
      std::memset(out, 0, rows_padded * ldo * sizeof(A));
      for (int64_t r = 0; r < count; ++r) {
        row_max[r] = negative_infinity<A>();
        row_sum[r] = A(0);
      }
      for (int i = 0; i < args.source_count && !skip; ++i)
        if (args.sources[i].group == g) source(args.sources[i], b, h, positions.window, i0, count);
      for (int64_t r = 0; r < count; ++r) {
        A* o = out + r * ldo;
        const A l = row_sum[r];
        const int64_t token = tokens[i0 + r];
        const A w = (A)weight_at(gate, b, h, token);
        const A inverse = l == A(0) ? A(0) : w / l;
        if (single) {
          for (int64_t d = 0; d < ldo; ++d) o[d] = w == A(0) ? A(0) : o[d] * inverse;
          store_row(args.out.ptr, args.out.dtype,
                    b * args.out.stride[0] + h * args.out.stride[1] + token * args.out.stride[2], args.out.stride[3],
                    shape.value_dim, o);
          if (args.lse != nullptr) {
            const A lse = l == A(0) ? negative_infinity<A>() : (row_max[r] + (A)std::log2(l)) * (A)kLn2;
            static_cast<A*>(args.lse)[(b * shape.heads + h) * shape.queries + token] = lse;
          }
        } else if (w != A(0)) {
          A* t = sum + r * ldo;
          for (int64_t d = 0; d < ldo; ++d) t[d] += o[d] * inverse;
        }
      }
    }
    if (!single) {
      for (int64_t r = 0; r < count; ++r)
        store_row(args.out.ptr, args.out.dtype,
                  b * args.out.stride[0] + h * args.out.stride[1] + tokens[i0 + r] * args.out.stride[2],
                  args.out.stride[3], shape.value_dim, sum + r * ldo);
    }
  }
};

// How many of the runs of `queries` rows make about `rows` rows.
TRANSFUSE_INLINE int64_t runs_together(int64_t runs, int64_t queries, int64_t rows) { return runs * rows / queries; }

// Small windows are too little for a task: `group` of them share one, each fetching rows of the next.
template <class Task>
static void for_each_run(const Parallel& parallel, int64_t batch_heads, const Runs& runs, int64_t group,
                         const Task& prototype, int64_t heads) {
  group = group < 1 ? 1 : group;
  const int64_t groups = (runs.count + group - 1) / group;
  for_each_task(parallel, batch_heads * groups, [&](int64_t task) {
    Task t = prototype;
    t.carve(static_cast<char*>(thread_scratch(t.carve(nullptr))));
    const int64_t bh = task / groups, b = bh / heads, h = bh % heads, first = task % groups * group;
    for (int64_t i = first; i < first + group && i < runs.count; ++i) {
      t.ahead = group > 1 && i + 1 < runs.count ? runs.list.data + i + 1 : nullptr;
      t.run(b, h, runs.list.data[i]);
    }
  });
}

template <class P>
static void forward_with(const AttentionForward& args, const Parallel& parallel) {
  using A = typename P::Acc;
  const AttentionShape& s = args.shape;
  // Query and output rows of a task together stay within half of a typical 512 KB second-level cache.
  const int64_t widest = s.key_dim > s.value_dim ? s.key_dim : s.value_dim;
  int64_t chunk = 131072 / (int64_t)sizeof(A) / (widest > 0 ? widest : 1) / kBlockRows * kBlockRows;
  chunk = chunk < kBlockRows ? kBlockRows : chunk > 512 ? 512 : chunk;
  const int64_t heads = s.batch * s.heads;
  // Enough tasks for every thread to get several; a row's result does not depend on the split.
  while (chunk > kBlockRows && heads * ((s.queries + chunk - 1) / chunk) < 4 * parallel.threads) chunk /= 2;
  chunk = round_up(chunk, kBlockRows);
  if (chunk > round_up(s.queries, kBlockRows)) chunk = round_up(s.queries, kBlockRows);
  if (chunk == 0) return;
  const Runs runs(s, chunk);
  if constexpr (P::kDepth == 1) {
    if (window_tiles_apply<P>(args)) {
      // Neighbours in a task share a bias; several tasks for every thread balance the load.
      const int64_t most = heads * runs.count / (4 * parallel.threads);
      const int64_t group = runs_together(runs.count, s.queries, 2048);
      return for_each_run(parallel, heads, runs, group < most ? group : most, WindowTask<P>(args), s.heads);
    }
  }
  const int64_t group = s.windows.present() ? runs_together(runs.count, s.queries, 256) : 1;
  for_each_run(parallel, heads, runs, group, ForwardTask<P>(args, chunk), s.heads);
}

static void attention_forward(const AttentionForward& args, const Parallel& parallel) {
  if (args.shape.dtype == DType::f64) return forward_with<DotPlain<double>>(args, parallel);
#if TRANSFUSE_BF16_DOT
  if (args.shape.dtype == DType::bf16) return forward_with<DotBf16>(args, parallel);
#endif
  forward_with<DotPlain<float>>(args, parallel);
}

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
