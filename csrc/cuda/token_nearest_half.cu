// Cosine nearest neighbours of 16-bit vectors on tensor cores: the tile loop of a matrix product with a running maximum
// and its lowest index in place of the result. No score reaches memory, and results do not depend on the order of
// blocks.
//
// The numbers are multiplied as they are, products exact and sums in float32; inverse norms are applied to the scores,
// so equal columns have equal scores. Tensor cores align the terms of a sum and cut them off. With u = 2^-23 of the
// largest number of a sum as the last bit they keep, and 8 products to a sum, the coarsest that was measured (Fasi et
// al., 2021), a cosine is off by at most about 1.3 depth u, since no part of a sum exceeds |x| |y|. Emulated so,
// cosines of random vectors are off by less than 2 u and those of a vector with itself by about depth/7 u.
//
// For the same reason sums overflow only if a norm is out of all proportion, as only bfloat16 allows: rows that meet
// such norms are marked, and settled by the second kernel, normalised first, as in token_nearest.cu.
//
// What it cannot beat: 2 rows columns depth operations (312 TFLOP/s dense on an A100, 989 on an H100 SXM, of which
// mma.sync is said to reach about 60 %) and 2 (rows + columns) depth bytes once from memory. Every tile is read
// again from the second-level cache: 2 depth (rows ceil(columns/128) + columns ceil(rows/128)) bytes. Two images of
// 3072 x 1024 tokens of 640 channels: 8.1 GFLOP, 10 MB from memory, 126 MB from the cache. A block of 128 x 128 with
// warps of 64 x 64 keeps shared memory at about three quarters of its rate while the tensor cores are busy; two blocks
// share a multiprocessor, so that one multiplies while the other compares. (Reckoned, not measured.)
#include <climits>

#include "tensor_core.h"
#include "token_nearest.h"

namespace transfuse {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kTile = 128;                          // rows and columns of a block
constexpr int kOwn = 64;                            // rows and columns of a warp; warps are 2 x 2
constexpr int kDepth = 32, kStep = 16;              // channels of a slice, and of one product
constexpr int kStages = 3;                          // slices that are on their way or being multiplied
constexpr int kHigh = kOwn / 16, kWide = kOwn / 8;  // products of a warp
constexpr int kPack = 8;                            // numbers of 16 bytes
constexpr int kPacks = kDepth / kPack;              // of a row of a slice
static_assert(kWarps * kOwn * kOwn == kTile * kTile, "warps cover a tile");
static_assert(kPacks == 4, "rows of 64 bytes are what pack_at is made for");

constexpr int kNone = -1, kUntrusted = -2;  // in place of a column
constexpr unsigned kAllLanes = 0xffffffffu;
// Shorter inverse norms than this: products of such vectors may overflow.
constexpr float kTrusted = 0x1p-62f;
// Multiprocessors that the columns are split for (H100). The split does not change results.
constexpr int64_t kMultiprocessors = kMaxBlocks < 132 ? kMaxBlocks : 132;
constexpr int kMostSplits = 64;

template <class M>
struct alignas(128) Slice {
  M rows[kTile * kDepth], columns[kTile * kDepth];
};
static_assert(kStages * sizeof(Slice<__half>) <= 48 << 10, "shared memory that needs no asking");

// Where a pack of a row of a slice lies: two rows are 128 bytes, all banks once, and packs change places so that those
// of one number in 8 rows are in different banks.
__device__ inline int pack_at(int row, int pack) { return row * kDepth + (pack ^ (row >> 1 & 3)) * kPack; }

struct HalfSearch {
  NearestArgs args;
  InverseNorms<float> inverse;
  int row_tiles, column_tiles;  // per batch entry
  int splits;                   // of the columns
  unsigned items;               // batch x row tiles x splits
  float* best;                  // (2 splits, batch x rows): of each half of the columns of a split's tiles
  int* found;
};

// Of a thread, within its block's tile.
struct Places {
  int lane, group, quad;  // group and quad: where products' results lie (see multiply_add)
  int high, wide;         // first row and column of the warp
  int rows, columns;      // packs of a slice that this lane names to load_matrices; a multiple of 16 rows adds to them
  __device__ Places() : lane((int)threadIdx.x % kWarp), group(lane / 4), quad(lane % 4) {
    high = (int)threadIdx.x / kWarp / 2 * kOwn;
    wide = (int)threadIdx.x / kWarp % 2 * kOwn;
    rows = pack_at(high + lane % 16, lane / 16);
    columns = pack_at(wide + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }
};

// The slices of a block's tiles, one after the other: addresses are stepped, as there is little time to compute them.
template <class M>
struct Loader {
  static constexpr int kRowsAtOnce = kThreads / kPacks;
  const M *row, *column;                    // this thread's pack of its first row and column in the next slice
  int64_t row_stride, column_stride;        // between tokens
  int rows_left, columns_left, depth_left;  // from there on, what there is in the tile; the rest becomes 0
  int slice, slices, tiles;                 // of a tile: next, and all; and tiles that are left

