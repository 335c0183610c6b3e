// Attention within windows whose keys fit one tile, forward: as every key is at hand, a row's softmax is done in one
// go, without a running maximum, and its output goes from the registers' tile to its place.
//
// The bias of a window is written out once for all windows of a head that have its shape: codes differ between whole
// windows and the pieces of one at a seam or a border, but there are few such shapes.
#pragma once

#include "attention_tiles.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

constexpr int64_t kWindowKeys = 160;  // up to 12 x 12 windows: keys, values and bias stay in the second-level cache
constexpr int64_t kWindowRows = 16;   // query rows of one softmax tile
constexpr int kWindowBiases = 4;      // shapes of windows whose bias is kept

static int64_t longest_window(const Windows& w) {
  int64_t longest = 0;
  for (int64_t i = 0; i < w.count; ++i) {
    const int64_t length = w.offsets[i + 1] - w.offsets[i];
    longest = length > longest ? length : longest;
  }
  return longest;
}

// Whether a call is of this kind: one source, windowed, with nothing but a bias.
template <class P>
static bool window_tiles_apply(const AttentionForward& args) {
  if (P::kDepth != 1 || !args.shape.windows.present() || args.source_count != 1 || args.group_count != 1) return false;
  const SourceView& s = args.sources[0];
  if (!s.windowed || s.mask.present() || s.causal != Causal::none || s.key_blend.other.present() ||
      args.query_blend.other.present())
    return false;
  return longest_window(args.shape.windows) <= kWindowKeys;
}

template <class P>
struct WindowTask {
  using A = typename P::Acc;
  using V = typename Simd<A>::V;
  static constexpr int W = Simd<A>::W;

  const AttentionForward& args;
  const SourceView& source;
  const Run* ahead = nullptr;  // not used: the rows of a window are few, and the processor fetches them ahead itself
  int64_t longest = 0, ldq, ldv, lds;
  int value_vecs;
  A factor;

  A *queries, *key_t, *values, *out, *scores, *rows, *biases;
  int64_t bias_window[kWindowBiases];  // whose bias each of `biases` is; -1: none yet
  int64_t bias_batch = -1, bias_head = -1;
  int next_bias = 0;

  explicit WindowTask(const AttentionForward& a) : args(a), source(a.sources[0]) {
    const AttentionShape& s = a.shape;
    longest = longest_window(s.windows);
    ldq = padded_columns<A>(s.key_dim);
    ldv = round_up(s.value_dim, W);
    lds = padded_columns<A>(round_up(longest, W));
    value_vecs = (int)(ldv / W);
    factor = (A)(source.scale * kLog2E);
  }

  size_t carve(char* base) {
    Carver c{base};
    const int64_t depth = args.shape.key_dim, padded = round_up(longest, W);
    queries = c.take<A>(kWindowRows * ldq);
    key_t = c.take<A>(depth * padded);
    values = c.take<A>(longest * ldv);
    out = c.take<A>(kWindowRows * ldv);
    scores = c.take<A>(kWindowRows * lds);
    rows = c.take<A>(W * (depth > 0 ? depth : 1));
    biases = source.bias.present() ? c.take<A>(kWindowBiases * longest * padded) : nullptr;
    return c.used;
  }

