// What the attention kernels share: block sizes, loading of rows and transposed key blocks, visibility, logits.
#pragma once

#include "panels.h"
#include "transfuse/attention.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

constexpr int kBlockRows = 32;  // query rows of one softmax tile
constexpr int kBlockKeys = 96;  // keys of one tile: whole vectors, panels of three, at every vector width
constexpr int kMaskBlockKeys = 64;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

TRANSFUSE_INLINE int64_t source_batch(const SourceView& source, int64_t b) {
  return source.index != nullptr ? source.index[b] : source.batch == 1 ? 0 : b;
}

// Positions [begin, end).
struct Range {
  int64_t begin, end;
};

// The keys of a source that the queries of a window see, and the queries that see them.
TRANSFUSE_INLINE Range keys_of(const SourceView& source, const Windows& windows, int64_t window) {
  if (!source.windowed) return {0, source.length};
  return {windows.offsets[window], windows.offsets[window + 1]};
}
TRANSFUSE_INLINE Range queries_of(const SourceView& source, const AttentionShape& shape, int64_t window) {
  if (!source.windowed) return {0, shape.queries};
  return {shape.windows.offsets[window], shape.windows.offsets[window + 1]};
}

// Position -> token, for queries and for the keys of a source.
struct Tokens {
  const int32_t* list;
  int64_t operator[](int64_t position) const { return list != nullptr ? list[position] : position; }
};
TRANSFUSE_INLINE Tokens query_tokens(const AttentionShape& shape) { return {shape.windows.tokens}; }
TRANSFUSE_INLINE Tokens key_tokens(const SourceView& source, const AttentionShape& shape) {
  return {source.windowed ? shape.windows.tokens : nullptr};
}

// A run of query positions, all of one window: the rows of one task.
struct Run {
  int64_t window, begin, end;
};

// Every query position, in runs of at most `chunk`.
struct Runs {
  HeapArray<Run> list;
  int64_t count = 0;
  Runs(const AttentionShape& shape, int64_t chunk)
      : list(shape.queries / chunk + 1 + (shape.windows.present() ? shape.windows.count : 0)) {
    if (!shape.windows.present()) {
      split(0, {0, shape.queries}, chunk);
      return;
    }
    const int64_t* offsets = shape.windows.offsets;
    for (int64_t w = 0; w < shape.windows.count; ++w) split(w, {offsets[w], offsets[w + 1]}, chunk);
  }
  void split(int64_t window, Range range, int64_t chunk) {
    for (int64_t i = range.begin; i < range.end; i += chunk)
      list.data[count++] = {window, i, range.end - i < chunk ? range.end : i + chunk};
  }
};

// Keys of one block of a source: whole vectors, at most kBlockKeys. Without a mask, blocks of equal size; with one, 64
// keys, which divide the blocks that masks are usually made of, so that hidden blocks can be skipped whole.
template <class A>
TRANSFUSE_INLINE int64_t key_block(const SourceView& source, Range keys) {
  if (source.mask.present()) return kMaskBlockKeys;
  const int64_t length = keys.end - keys.begin, blocks = (length + kBlockKeys - 1) / kBlockKeys;
  return blocks == 0 ? kBlockKeys : round_up((length + blocks - 1) / blocks, Simd<A>::W);
}

TRANSFUSE_INLINE double weight_at(const Weight& w, int64_t b, int64_t h, int64_t i) {
  if (!w.view.present()) return w.value;
  return load_scalar<double>(w.view.ptr, w.view.dtype,
                             b * w.view.stride[0] + h * w.view.stride[1] + i * w.view.stride[2]);
}

