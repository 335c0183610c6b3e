// Fused attention, reverse mode: the backward of the forward, and the backward of its Jacobian-vector product.
//
// With W = G V^T, D = rowsum(G * out) - grad_lse, P recomputed from lse:   dS = P (W - D).
// For the product with tangents (q', k', v', bias'), T = scale (q' K^T + q K'^T) + bias', mu = rowsum(P T), Z = G V'^T:
//   Y = T (W - D) - mu W + Z,   X = P (Y - rho),   rho = rowsum(G * out') - mu D,   U = P (T - mu).
// A task owns one source batch, one key/value head, and one window if there are windows: it walks key blocks outermost
// and every query row that reads them innermost, so dk and dv stay in a tile and dq of those rows is touched by this
// task alone. No atomics: the result is the same bits for any number of threads.
#pragma once

#include "attention_tiles.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

constexpr int kBackwardRows = 64;

// lse in base 2, with +inf for rows that see nothing: exp2(logit - inf) = 0.
template <class A>
TRANSFUSE_INLINE A shift_of(A lse) {
  return lse == negative_infinity<A>() ? (A)__builtin_inf() : lse * (A)kLog2E;
}

// Row statistics of the whole call, (batch, head, token) contiguous.
template <class A>
struct RowStatistics {
  const A* delta;  // D
  const A* rho;    // only with tangents
  const A* mu;     // only with tangents
};

template <class A, bool kTangent>
struct BackwardTask {
  using V = typename Simd<A>::V;
  using P = DotPlain<A>;
  static constexpr int W = Simd<A>::W;
  static constexpr int kColumnStep = W > kTileRows ? W : kTileRows;

  const AttentionBackward& args;
  const RowStatistics<A>& rows;
  int64_t ldd, ldv, ldk;
  int key_vecs, value_vecs;

  A *q, *g, *qt;  // query rows, gradient rows, query tangent rows
  A *k, *kt, *key_t, *key_tangent_t, *value_t, *value_tangent_t, *value_rows;
  A *s, *w, *t, *z;  // tiles
  A *dq, *dk, *dv, *bias_row;
  // Bias gradient of a windowed source: (batch or 1, head of the group or 1, code), added to; nullptr = not wanted.
  A* window_bias = nullptr;
  int64_t window_bias_stride[2] = {0, 0};

  BackwardTask(const AttentionBackward& a, const RowStatistics<A>& r) : args(a), rows(r) {
    ldd = padded_columns<A>(round_up(a.shape.key_dim, W));
    ldv = padded_columns<A>(round_up(a.shape.value_dim, W));
    ldk = padded_columns<A>(kBlockKeys);
    key_vecs = (int)((a.shape.key_dim + W - 1) / W);
    value_vecs = (int)((a.shape.value_dim + W - 1) / W);
  }

  size_t carve(char* base) {
    Carver c{base};
    const int64_t d = args.shape.key_dim, dv_dim = args.shape.value_dim;
    q = c.take<A>(kBackwardRows * ldd);
    g = c.take<A>(kBackwardRows * ldv);
    k = c.take<A>(kBlockKeys * ldd);
    key_t = c.take<A>(panels_size<P>(kBlockKeys, d));
    value_t = c.take<A>(panels_size<P>(kBlockKeys, dv_dim));
    value_rows = c.take<A>(kBlockKeys * ldv);
    s = c.take<A>(kBackwardRows * ldk);
    w = c.take<A>(kBackwardRows * ldk);
    dq = c.take<A>(kBackwardRows * ldd);
    dk = c.take<A>(kBlockKeys * ldd);
    dv = c.take<A>(kBlockKeys * ldv);
    bias_row = c.take<A>(kBlockKeys);
    qt = kt = key_tangent_t = value_tangent_t = t = z = nullptr;
    if (kTangent) {
      qt = c.take<A>(kBackwardRows * ldd);
      kt = c.take<A>(kBlockKeys * ldd);
      key_tangent_t = c.take<A>(panels_size<P>(kBlockKeys, d));
      value_tangent_t = c.take<A>(panels_size<P>(kBlockKeys, dv_dim));
      t = c.take<A>(kBackwardRows * ldk);
      z = c.take<A>(kBackwardRows * ldk);
    }
    return c.used;
  }