  // K^T of the window as [depth][padded], columns past the keys zero.
  void pack_keys(int64_t sb, int64_t h, Range keys, int64_t padded) {
    const View& k = source.key;
    const Tokens tokens = key_tokens(source, args.shape);
    const int64_t depth = args.shape.key_dim, base = sb * k.stride[0] + h * k.stride[1];
    constexpr int64_t kStep = kTransposed<P>;
    const bool in_place = k.dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32) && k.stride[3] == 1;
    const A* row[kStep];
    for (int64_t j = 0; j < padded; j += kStep) {
      for (int64_t i = 0; i < kStep; ++i) {
        const int64_t at = keys.begin + j + i;
        A* own = rows + i * depth;
        row[i] = own;
        if (at >= keys.end)
          std::memset(own, 0, depth * sizeof(A));
        else if (in_place)
          row[i] = static_cast<const A*>(k.ptr) + base + tokens[at] * k.stride[2];
        else
          load_row(k.ptr, k.dtype, base + tokens[at] * k.stride[2], k.stride[3], depth, own);
      }
      transpose_rows<P>(row, depth, key_t + j, padded);
    }
  }

  static bool same_codes(const Windows& w, int64_t a, int64_t b) {
    const int64_t n = w.offsets[a + 1] - w.offsets[a];
    if (w.offsets[b + 1] - w.offsets[b] != n) return false;
    const size_t bytes = (size_t)n * sizeof(int32_t);
    return std::memcmp(w.query_code + w.offsets[a], w.query_code + w.offsets[b], bytes) == 0 &&
           std::memcmp(w.key_code + w.offsets[a], w.key_code + w.offsets[b], bytes) == 0;
  }

  // The bias between all tokens of a window, times log2(e), [query][padded].
  const A* bias_of(int64_t b, int64_t h, int64_t window, Range keys, int64_t padded) {
    const View& x = source.bias;
    const Windows& w = args.shape.windows;
    const int64_t size = longest * round_up(longest, W);
    if (b != bias_batch || h != bias_head) {
      for (int64_t& known : bias_window) known = -1;
      bias_batch = b;
      bias_head = h;
    }
    for (int i = 0; i < kWindowBiases; ++i)
      if (bias_window[i] >= 0 && same_codes(w, window, bias_window[i])) return biases + i * size;
    A* dst = biases + next_bias * size;
    bias_window[next_bias] = window;
    next_bias = (next_bias + 1) % kWindowBiases;
    const int64_t n = keys.end - keys.begin;
    const BiasRow kind = bias_row_kind(x, source, args.shape, keys.begin, n);
    for (int64_t i = 0; i < n; ++i) {
      A* row = dst + i * padded;
      const A* found = load_bias(x, kind, source, args.shape, b, h, keys.begin + i, keys.begin, n, row);
      for (int64_t j = 0; j < n; ++j) row[j] = found[j] * (A)kLog2E;
      for (int64_t j = n; j < padded; ++j) row[j] = A(0);
    }
    return dst;
  }

  void run(int64_t b, int64_t h, const Run& positions) {
    const AttentionShape& shape = args.shape;
    const Tokens tokens = query_tokens(shape);
    const int64_t sb = source_batch(source, b), kv_head = h / (shape.heads / shape.kv_heads);
    const Range keys = keys_of(source, shape.windows, positions.window);
    const int64_t n = keys.end - keys.begin, padded = round_up(n, W);
    const int vecs = (int)(padded / W);
    pack_keys(sb, kv_head, keys, padded);
    load_tokens(source.value, key_tokens(source, shape), sb, kv_head, keys.begin, n, n, shape.value_dim, values, ldv);
    const A* bias = source.bias.present() ? bias_of(b, h, positions.window, keys, padded) : nullptr;
    const Weight& gate = args.gates[0];
    for (int64_t i0 = positions.begin; i0 < positions.end; i0 += kWindowRows) {
      const int64_t count = positions.end - i0 < kWindowRows ? positions.end - i0 : kWindowRows;
      const int tile_rows = (int)round_up(count, kTileRows);
      load_tokens(args.query, tokens, b, h, i0, count, tile_rows, shape.key_dim, queries, ldq);
      gemm<P, false>(tile_rows, vecs, shape.key_dim, queries, ldq, key_t, padded, scores, lds, false);
      A shifts[kWindowRows], sums[kWindowRows];
      for (int64_t r = 0; r < count; ++r)
        shifts[r] = bias != nullptr ? logits<true>(scores + r * lds, bias + (i0 - keys.begin + r) * padded, n, vecs)
                                    : logits<false>(scores + r * lds, nullptr, n, vecs);
      for (int64_t r = 0; r < count; ++r)
        sums[r] = exponentials(scores + r * lds, shifts[r] == negative_infinity<A>() ? A(0) : shifts[r], vecs);
      // Padding rows hold zero queries, hence finite scores; their outputs go nowhere.
      gemm<P, false>(tile_rows, value_vecs, n, scores, lds, values, ldv, out, ldv, false);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t token = tokens[i0 + r];
        const A weight = (A)weight_at(gate, b, h, token), total = sums[r];
        const A inverse = total == A(0) ? A(0) : weight / total;
        A* o = out + r * ldv;
        if (weight == A(0))
          std::memset(o, 0, ldv * sizeof(A));
        else
          for (int v = 0; v < value_vecs; ++v) store(o + v * W, load<V>(o + v * W) * inverse);
        const MutableView& dst = args.out;
        store_row(dst.ptr, dst.dtype, b * dst.stride[0] + h * dst.stride[1] + token * dst.stride[2], dst.stride[3],
                  shape.value_dim, o);
      }
      if (args.lse != nullptr) store_lse(b, h, i0, count, shifts, sums);
    }
  }

  // The logarithms of a tile's sums, vectors at a time: one by one they would cost as much as the exponentials.
  void store_lse(int64_t b, int64_t h, int64_t i0, int64_t count, const A* shifts, A* sums) {
    const AttentionShape& shape = args.shape;
    const Tokens tokens = query_tokens(shape);
    A logs[kWindowRows];
    for (int64_t r = count; r < kWindowRows; ++r) sums[r] = A(1);
    for (int64_t r = 0; r < kWindowRows; r += W) store(logs + r, vlog2(load<V>(sums + r)));
    A* lse = static_cast<A*>(args.lse) + (b * shape.heads + h) * shape.queries;
    for (int64_t r = 0; r < count; ++r) {
      const A total = sums[r];  // NaN stays visible
      lse[tokens[i0 + r]] = total > A(0)    ? (shifts[r] + logs[r]) * (A)kLn2
                            : total == A(0) ? negative_infinity<A>()
                                            : total;
    }
  }

  // Raw products -> base-2 logits in place, -inf in the padding; returns the largest.
  template <bool kBias>
  A logits(A* x, const A* bias, int64_t n, int vecs) {
    const V scale = splat<A>(factor);
    V top = splat<A>(negative_infinity<A>());
    const int whole = (int)(n / W);
    for (int v = 0; v < whole; ++v) {
      V t = load<V>(x + v * W) * scale;
      if constexpr (kBias) t += load<V>(bias + v * W);
      store(x + v * W, t);
      top = vmax(top, t);
    }
    if (whole < vecs) {
      A* last = x + whole * W;
      const int64_t left = n - whole * W;
      A lanes[W];
      for (int i = 0; i < W; ++i) lanes[i] = (A)i;
      V t = load<V>(last) * scale;
      if constexpr (kBias) t += load<V>(bias + whole * W);
      t = load<V>(lanes) < splat<A>((A)left) ? t : splat<A>(negative_infinity<A>());
      store(last, t);
      top = vmax(top, t);
    }
    return horizontal_max<A>(top);
  }

  // Base-2 exponentials in place; returns their sum.
  A exponentials(A* x, A shift, int vecs) {
    const V by = splat<A>(shift);
    V total{};
    for (int v = 0; v < vecs; ++v) {
      const V p = vexp2(load<V>(x + v * W) - by);
      store(x + v * W, p);
      total += p;
    }
    return horizontal_sum<A>(total);
  }
};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
