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

// Keys of one block of a source: whole vectors, at most kBlockKeys. Without a mask, blocks of equal size; with one, 64
// keys, which divide the blocks that masks are usually made of, so that hidden blocks can be skipped whole.
template <class A>
TRANSFUSE_INLINE int64_t key_block(const SourceView& source) {
  if (source.mask.present()) return kMaskBlockKeys;
  const int64_t blocks = (source.length + kBlockKeys - 1) / kBlockKeys;
  return blocks == 0 ? kBlockKeys : round_up((source.length + blocks - 1) / blocks, Simd<A>::W);
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

// Tokens [first, first + count) as rows of dst, columns zero-padded to ld, rows zero-padded to `rows`.
template <class A>
static void load_tokens(const View& x, int64_t b, int64_t h, int64_t first, int64_t count, int64_t rows, int64_t n,
                        A* dst, int64_t ld) {
  for (int64_t i = 0; i < count; ++i) {
    A* row = dst + i * ld;
    load_row(x.ptr, x.dtype, b * x.stride[0] + h * x.stride[1] + (first + i) * x.stride[2], x.stride[3], n, row);
    for (int64_t d = n; d < ld; ++d) row[d] = A(0);
  }
  if (rows > count) std::memset(dst + count * ld, 0, (rows - count) * ld * sizeof(A));
}

// Last key (exclusive) that query row i may see under the source's causal rule.
TRANSFUSE_INLINE int64_t causal_end(const SourceView& s, int64_t i, int64_t queries) {
  if (s.causal == Causal::none) return s.length;
  const int64_t end = i + 1 + (s.causal == Causal::lower_right ? s.length - queries : 0);
  return end < 0 ? 0 : end > s.length ? s.length : end;
}

enum class Visible { none, some, all };

// Whether rows [i0, i0 + rows) may attend to keys [j0, j0 + cols): decides from the causal rule and the mask bytes.
static Visible block_visible(const SourceView& s, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t j0,
                             int64_t cols, int64_t queries) {
  bool all = true;
  if (s.causal != Causal::none) {
    if (j0 >= causal_end(s, i0 + rows - 1, queries)) return Visible::none;
    if (j0 + cols > causal_end(s, i0, queries)) all = false;
  }
  if (!s.mask.present()) return all ? Visible::all : Visible::some;
  const uint8_t* m = (const uint8_t*)s.mask.ptr + b * s.mask.stride[0] + h * s.mask.stride[1] + i0 * s.mask.stride[2] +
                     j0 * s.mask.stride[3];
  const int64_t mask_rows = s.mask.stride[2] == 0 ? 1 : rows, mask_cols = s.mask.stride[3] == 0 ? 1 : cols;
  bool any = false, every = true;
  for (int64_t i = 0; i < mask_rows && (!any || every); ++i) {
    const uint8_t* row = m + i * s.mask.stride[2];
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

// Raw products -> base-2 logits in place: x * factor + bias * log2(e); -inf where a key is hidden, and in the padding.
// `factor` is scale * log2(e); `bias_row` is scratch of `padded` elements.
template <class A>
static void finish_logits(const SourceView& s, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t j0, int64_t cols,
                          int64_t padded, int64_t queries, Visible visible, A factor, A* x, int64_t ld, A* bias_row) {
  const bool masked = visible != Visible::all && s.mask.present();
  for (int64_t r = 0; r < rows; ++r) {
    A* row = x + r * ld;
    const int64_t i = i0 + r;
    if (s.bias.present()) {
      const int64_t offset = b * s.bias.stride[0] + h * s.bias.stride[1] + i * s.bias.stride[2] + j0 * s.bias.stride[3];
      if (r == 0 || s.bias.stride[2] != 0) load_row(s.bias.ptr, s.bias.dtype, offset, s.bias.stride[3], cols, bias_row);
      for (int64_t j = 0; j < cols; ++j) row[j] = row[j] * factor + bias_row[j] * (A)kLog2E;
    } else {
      for (int64_t j = 0; j < cols; ++j) row[j] *= factor;
    }
    if (masked) {
      const uint8_t* m = (const uint8_t*)s.mask.ptr + b * s.mask.stride[0] + h * s.mask.stride[1] +
                         i * s.mask.stride[2] + j0 * s.mask.stride[3];
      if (s.mask.stride[3] == 1) {
        for (int64_t j = 0; j < cols; ++j) row[j] = m[j] != 0 ? row[j] : negative_infinity<A>();
      } else {
        for (int64_t j = 0; j < cols; ++j)
          if (m[j * s.mask.stride[3]] == 0) row[j] = negative_infinity<A>();
      }
    }
    int64_t end = cols;
    if (visible != Visible::all && s.causal != Causal::none) {
      end = causal_end(s, i, queries) - j0;
      end = end < 0 ? 0 : end > cols ? cols : end;
    }
    for (int64_t j = end; j < padded; ++j) row[j] = negative_infinity<A>();
  }
}

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