  void pack_transposed(const View& x, Tokens tokens, int64_t sb, int64_t kv_head, int64_t j0, int64_t cols,
                       int64_t padded, int64_t n, A* natural, int64_t ld, A* dst) {
    load_tokens(x, tokens, sb, kv_head, j0, cols, cols, n, natural, ld);
    transpose_panels<P>(natural, ld, cols, padded, n, dst);
  }

  void pack_keys(int source, int64_t sb, int64_t kv_head, int64_t j0, int64_t cols, int64_t padded) {
    const SourceView& src = args.sources[source];
    const Tokens tokens = key_tokens(src, args.shape);
    pack_transposed(src.key, tokens, sb, kv_head, j0, cols, padded, args.shape.key_dim, k, ldd, key_t);
    pack_transposed(src.value, tokens, sb, kv_head, j0, cols, padded, args.shape.value_dim, value_rows, ldv, value_t);
    if (kTangent) {
      const SourceTangent& tangent = args.tangents[source];
      pack_transposed(tangent.key, tokens, sb, kv_head, j0, cols, padded, args.shape.key_dim, kt, ldd, key_tangent_t);
      pack_transposed(tangent.value, tokens, sb, kv_head, j0, cols, padded, args.shape.value_dim, value_rows, ldv,
                      value_tangent_t);
    }
  }

  void load_queries(int64_t b, int64_t h, int64_t i0, int64_t count, int64_t tile_rows) {
    const Tokens tokens = query_tokens(args.shape);
    load_tokens(args.query, tokens, b, h, i0, count, tile_rows, args.shape.key_dim, q, ldd);
    load_tokens(args.grad_out, tokens, b, h, i0, count, tile_rows, args.shape.value_dim, g, ldv);
    if (kTangent) load_tokens(args.query_tangent, tokens, b, h, i0, count, tile_rows, args.shape.key_dim, qt, ldd);
  }

  // After this: plain backward s = P, w = dS; with tangents s = X, w = dS, t = U. Padding rows and columns are zero.
  void score_gradients(int source, int64_t b, int64_t h, int64_t i0, int64_t count, int tile_rows, int64_t j0,
                       int64_t cols, int64_t padded, Visible vis) {
    const SourceView& src = args.sources[source];
    const AttentionShape& shape = args.shape;
    const int vecs = (int)(padded / W);
    gemm_panels<P>(tile_rows, vecs, shape.key_dim, q, ldd, key_t, s, ldk, false);
    gemm_panels<P>(tile_rows, vecs, shape.value_dim, g, ldv, value_t, w, ldk, false);
    if (kTangent) {
      gemm_panels<P>(tile_rows, vecs, shape.key_dim, qt, ldd, key_t, t, ldk, false);
      gemm_panels<P>(tile_rows, vecs, shape.key_dim, q, ldd, key_tangent_t, t, ldk, true);
      gemm_panels<P>(tile_rows, vecs, shape.value_dim, g, ldv, value_tangent_t, z, ldk, false);
    }
    A factor = (A)(src.scale * kLog2E);
    if (vis != Visible::all || src.bias.present() || cols != padded) {
      finish_logits(src, shape, b, h, i0, count, j0, cols, padded, vis, factor, s, ldk, bias_row);
      factor = A(1);
    }
    const A* lse = static_cast<const A*>(args.lse);
    const A scale = (A)src.scale;
    const Tokens tokens = query_tokens(shape);
    BiasRow moving = BiasRow::none;
    if (kTangent) {
      moving = bias_row_kind(args.tangents[source].bias, src, shape, j0, cols);
      for (int64_t j = 0; j < padded; ++j) bias_row[j] = A(0);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = (b * shape.heads + h) * shape.queries + tokens[i0 + r];
      const A shift = shift_of(lse[i]), delta = rows.delta[i];
      A *sr = s + r * ldk, *wr = w + r * ldk;
      if (!kTangent) {
        for (int v = 0; v < vecs; ++v) {
          const V p = vexp2(load<V>(sr + v * W) * factor - shift);
          store(sr + v * W, p);
          store(wr + v * W, p * (load<V>(wr + v * W) - delta));
        }
        continue;
      }
      A *tr = t + r * ldk, *zr = z + r * ldk;
      const A mu = rows.mu[i], rho = rows.rho[i];
      if (moving != BiasRow::none) {
        const A* row = load_bias(args.tangents[source].bias, moving, src, shape, b, h, i0 + r, j0, cols, bias_row);
        if (row != bias_row) copy_row(row, cols, bias_row);
      }
      for (int v = 0; v < vecs; ++v) {
        const V p = vexp2(load<V>(sr + v * W) * factor - shift);
        const V tangent = load<V>(tr + v * W) * scale + load<V>(bias_row + v * W);
        const V weight = load<V>(wr + v * W), centred = weight - delta;
        const V y = tangent * centred - weight * mu + load<V>(zr + v * W);
        store(sr + v * W, p * (y - rho));
        store(wr + v * W, p * centred);
        store(tr + v * W, p * (tangent - mu));
      }
    }
    for (int64_t r = count; r < tile_rows; ++r) {
      std::memset(s + r * ldk, 0, ldk * sizeof(A));
      std::memset(w + r * ldk, 0, ldk * sizeof(A));
      if (kTangent) std::memset(t + r * ldk, 0, ldk * sizeof(A));
    }
  }