  __device__ Loader(const NearestArgs& n, int64_t b, int64_t i0, int64_t j0, int tiles_of_block)
      : row_stride(n.x.stride[1]),
        column_stride(n.reference.stride[1]),
        slice(0),
        slices(((int)n.depth + kDepth - 1) / kDepth),
        tiles(tiles_of_block) {
    const int first = (int)threadIdx.x / kPacks, channel = (int)threadIdx.x % kPacks * kPack;
    row = static_cast<const M*>(n.x.ptr) + b * n.x.stride[0] + (i0 + first) * row_stride + channel;
    column =
        static_cast<const M*>(n.reference.ptr) + b * n.reference.stride[0] + (j0 + first) * column_stride + channel;
    rows_left = (n.rows - i0 < kTile ? (int)(n.rows - i0) : kTile) - first;
    columns_left = (int)(n.columns - j0) - first;
    depth_left = (int)n.depth - channel;
  }

  // Begins the copies of a slice, if there is one; ends a group in any case, since groups are counted.
  __device__ void next(Slice<M>* to) {
    if (tiles > 0) {
      const int at = pack_at((int)threadIdx.x / kPacks, (int)threadIdx.x % kPacks);
#pragma unroll
      for (int i = 0; i < kTile; i += kRowsAtOnce)
        copy_16_async(to->rows + at + i * kDepth, row + i * row_stride, depth_left > 0 && i < rows_left);
#pragma unroll
      for (int i = 0; i < kTile; i += kRowsAtOnce)
        copy_16_async(to->columns + at + i * kDepth, column + i * column_stride, depth_left > 0 && i < columns_left);
      row += kDepth;
      column += kDepth;
      depth_left -= kDepth;
      if (++slice == slices) {
        slice = 0;
        row -= slices * kDepth;
        column += kTile * column_stride - slices * kDepth;
        columns_left -= kTile;
        depth_left += slices * kDepth;
        --tiles;
      }
    }
    commit_copies();
  }
};
static_assert(Loader<__half>::kRowsAtOnce % 8 == 0, "the same place of a pack in all rows of a thread");

template <class M>
__device__ inline void multiply_slice(const Slice<M>& slice, const Places& at, float (&sums)[kHigh][kWide][4]) {
#pragma unroll
  for (int step = 0; step < kDepth / kStep; ++step) {
    uint32_t rows[kHigh][4], columns[kWide / 2][4];
    const int turn = step * kStep;  // two packs on: of a pack's number, another bit
#pragma unroll
    for (int m = 0; m < kHigh; ++m) load_matrices(rows[m], slice.rows + (at.rows ^ turn) + m * 16 * kDepth);
#pragma unroll
    for (int w = 0; w < kWide / 2; ++w)
      load_matrices(columns[w], slice.columns + (at.columns ^ turn) + w * 16 * kDepth);
#pragma unroll
    for (int m = 0; m < kHigh; ++m)
#pragma unroll
      for (int w = 0; w < kWide; ++w)
        multiply_add<M>(sums[m][w], rows[m], {columns[w / 2][w % 2 * 2], columns[w / 2][w % 2 * 2 + 1]});
  }
}

// Whether column `at` with `score` replaces the best: the larger, of equal ones the lower. A NaN never does.
__device__ inline bool wins(float score, int at, float best, int found) {
  return at >= 0 && (found < 0 || score > best || (score == best && at < found));
}

// The columns of a split's tiles against the rows of a tile.
template <class M>
__global__ void __launch_bounds__(kThreads, 2) nearest_half_kernel(const HalfSearch g) {
  constexpr int kOwnRows = 2 * kHigh;  // of a thread: row m * 16 + half * 8 + group
  __shared__ Slice<M> slices[kStages];
  const NearestArgs& n = g.args;
  const Places at;
  for (unsigned item = blockIdx.x; item < g.items; item += gridDim.x) {
    const int split = (int)(item % (unsigned)g.splits), tile_of_rows = (int)(item / (unsigned)g.splits);
    const int64_t b = tile_of_rows / g.row_tiles, i0 = (int64_t)(tile_of_rows % g.row_tiles) * kTile;
    const int first = (int)((int64_t)split * g.column_tiles / g.splits);
    const int last = (int)((int64_t)(split + 1) * g.column_tiles / g.splits);
    const float* const column_inverse = g.inverse.columns + b * g.inverse.column_stride;
    Loader<M> loader(n, b, i0, (int64_t)first * kTile, last - first);
    float inverse[kOwnRows], best[kOwnRows];
    int found[kOwnRows];
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const int64_t i = i0 + at.high + r * 8 + at.group;
      inverse[r] = i < n.rows ? g.inverse.rows[b * n.rows + i] : 0.0f;
      best[r] = -INFINITY;
      found[r] = kNone;
    }
    bool trusted = true;
    __syncthreads();  // the slices of the last item have been read
    for (int stage = 0; stage < kStages - 1; ++stage) loader.next(&slices[stage]);
    int stage = 0;
    for (int tile = first; tile < last; ++tile) {
      // A lane holds the inverse norms of two of the warp's columns; NaN for one that may not be chosen.
      const int j0 = tile * kTile + at.wide;
      float scale[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t j = (int64_t)j0 + half * kWarp + at.lane;
        scale[half] = j < n.columns && !masked(n, b, j) ? column_inverse[j] : NAN;
        if (scale[half] > 0.0f && scale[half] < kTrusted) trusted = false;
      }
      float sums[kHigh][kWide][4] = {};
      for (int slice = 0; slice < loader.slices; ++slice) {
        wait_for_copies<kStages - 2>();  // of this thread, for this slice
        __syncthreads();                 // of all of them; and all have read the slice before, which is loaded next
        loader.next(&slices[stage == 0 ? kStages - 1 : stage - 1]);
        multiply_slice(slices[stage], at, sums);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      if (n.exclude_self && i0 < (int64_t)(tile + 1) * kTile && (int64_t)tile * kTile < i0 + kTile) {
        const int ahead = (int)i0 + at.high + at.group - (j0 + at.quad * 2);
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r)
#pragma unroll
          for (int w = 0; w < kWide; ++w)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (ahead + r * 8 == w * 8 + e) sums[r / 2][w][r % 2 * 2 + e] = NAN;
      }
      // In ascending order, and only what is larger: ties stay with the lowest, and a NaN never wins.
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = w * 8 + at.quad * 2 + e;
          const float own = __shfl_sync(kAllLanes, scale[w / (kWide / 2)], column % kWarp);
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r) {
            const float score = sums[r / 2][w][r % 2 * 2 + e] * own * inverse[r];
            if (score > best[r]) {
              best[r] = score;
              found[r] = j0 + column;
            }
          }
        }
      }
    }
    if constexpr (std::is_same_v<M, __nv_bfloat16>) trusted = __ballot_sync(kAllLanes, !trusted) == 0;
    const int64_t slot = (2 * split + at.wide / kOwn) * n.batch * n.rows;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      for (int step = 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, best[r], step);
        const int column = __shfl_xor_sync(kAllLanes, found[r], step);
        if (wins(other, column, best[r], found[r])) {
          best[r] = other;
          found[r] = column;
        }
      }
      const int64_t i = i0 + at.high + r * 8 + at.group;
      if (at.quad != 0 || i >= n.rows) continue;
      if constexpr (std::is_same_v<M, __nv_bfloat16>) {
        if (!trusted || (inverse[r] > 0.0f && inverse[r] < kTrusted)) found[r] = kUntrusted;
      }
      g.best[slot + b * n.rows + i] = best[r];
      g.found[slot + b * n.rows + i] = found[r];
    }
  }
}

