// Codes of rows on the CPU, at one ISA level (see row_codes.h): numbers are read once, and nothing but codes is kept.
#include "transfuse/row_codes.h"

#include <algorithm>

#include "panels.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kRows = 64;         // of a task
constexpr int64_t kColumns = 512;     // digitised at a time
constexpr int64_t kCompared = 64;     // edges up to which each is compared with; beyond, they are searched
constexpr int64_t kSerial = 1 << 13;  // numbers below which waking other threads does not pay

struct Counts {
  int64_t nan = 0, below = 0;
};

void cells(const RowCodesArgs& a, const float* v, int64_t n, int32_t* cell, Counts* counts) {
  if (a.edge_count <= kCompared) {
    for (int64_t c = 0; c < n; ++c) cell[c] = -1;
    for (int64_t e = 0; e < a.edge_count; ++e) {
      const float edge = a.edges[e];
      for (int64_t c = 0; c < n; ++c) cell[c] += v[c] >= edge;
    }
  } else {
    for (int64_t c = 0; c < n; ++c)
      cell[c] = (int32_t)(std::upper_bound(a.edges, a.edges + a.edge_count, v[c]) - a.edges) - 1;
  }
  const int32_t lowest = a.wrap ? (int32_t)a.edge_count - 1 : 0;
  int64_t nan = 0, below = 0;
  for (int64_t c = 0; c < n; ++c) {
    nan += v[c] != v[c];
    below += cell[c] < 0 && v[c] == v[c];
    cell[c] = cell[c] < 0 ? lowest : cell[c];
  }
  counts->nan += nan;
  counts->below += below;
}

void block(const RowCodesArgs& a, int64_t begin, Counts* counts) {
  float v[kColumns];
  double wide[kColumns];
  int32_t cell[kColumns];
  uint64_t keys[kColumns];
  uint64_t first[kRows] = {0}, second[kRows] = {0};
  const int64_t rows = std::min(kRows, a.rows - begin);
  for (int64_t start = 0; start < a.columns; start += kColumns) {
    const int64_t n = std::min(kColumns, a.columns - start);
    for (int64_t c = 0; c < n; ++c) keys[c] = column_key((uint64_t)(start + c));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (begin + r) * a.stride[0] + start * a.stride[1];
      uint64_t one = 0, two = 0;
      if (a.edges != nullptr) {
        load_row(a.x, a.dtype, at, a.stride[1], n, v);
        cells(a, v, n, cell, counts);
        for (int64_t c = 0; c < n; ++c) {
          const uint64_t half = first_half((uint64_t)cell[c], keys[c]);
          one += half;
          two += second_half(half);
        }
      } else {
        load_row(a.x, a.dtype, at, a.stride[1], n, wide);
        for (int64_t c = 0; c < n; ++c) {
          const double number = wide[c] + 0.0;  // -0 becomes 0
          counts->nan += number != number;
          uint64_t bits;
          std::memcpy(&bits, &number, 8);
          const uint64_t half = first_half(bits, keys[c]);
          one += half;
          two += second_half(half);
        }
      }
      first[r] += one;
      second[r] += two;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    a.codes[2 * (begin + r)] = (int64_t)mix_bits(first[r]);
    a.codes[2 * (begin + r) + 1] = (int64_t)mix_bits(second[r]);
  }
}

void run(const RowCodesArgs& args, const Parallel& parallel) {
  const int64_t blocks = (args.rows + kRows - 1) / kRows;
  HeapArray<Counts> counts(blocks);
  const Parallel serial = serial_parallel();
  for_each_task(args.rows * args.columns < kSerial ? serial : parallel, blocks, [&](int64_t b) {
    counts.data[b] = Counts{};
    block(args, b * kRows, counts.data + b);
  });
  args.counts[0] = args.counts[1] = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    args.counts[0] += counts.data[b].nan;
    args.counts[1] += counts.data[b].below;
  }
}

}  // namespace

extern const RowCodesKernels kRowCodes;
const RowCodesKernels kRowCodes = {run};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