  // Gradients of one source batch and key/value head: those of a window, or of the whole source if it has no windows.
  void run(int source, int64_t sb, int64_t kv_head, int64_t window) {
    const SourceView& src = args.sources[source];
    const SourceGradient& grad = args.gradients[source];
    const AttentionShape& shape = args.shape;
    const Range keys = keys_of(src, shape.windows, window), queries = queries_of(src, shape, window);
    const Tokens tokens = key_tokens(src, shape);
    const int64_t group = shape.heads / shape.kv_heads, block = key_block<A>(src, keys);
    for (int64_t j0 = keys.begin; j0 < keys.end; j0 += block) {
      const int64_t cols = keys.end - j0 < block ? keys.end - j0 : block;
      const int64_t padded = round_up(cols, kColumnStep);
      std::memset(dk, 0, padded * ldd * sizeof(A));
      std::memset(dv, 0, padded * ldv * sizeof(A));
      bool packed = false;
      for (int64_t b = 0; b < shape.batch; ++b) {
        if (source_batch(src, b) != sb) continue;
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
          for (int64_t i0 = queries.begin; i0 < queries.end; i0 += kBackwardRows) {
            const int64_t count = queries.end - i0 < kBackwardRows ? queries.end - i0 : kBackwardRows;
            const Visible vis = block_visible(src, shape, b, h, i0, count, j0, cols);
            if (vis == Visible::none) continue;
            if (!packed) pack_keys(source, sb, kv_head, j0, cols, padded);
            packed = true;
            tile(source, b, h, i0, count, j0, cols, padded, vis);
          }
        }
      }
      for (int64_t j = 0; j < cols; ++j) {
        A* row = dk + j * ldd;
        for (int64_t d = 0; d < shape.key_dim; ++d) row[d] *= (A)src.scale;
        const int64_t* ks = grad.key.stride;
        const int64_t* vs = grad.value.stride;
        const int64_t token = tokens[j0 + j];
        store_row(grad.key.ptr, grad.key.dtype, sb * ks[0] + kv_head * ks[1] + token * ks[2], ks[3], shape.key_dim,
                  row);
        store_row(grad.value.ptr, grad.value.dtype, sb * vs[0] + kv_head * vs[1] + token * vs[2], vs[3],
                  shape.value_dim, dv + j * ldv);
      }
    }
  }

  void tile(int source, int64_t b, int64_t h, int64_t i0, int64_t count, int64_t j0, int64_t cols, int64_t padded,
            Visible vis) {
    const int tile_rows = (int)round_up(count, kTileRows);
    load_queries(b, h, i0, count, tile_rows);
    score_gradients(source, b, h, i0, count, tile_rows, j0, cols, padded, vis);
    if (window_bias != nullptr) add_window_bias(b, h, i0, count, j0, cols);
    gemm<P, true>((int)padded, value_vecs, count, kTangent ? t : s, ldk, g, ldv, dv, ldv, true);
    if (kTangent) {
      gemm<P, true>((int)padded, key_vecs, count, s, ldk, q, ldd, dk, ldd, true);
      gemm<P, true>((int)padded, key_vecs, count, w, ldk, qt, ldd, dk, ldd, true);
      gemm<P, false>(tile_rows, key_vecs, cols, s, ldk, k, ldd, dq, ldd, false);
      gemm<P, false>(tile_rows, key_vecs, cols, w, ldk, kt, ldd, dq, ldd, true);
    } else {
      gemm<P, true>((int)padded, key_vecs, count, w, ldk, q, ldd, dk, ldd, true);
      gemm<P, false>(tile_rows, key_vecs, cols, w, ldk, k, ldd, dq, ldd, false);
    }
    const A scale = (A)args.sources[source].scale;
    const int64_t* qs = args.grad_query.stride;
    const Tokens tokens = query_tokens(args.shape);
    for (int64_t r = 0; r < count; ++r) {
      A* out = static_cast<A*>(args.grad_query.ptr) + b * qs[0] + h * qs[1] + tokens[i0 + r] * qs[2];
      const A* row = dq + r * ldd;
      for (int64_t d = 0; d < args.shape.key_dim; ++d) out[d] += scale * row[d];
    }
  }

  // Adds the score gradient of a tile to the bias gradient of its window.
  void add_window_bias(int64_t b, int64_t h, int64_t i0, int64_t count, int64_t j0, int64_t cols) {
    const Windows& w = args.shape.windows;
    const A* ds = kTangent ? s : this->w;
    A* base =
        window_bias + b * window_bias_stride[0] + h % (args.shape.heads / args.shape.kv_heads) * window_bias_stride[1];
    for (int64_t r = 0; r < count; ++r) {
      A* row = base + w.query_code[i0 + r];
      for (int64_t j = 0; j < cols; ++j) row[w.key_code[j0 + j]] += ds[r * ldk + j];
    }
  }

  // Adds this block's score gradient to the bias gradient of a source without windows.
  void bias_tile(int source, int64_t b, int64_t h, int64_t i0, int64_t j0, int64_t block) {
    const SourceView& src = args.sources[source];
    const AttentionShape& shape = args.shape;
    const int64_t count = shape.queries - i0 < kBackwardRows ? shape.queries - i0 : kBackwardRows;
    const int64_t cols = src.length - j0 < block ? src.length - j0 : block, padded = round_up(cols, kColumnStep);
    const Visible vis = block_visible(src, shape, b, h, i0, count, j0, cols);
    if (vis == Visible::none) return;
    const int tile_rows = (int)round_up(count, kTileRows);
    pack_keys(source, source_batch(src, b), h / (shape.heads / shape.kv_heads), j0, cols, padded);
    load_queries(b, h, i0, count, tile_rows);
    score_gradients(source, b, h, i0, count, tile_rows, j0, cols, padded, vis);
    const A* ds = kTangent ? s : w;
    const MutableView& out = args.gradients[source].bias;
    const Tokens tokens = query_tokens(shape);
    for (int64_t r = 0; r < count; ++r) {
      A* row = static_cast<A*>(out.ptr) + b * out.stride[0] + h * out.stride[1] + tokens[i0 + r] * out.stride[2] +
               j0 * out.stride[3];
      for (int64_t j = 0; j < cols; ++j) row[j * out.stride[3]] += ds[r * ldk + j];
    }
  }
};