__device__ inline bool allowed(const NearestArgs& n, int64_t b, int64_t i, int64_t j) {
  return !masked(n, b, j) && !(n.exclude_self && i == j);
}

// All columns against one row by one warp, normalised first: slow, for the norms of which products overflow.
template <class M>
__device__ inline void search_row(const HalfSearch& g, int64_t b, int64_t i, float* best, int* found) {
  const NearestArgs& n = g.args;
  const M* x = static_cast<const M*>(n.x.ptr) + b * n.x.stride[0] + i * n.x.stride[1];
  const float x_inverse = g.inverse.rows[b * n.rows + i];
  *best = -INFINITY;
  *found = kNone;
  for (int64_t j = 0; j < n.columns; ++j) {
    if (!allowed(n, b, i, j)) continue;
    const M* y = static_cast<const M*>(n.reference.ptr) + b * n.reference.stride[0] + j * n.reference.stride[1];
    const float y_inverse = g.inverse.columns[b * g.inverse.column_stride + j];
    float sum = 0.0f;
    for (int64_t c = (int)threadIdx.x % kWarp; c < n.depth; c += kWarp)
      sum += widen(x[c]) * x_inverse * (widen(y[c]) * y_inverse);
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (sum > *best) {
      *best = sum;
      *found = (int)j;
    }
  }
}