// dst[0..n) = x[b, h, token, :], blended when asked. `other` is scratch of n elements.
template <class A>
static void load_token(const View& x, int64_t b, int64_t h, int64_t token, int64_t n, const BlendView* blend, A* dst,
                       A* other) {
  const int64_t offset = b * x.stride[0] + h * x.stride[1] + token * x.stride[2];
  if (blend == nullptr || !blend->other.present()) {
    load_row(x.ptr, x.dtype, offset, x.stride[3], n, dst);
    return;
  }
  const A w = (A)weight_at(blend->weight, b, h, token);
  const View& o = blend->other;
  const int64_t ob = blend->index != nullptr ? blend->index[b] : blend->batch == 1 ? 0 : b;
  const int64_t other_offset = ob * o.stride[0] + h * o.stride[1] + token * o.stride[2];
  if (w == A(1)) {
    load_row(o.ptr, o.dtype, other_offset, o.stride[3], n, dst);
    return;
  }
  load_row(x.ptr, x.dtype, offset, x.stride[3], n, dst);
  if (w == A(0)) return;
  load_row(o.ptr, o.dtype, other_offset, o.stride[3], n, other);
  for (int64_t i = 0; i < n; ++i) dst[i] = (A(1) - w) * dst[i] + w * other[i];
}

// Positions [first, first + count) as rows of dst, columns zero-padded to ld, rows zero-padded to `rows`.
template <class A>
static void load_tokens(const View& x, Tokens tokens, int64_t b, int64_t h, int64_t first, int64_t count, int64_t rows,
                        int64_t n, A* dst, int64_t ld) {
  for (int64_t i = 0; i < count; ++i) {
    A* row = dst + i * ld;
    load_row(x.ptr, x.dtype, b * x.stride[0] + h * x.stride[1] + tokens[first + i] * x.stride[2], x.stride[3], n, row);
    for (int64_t d = n; d < ld; ++d) row[d] = A(0);
  }
  if (rows > count) std::memset(dst + count * ld, 0, (rows - count) * ld * sizeof(A));
}