template <class A>
static A row_product(const View& x, const View& y, int64_t b, int64_t h, int64_t i, int64_t n, A* xr, A* yr) {
  load_row(x.ptr, x.dtype, b * x.stride[0] + h * x.stride[1] + i * x.stride[2], x.stride[3], n, xr);
  load_row(y.ptr, y.dtype, b * y.stride[0] + h * y.stride[1] + i * y.stride[2], y.stride[3], n, yr);
  A total = A(0);
  for (int64_t d = 0; d < n; ++d) total += xr[d] * yr[d];
  return total;
}

// dbias of one source without windows. Tasks never share an element of the (possibly reduced) bias gradient.
template <class A, bool kTangent>
static void bias_gradient(const AttentionBackward& args, const RowStatistics<A>& stats, int source,
                          const Parallel& parallel) {
  const AttentionShape& shape = args.shape;
  const int64_t* st = args.gradients[source].bias.stride;
  const int64_t length = args.sources[source].length;
  const int64_t block = key_block<A>(args.sources[source], keys_of(args.sources[source], shape.windows, 0));
  const int64_t batches = st[0] != 0 ? shape.batch : 1, heads = st[1] != 0 ? shape.heads : 1;
  const int64_t row_blocks = st[2] != 0 ? (shape.queries + kBackwardRows - 1) / kBackwardRows : 1;
  const int64_t key_blocks = st[3] != 0 && st[2] == 0 ? (length + block - 1) / block : 1;
  for_each_task(parallel, batches * heads * row_blocks * key_blocks, [&](int64_t task) {
    BackwardTask<A, kTangent> t(args, stats);
    t.carve(static_cast<char*>(thread_scratch(t.carve(nullptr))));
    const int64_t kb = task % key_blocks, rb = task / key_blocks % row_blocks;
    const int64_t bh = task / key_blocks / row_blocks % heads, bb = task / key_blocks / row_blocks / heads;
    const int64_t b_end = st[0] != 0 ? bb + 1 : shape.batch, h_end = st[1] != 0 ? bh + 1 : shape.heads;
    const int64_t i_end = st[2] != 0 ? (rb + 1) * kBackwardRows : shape.queries;
    const int64_t j_end = key_blocks > 1 ? (kb + 1) * block : length;
    for (int64_t b = bb; b < b_end; ++b)
      for (int64_t h = bh; h < h_end; ++h)
        for (int64_t i0 = rb * kBackwardRows; i0 < i_end && i0 < shape.queries; i0 += kBackwardRows)
          for (int64_t j0 = kb * block; j0 < j_end && j0 < length; j0 += block)
            t.bias_tile(source, b, h, i0, j0, block);
  });
}

