// How the planes of a call of adain lie in memory: what the CPU kernels and the CUDA kernels know about strides.
#pragma once

#include "transfuse/adain.h"

namespace transfuse {

struct AdainAxis {
  int64_t size, stride;
};

struct AdainOperand {
  char* ptr = nullptr;
  int64_t kept_stride[kAdainMaxRank] = {0};
  int64_t column_stride = 0;
  AdainAxis axes[kAdainMaxRank] = {};  // reduced, slowest first, merged where two are one
  int axis_count = 0;
};

// The content's tensors or the style's: the same planes, each tensor with strides of its own. A plane has an index in
// the order of the remaining axes, and the index of the style plane that belongs to it. `columns` neighbouring planes
// have stride 1 (channels_last), or it is 1.
struct AdainLayout {
  DType dtype = DType::f32;
  int inputs = 0;
  AdainOperand in[3], out;
  int kept_count = 0;  // remaining axes but the columns, fastest first
  int64_t kept_size[kAdainMaxRank] = {0}, index_step[kAdainMaxRank] = {0}, style_step[kAdainMaxRank] = {0};
  int64_t columns = 1, column_index_step = 0, column_style_step = 0;
  int64_t width = 1, blocks = 1;  // columns are cut in blocks of `width`
  int64_t planes = 1, slabs = 1, rows = 1;
};

// A block of columns at one place: first plane, its style plane, number of planes, and element offsets.
struct AdainSlab {
  int64_t index, style, width;
  int64_t in[3], out;
};

TRANSFUSE_HD static inline AdainSlab adain_slab(const AdainLayout& g, int64_t i) {
  AdainSlab s;
  const int64_t first = i % g.blocks * g.width, left = g.columns - first;
  int64_t outer = i / g.blocks;
  s.width = left < g.width ? left : g.width;
  s.index = first * g.column_index_step;
  s.style = first * g.column_style_step;
  for (int k = 0; k < g.inputs; ++k) s.in[k] = first * g.in[k].column_stride;
  s.out = first * g.out.column_stride;
  for (int a = 0; a < g.kept_count; ++a) {
    const int64_t at = outer % g.kept_size[a];
    outer /= g.kept_size[a];
    s.index += at * g.index_step[a];
    s.style += at * g.style_step[a];
    for (int k = 0; k < g.inputs; ++k) s.in[k] += at * g.in[k].kept_stride[a];
    s.out += at * g.out.kept_stride[a];
  }
  return s;
}

// Element offset of row r; `run` becomes the number of rows from there on that follow with the innermost stride.
TRANSFUSE_HD static inline int64_t adain_row(const AdainOperand& o, int64_t r, int64_t* run) {
  const AdainAxis& inner = o.axes[o.axis_count - 1];
  if (o.axis_count == 1) {
    *run = inner.size - r;
    return r * inner.stride;
  }
  int64_t rest = r / inner.size;
  const int64_t at = r - rest * inner.size;
  int64_t offset = at * inner.stride;
  *run = inner.size - at;
  for (int a = o.axis_count - 2; a >= 0; --a) {
    offset += rest % o.axes[a].size * o.axes[a].stride;
    rest /= o.axes[a].size;
  }
  return offset;
}

static inline AdainOperand adain_operand(const AdainTensor& t, const int* kept, int kept_count, int column,
                                         const int* order, int reduced_count, const int64_t* size) {
  AdainOperand o;
  o.ptr = static_cast<char*>(t.ptr);
  for (int i = 0; i < kept_count; ++i) o.kept_stride[i] = t.stride[kept[i]];
  if (column >= 0) o.column_stride = t.stride[column];
  for (int i = 0; i < reduced_count; ++i) {
    const AdainAxis a{size[order[i]], t.stride[order[i]]};
    if (a.size == 1) continue;
    AdainAxis* last = o.axis_count > 0 ? &o.axes[o.axis_count - 1] : nullptr;
    if (last != nullptr && last->stride == a.stride * a.size) {
      last->size *= a.size;
      last->stride = a.stride;
    } else {
      o.axes[o.axis_count++] = a;
    }
  }
  if (o.axis_count == 0) o.axes[o.axis_count++] = {1, 1};
  return o;
}

// Fewer than `min_columns` neighbouring planes are taken one by one; more than `max_width` in several blocks.
static inline AdainLayout adain_layout(const AdainArgs& args, bool content, AdainDirection direction,
                                       int64_t min_columns, int64_t max_width) {
  const int64_t* size = content ? args.content_size : args.style_size;
  const AdainTensor* in = content ? args.content : args.style;
  const AdainTensor& out = content ? args.out : args.style_out;
  AdainLayout g;
  g.dtype = args.dtype;
  g.inputs = content ? adain_content_inputs(direction) : adain_style_inputs(direction);
  // Reduced axes in the order of memory of the first input (insertion sort), so that its planes are read forwards.
  int order[kAdainMaxRank], reduced_count = 0, column = -1;
  bool plane_contiguous = false;
  for (int d = 0; d < args.rank; ++d) {
    const bool unit = in[0].stride[d] == 1 && size[d] > 1;
    if (!args.reduced[d]) {
      if (unit && size[d] >= min_columns) column = d;
      continue;
    }
    plane_contiguous = plane_contiguous || unit;
    g.rows *= size[d];
    int at = reduced_count++;
    for (; at > 0 && in[0].stride[order[at - 1]] < in[0].stride[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  if (plane_contiguous) column = -1;
  int kept[kAdainMaxRank];
  int64_t index_step = 1, style_step = 1;
  for (int d = args.rank - 1; d >= 0; --d) {
    if (args.reduced[d]) continue;
    const int64_t style = args.style_size[d] == 1 ? 0 : style_step;
    if (d == column) {
      g.columns = size[d];
      g.column_index_step = index_step;
      g.column_style_step = style;
    } else if (size[d] != 1) {
      kept[g.kept_count] = d;
      g.kept_size[g.kept_count] = size[d];
      g.index_step[g.kept_count] = index_step;
      g.style_step[g.kept_count] = style;
      ++g.kept_count;
    }
    index_step *= size[d];
    style_step *= args.style_size[d];
  }
  g.planes = index_step;
  for (int k = 0; k < g.inputs; ++k)
    g.in[k] = adain_operand(in[k], kept, g.kept_count, column, order, reduced_count, size);
  g.out = adain_operand(out, kept, g.kept_count, column, order, reduced_count, size);
  if (column >= 0) {
    g.blocks = (g.columns + max_width - 1) / max_width;
    g.width = (g.columns + g.blocks - 1) / g.blocks;
    g.width = (g.width + 31) / 32 * 32;  // whole cache lines
    if (g.width > g.columns) g.width = g.columns;
    g.blocks = (g.columns + g.width - 1) / g.width;
  }
  g.slabs = g.planes / g.columns * g.blocks;
  return g;
}

}  // namespace transfuse