// Asks for the cache lines of a row ahead of its use.
TRANSFUSE_INLINE void prefetch_row(const View& x, int64_t b, int64_t h, int64_t token, int64_t n) {
  const int64_t size = item_size(x.dtype);
  const char* row = (const char*)x.ptr + (b * x.stride[0] + h * x.stride[1] + token * x.stride[2]) * size;
  for (int64_t at = 0; at < n * size; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// Last key (exclusive) that query row i may see under the source's causal rule.
TRANSFUSE_INLINE int64_t causal_end(const SourceView& s, int64_t i, int64_t queries) {
  if (s.causal == Causal::none) return s.length;
  const int64_t end = i + 1 + (s.causal == Causal::lower_right ? s.length - queries : 0);
  return end < 0 ? 0 : end > s.length ? s.length : end;
}

enum class Visible { none, some, all };

// Whether rows [i0, i0 + rows) may attend to keys [j0, j0 + cols): decides from the causal rule and the mask bytes.
static Visible block_visible(const SourceView& s, const AttentionShape& shape, int64_t b, int64_t h, int64_t i0,
                             int64_t rows, int64_t j0, int64_t cols) {
  bool all = true;
  if (s.causal != Causal::none) {  // never beside windows: a position is its token
    if (j0 >= causal_end(s, i0 + rows - 1, shape.queries)) return Visible::none;
    if (j0 + cols > causal_end(s, i0, shape.queries)) all = false;
  }
  if (!s.mask.present()) return all ? Visible::all : Visible::some;
  const Tokens tokens = query_tokens(shape);
  const uint8_t* m = (const uint8_t*)s.mask.ptr + b * s.mask.stride[0] + h * s.mask.stride[1] + j0 * s.mask.stride[3];
  const int64_t mask_rows = s.mask.stride[2] == 0 ? 1 : rows, mask_cols = s.mask.stride[3] == 0 ? 1 : cols;
  bool any = false, every = true;
  for (int64_t i = 0; i < mask_rows && (!any || every); ++i) {
    const uint8_t* row = m + tokens[i0 + i] * s.mask.stride[2];
    if (s.mask.stride[3] == 1) {
      uint8_t low = 1, high = 0;
      for (int64_t j = 0; j < mask_cols; ++j) {
        const uint8_t bit = row[j] != 0;
        low &= bit;
        high |= bit;
      }
      any = any || high;
      every = every && low;
    } else {
      for (int64_t j = 0; j < mask_cols; ++j) {
        const bool bit = row[j * s.mask.stride[3]] != 0;
        any = any || bit;
        every = every && bit;
      }
    }
  }
  if (!any) return Visible::none;
  return all && every ? Visible::all : Visible::some;
}

// How the bias of a block of keys lies in memory, the same for every query row.
enum class BiasRow { none, adjacent, scattered };

// Windowed keys whose codes count up by one have their biases side by side.
TRANSFUSE_INLINE BiasRow bias_row_kind(const View& x, const SourceView& s, const AttentionShape& shape, int64_t j0,
                                       int64_t cols) {
  if (!x.present()) return BiasRow::none;
  if (!s.windowed) return BiasRow::adjacent;
  const int32_t* code = shape.windows.key_code + j0;
  for (int64_t j = 1; j < cols; ++j)
    if (code[j] != code[0] + j) return BiasRow::scattered;
  return BiasRow::adjacent;
}

// Elements of a bias (or of its tangent) that belong to query position i and keys [j0, j0 + cols): in place where they
// can be read there, otherwise in `buffer`.
template <class A>
static const A* load_bias(const View& x, BiasRow kind, const SourceView& s, const AttentionShape& shape, int64_t b,
                          int64_t h, int64_t i, int64_t j0, int64_t cols, A* buffer) {
  constexpr DType own = sizeof(A) == 8 ? DType::f64 : DType::f32;
  const Windows& w = shape.windows;
  int64_t row = b * x.stride[0] + h * x.stride[1];
  row += s.windowed ? w.query_code[i] * x.stride[3] : query_tokens(shape)[i] * x.stride[2];
  if (kind == BiasRow::adjacent) {
    row += (s.windowed ? w.key_code[j0] : j0) * x.stride[3];
    if (x.dtype == own && x.stride[3] == 1) return static_cast<const A*>(x.ptr) + row;
    load_row(x.ptr, x.dtype, row, x.stride[3], cols, buffer);
  } else if (x.dtype == own) {
    const A* p = static_cast<const A*>(x.ptr) + row;
    for (int64_t j = 0; j < cols; ++j) buffer[j] = p[w.key_code[j0 + j] * x.stride[3]];
  } else {
    for (int64_t j = 0; j < cols; ++j)
      buffer[j] = load_scalar<A>(x.ptr, x.dtype, row + w.key_code[j0 + j] * x.stride[3]);
  }
  return buffer;
}

// Raw products -> base-2 logits in place: x * factor + bias * log2(e); -inf where a key is hidden, and in the padding.
// `factor` is scale * log2(e); `bias_row` is scratch of `padded` elements.
template <class A>
static void finish_logits(const SourceView& s, const AttentionShape& shape, int64_t b, int64_t h, int64_t i0,
                          int64_t rows, int64_t j0, int64_t cols, int64_t padded, Visible visible, A factor, A* x,
                          int64_t ld, A* bias_row) {
  const bool masked = visible != Visible::all && s.mask.present();
  const Tokens tokens = query_tokens(shape);
  const BiasRow kind = bias_row_kind(s.bias, s, shape, j0, cols);
  const A* bias = nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    A* row = x + r * ld;
    const int64_t i = i0 + r;
    if (kind != BiasRow::none) {
      if (r == 0 || s.windowed || s.bias.stride[2] != 0)
        bias = load_bias(s.bias, kind, s, shape, b, h, i, j0, cols, bias_row);
      for (int64_t j = 0; j < cols; ++j) row[j] = row[j] * factor + bias[j] * (A)kLog2E;
    } else {
      for (int64_t j = 0; j < cols; ++j) row[j] *= factor;
    }
    if (masked) {
      const uint8_t* m = (const uint8_t*)s.mask.ptr + b * s.mask.stride[0] + h * s.mask.stride[1] +
                         tokens[i] * s.mask.stride[2] + j0 * s.mask.stride[3];
      if (s.mask.stride[3] == 1) {
        for (int64_t j = 0; j < cols; ++j) row[j] = m[j] != 0 ? row[j] : negative_infinity<A>();
      } else {
        for (int64_t j = 0; j < cols; ++j)
          if (m[j * s.mask.stride[3]] == 0) row[j] = negative_infinity<A>();
      }
    }
    int64_t end = cols;
    if (visible != Visible::all && s.causal != Causal::none) {
      end = causal_end(s, i, shape.queries) - j0;
      end = end < 0 ? 0 : end > cols ? cols : end;
    }
    for (int64_t j = end; j < padded; ++j) row[j] = negative_infinity<A>();
  }
}

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