// Gradients of a windowed source. A task takes every `groups`-th (source batch, window) pair of one key/value head and
// adds their bias gradients to a buffer of its own; the buffers are then summed in a fixed order.
template <class A, bool kTangent>
static void windowed_gradient(const AttentionBackward& args, const RowStatistics<A>& stats, int source,
                              const Parallel& parallel) {
  constexpr int64_t kGroups = 16, kPartialElements = 1 << 22;
  const AttentionShape& shape = args.shape;
  const MutableView& bias = args.gradients[source].bias;
  const int64_t windows = shape.windows.count, codes = shape.windows.codes;
  const int64_t pairs = args.sources[source].batch * windows, heads = shape.heads / shape.kv_heads;
  const int64_t bias_heads = bias.stride[1] != 0 ? heads : 1, bias_batches = bias.stride[0] != 0 ? shape.batch : 1;
  const int64_t partial = bias.ptr != nullptr ? bias_batches * bias_heads * codes : 0;
  int64_t groups = pairs;
  if (partial > 0) {
    groups = kPartialElements / (partial * shape.kv_heads);
    groups = groups < 1 ? 1 : groups > kGroups ? kGroups : groups;
    groups = groups > pairs ? pairs : groups;
  }
  HeapArray<A> partials(partial * groups * shape.kv_heads);
  for_each_task(parallel, groups * shape.kv_heads, [&](int64_t task) {
    BackwardTask<A, kTangent> t(args, stats);
    t.carve(static_cast<char*>(thread_scratch(t.carve(nullptr))));
    if (partial > 0) {
      t.window_bias = partials.data + task * partial;
      t.window_bias_stride[0] = bias.stride[0] != 0 ? bias_heads * codes : 0;
      t.window_bias_stride[1] = bias.stride[1] != 0 ? codes : 0;
      std::memset(t.window_bias, 0, partial * sizeof(A));
    }
    const int64_t kv_head = task / groups;
    for (int64_t pair = task % groups; pair < pairs; pair += groups)
      t.run(source, pair / windows, kv_head, pair % windows);
  });
  if (partial == 0 || groups == 0) return;
  const int64_t out_heads = bias.stride[1] != 0 ? shape.heads : 1;
  for_each_task(parallel, bias_batches * out_heads, [&](int64_t task) {
    const int64_t b = task / out_heads, h = task % out_heads;
    A* out = static_cast<A*>(bias.ptr) + b * bias.stride[0] + h * bias.stride[1];
    // A bias of one head gets the sum over all key/value heads.
    const int64_t first = bias.stride[1] != 0 ? h / heads : 0, last = bias.stride[1] != 0 ? first + 1 : shape.kv_heads;
    for (int64_t g = first * groups; g < last * groups; ++g) {
      const A* part = partials.data + g * partial + (b * bias_heads + (bias.stride[1] != 0 ? h % heads : 0)) * codes;
      for (int64_t c = 0; c < codes; ++c) out[c * bias.stride[3]] += part[c];
    }
  });
}

