// Points packed for products of all pairs, and the order in which blocks of pairs are visited.
//
// A round is a list of block pairs no two of which share a block of rows or of columns, so that its tasks add to what
// belongs to a block without locks; rounds follow each other. What a block is added is so added in one order, whatever
// the number of threads.
#pragma once

#include <algorithm>
#include <cmath>

#include "panels.h"
#include "transfuse/kernel_sums.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

constexpr int64_t kPairRows = 48, kPairColumns = 96;  // of a tile: whole register tiles, and panels, at every width
constexpr int64_t kPairBlocks = 32, kPairBlockMost = 4 * kPairColumns;
constexpr int64_t kNarrow = 8;         // coordinates up to which distances are sums of squared differences
constexpr int64_t kCentreRows = 1024;  // rows whose mean is taken at a time

// Points less a centre, rows and columns padded with zeros: as rows, and as panels of 96 points. Narrow ones, whose
// distances do not come from products, have norms of zero.
template <class T>
struct PackedPoints {
  int64_t count, width, padded, depth, ld;
  HeapArray<T> rows, panels, norms;

  explicit PackedPoints(const KernelPoints& p)
      : count(p.count),
        width(p.width),
        padded(round_up(std::max<int64_t>(1, p.count), kPairColumns)),
        depth(std::max<int64_t>(1, p.width)),
        ld(padded_columns<T>(depth)),
        rows(padded * ld),
        panels(panels_size<DotPlain<T>>(kPairColumns, depth) * (padded / kPairColumns)),
        norms(padded) {}

  bool narrow() const { return depth <= kNarrow; }
  const T* row(int64_t i) const { return rows.data + i * ld; }
  const T* panel(int64_t j) const { return panels.data + j * depth; }

  void fill(const KernelPoints& p, DType dtype, int64_t group, const double* centre, int64_t block) {
    for (int64_t i = block * kPairColumns; i < (block + 1) * kPairColumns; ++i) {
      T* to = rows.data + i * ld;
      std::memset(to, 0, (size_t)ld * sizeof(T));
      double norm = 0.0;
      if (i < count) {
        load_row(p.data, dtype, group * p.stride[0] + i * p.stride[1], p.stride[2], width, to);
        for (int64_t d = 0; d < width; ++d) {
          to[d] = (T)((double)to[d] - centre[d]);
          norm += (double)to[d] * (double)to[d];
        }
      }
      norms.data[i] = narrow() ? T(0) : (T)norm;
    }
    transpose_panels<DotPlain<T>>(row(block * kPairColumns), ld, kPairColumns, kPairColumns, depth,
                                  panels.data + block * kPairColumns * depth);
  }
};

// The mean of sets of points of one width: what is taken off them before distances are made of products.
inline void centre_of(const KernelPoints* const* sets, int count, DType dtype, int64_t group, const Parallel& parallel,
                      double* centre) {
  const int64_t width = sets[0]->width;
  int64_t first[kMaxKernelPoints + 1] = {0}, total = 0;
  for (int s = 0; s < count; ++s) {
    first[s + 1] = first[s] + (sets[s]->count + kCentreRows - 1) / kCentreRows;
    total += sets[s]->count;
  }
  const int64_t parts = first[count];
  HeapArray<double> sums(parts * 2 * width);
  for_each_task(parallel, parts, [&](int64_t part) {
    int s = 0;
    while (part >= first[s + 1]) ++s;
    const KernelPoints& p = *sets[s];
    double *to = sums.data + part * 2 * width, *row = to + width;
    std::fill(to, to + width, 0.0);
    const int64_t begin = (part - first[s]) * kCentreRows;
    for (int64_t i = begin; i < std::min(p.count, begin + kCentreRows); ++i) {
      load_row(p.data, dtype, group * p.stride[0] + i * p.stride[1], p.stride[2], width, row);
      for (int64_t d = 0; d < width; ++d) to[d] += row[d];
    }
  });
  std::fill(centre, centre + width, 0.0);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t d = 0; d < width; ++d) centre[d] += sums.data[part * 2 * width + d] / (double)total;
}

// Blocks of rows against blocks of columns; of a symmetric call, every unordered pair once.
struct PairSchedule {
  int64_t rows, columns, block, row_blocks, column_blocks;
  bool symmetric;

  PairSchedule(int64_t n, int64_t m, bool same) : rows(n), columns(m), symmetric(same) {
    const int64_t most = std::max(n, m);
    const int64_t wanted = round_up((most + kPairBlocks - 1) / kPairBlocks, kPairColumns);
    block = std::min(kPairBlockMost, std::max(kPairColumns, wanted));
    row_blocks = (n + block - 1) / block;
    column_blocks = (m + block - 1) / block;
  }

  // Round 0 of a symmetric call are the blocks with themselves, then comes a tournament: with an even number of
  // players (one of them may be missing), the last stays and the others turn.
  int64_t rounds() const { return symmetric ? row_blocks + (row_blocks & 1) : std::max(row_blocks, column_blocks); }
  int64_t tasks(int64_t round) const {
    if (!symmetric) return std::min(row_blocks, column_blocks);
    return round == 0 ? row_blocks : (row_blocks + 1) / 2;
  }
  // False: nobody to play with.
  bool pair(int64_t round, int64_t task, int64_t* row, int64_t* column) const {
    if (!symmetric) {
      const bool long_rows = row_blocks >= column_blocks;
      *row = long_rows ? (task + round) % row_blocks : task;
      *column = long_rows ? task : (task + round) % column_blocks;
      return true;
    }
    if (round == 0) {
      *row = *column = task;
      return true;
    }
    const int64_t turning = row_blocks + (row_blocks & 1) - 1, r = round - 1;
    const int64_t a = task == 0 ? turning : (r + task) % turning;
    const int64_t b = task == 0 ? r : (r - task + turning) % turning;
    *row = std::min(a, b);
    *column = std::max(a, b);
    return *column < row_blocks;
  }
};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