// The best of all splits; one warp for a row.
template <class M>
__global__ void __launch_bounds__(kThreads) settle_kernel(const HalfSearch g) {
  const NearestArgs& n = g.args;
  const int lane = (int)threadIdx.x % kWarp;
  const int64_t rows = n.batch * n.rows;
  for (int64_t row = (int64_t)blockIdx.x * kWarps + (int)threadIdx.x / kWarp; row < rows;
       row += (int64_t)gridDim.x * kWarps) {
    const int64_t b = row / n.rows, i = row % n.rows;
    float best = -INFINITY;
    int found = kNone;
    bool trusted = true;
    for (int slot = lane; slot < 2 * g.splits; slot += kWarp) {
      const float other = g.best[slot * rows + row];
      const int column = g.found[slot * rows + row];
      if (column == kUntrusted) trusted = false;
      if (wins(other, column, best, found)) {
        best = other;
        found = column;
      }
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best, step);
      const int column = __shfl_xor_sync(kAllLanes, found, step);
      if (wins(other, column, best, found)) {
        best = other;
        found = column;
      }
    }
    if constexpr (std::is_same_v<M, __nv_bfloat16>) {
      if (__ballot_sync(kAllLanes, !trusted) != 0) search_row<M>(g, b, i, &best, &found);
    }
    int64_t index = found;
    if (found == kNone) {
      // Nothing was allowed, or all that was is NaN: then the first of it.
      for (int64_t j = 0; j < n.columns && index < 0; j += kWarp) {
        const unsigned may = __ballot_sync(kAllLanes, j + lane < n.columns && allowed(n, b, i, j + lane));
        if (may != 0) index = j + __popc((may & (0u - may)) - 1);
      }
      if (index >= 0) best = NAN;
    }
    if (lane == 0) {
      static_cast<float*>(n.similarity)[row] = best;
      n.index[row] = index;
    }
  }
}

int64_t tiles_of(int64_t tokens) { return (tokens + kTile - 1) / kTile; }

// In how many runs of tiles the columns of one tile of rows are searched by different blocks, so that all
// multiprocessors are busy to the end. A block's beginning is taken for an eighth of a tile.
int splits_of(const NearestArgs& args) {
  const int64_t columns = tiles_of(args.columns), rows = args.batch * tiles_of(args.rows);
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= kMostSplits && splits <= columns; ++splits) {
    const int64_t rounds = (rows * splits + kMultiprocessors - 1) / kMultiprocessors;
    const int64_t time = rounds * (8 * ((columns + splits - 1) / splits) + 1);
    if (time < least) {
      least = time;
      best = splits;
    }
  }
  return best;
}

// Whether all rows are whole packs. (The stride of a single one means nothing; see search_nearest_half.)
bool in_packs(const View& v, int64_t batch, int64_t tokens) {
  return pack_aligned(v.ptr) && v.stride[2] == 1 && (tokens < 2 || v.stride[1] % kPack == 0) &&
         (batch < 2 || v.stride[0] % kPack == 0);
}

template <class M>
cudaError_t search_half(const HalfSearch& g, cudaStream_t stream) {
  const int64_t rows = g.args.batch * g.args.rows;
  const cudaError_t error = launch(nearest_half_kernel<M>, g.items, kThreads, stream, g);
  return error == cudaSuccess ? launch(settle_kernel<M>, (rows + kWarps - 1) / kWarps, kThreads, stream, g) : error;
}

}  // namespace

bool takes_nearest_half(const NearestArgs& args) {
  constexpr int64_t kMost = INT_MAX - kTile;  // of what is counted in ints
  return (args.dtype == DType::bf16 || args.dtype == DType::f16) && args.depth > 0 && args.depth % kPack == 0 &&
         args.depth <= kMost && args.columns > 0 && args.columns <= kMost &&
         tiles_of(args.rows) <= kMost / kMostSplits / (args.batch > 0 ? args.batch : 1) &&
         in_packs(args.x, args.batch, args.rows) && in_packs(args.reference, args.batch, args.columns);
}

int64_t nearest_half_working(const NearestArgs& args) { return 2 * 2 * splits_of(args) * args.batch * args.rows; }

cudaError_t search_nearest_half(const NearestArgs& args, const InverseNorms<float>& inverse, void* working,
                                cudaStream_t stream) {
  HalfSearch g = {};
  g.args = args;
  // Addresses are made, though not read, of rows past the last as well, and have to be those of packs.
  if (args.rows == 1) g.args.x.stride[1] = 0;
  if (args.columns == 1) g.args.reference.stride[1] = 0;
  g.inverse = inverse;
  g.row_tiles = (int)tiles_of(args.rows);
  g.column_tiles = (int)tiles_of(args.columns);
  g.splits = splits_of(args);
  g.items = (unsigned)(args.batch * g.row_tiles * g.splits);
  g.best = static_cast<float*>(working);
  g.found = static_cast<int*>(working) + 2 * g.splits * args.batch * args.rows;
  return args.dtype == DType::bf16 ? search_half<__nv_bfloat16>(g, stream) : search_half<__half>(g, stream);
}

}  // namespace transfuse