template <class A, bool kTangent>
static void backward_with(const AttentionBackward& args, const Parallel& parallel) {
  const AttentionShape& shape = args.shape;
  const int64_t total = shape.batch * shape.heads * shape.queries;
  HeapArray<A> delta(total), rho(kTangent ? total : 0);
  const A* grad_lse = static_cast<const A*>(args.grad_lse);
  const A* mu = static_cast<const A*>(args.lse_tangent);
  constexpr int64_t kRun = 256;
  const int64_t runs = (shape.queries + kRun - 1) / kRun;
  for_each_task(parallel, shape.batch * shape.heads * runs, [&](int64_t task) {
    A* x = static_cast<A*>(thread_scratch(2 * (shape.value_dim + 16) * sizeof(A)));
    A* y = x + shape.value_dim;
    const int64_t bh = task / runs, b = bh / shape.heads, h = bh % shape.heads, i0 = task % runs * kRun;
    for (int64_t i = i0; i < i0 + kRun && i < shape.queries; ++i) {
      const int64_t at = bh * shape.queries + i;
      A d = row_product(args.grad_out, args.out, b, h, i, shape.value_dim, x, y);
      if (grad_lse != nullptr) d -= grad_lse[at];
      delta.data[at] = d;
      if (kTangent)
        rho.data[at] = row_product(args.grad_out, args.out_tangent, b, h, i, shape.value_dim, x, y) - mu[at] * d;
    }
  });
  const RowStatistics<A> stats{delta.data, rho.data, mu};
  for (int source = 0; source < args.source_count; ++source) {
    if (args.sources[source].windowed) {
      windowed_gradient<A, kTangent>(args, stats, source, parallel);
      continue;
    }
    const int64_t batches = args.sources[source].batch;
    for_each_task(parallel, batches * shape.kv_heads, [&](int64_t task) {
      BackwardTask<A, kTangent> t(args, stats);
      t.carve(static_cast<char*>(thread_scratch(t.carve(nullptr))));
      t.run(source, task / shape.kv_heads, task % shape.kv_heads, 0);
    });
    if (args.gradients[source].bias.ptr != nullptr) bias_gradient<A, kTangent>(args, stats, source, parallel);
  }
}

static void attention_backward(const AttentionBackward& args, const Parallel& parallel) {
  const bool tangent = args.tangents != nullptr, wide = args.shape.dtype == DType::f64;
  if (wide)
    tangent ? backward_with<double, true>(args, parallel) : backward_with<double, false>(args, parallel);
  else
    tangent ? backward_with<float, true>(args, parallel) : backward_with<float, false>(args, parallel);
}

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
