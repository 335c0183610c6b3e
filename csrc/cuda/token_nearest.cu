// Cosine nearest neighbours on CUDA (see token_merging.h): the tile loop of a matrix product with a running maximum
// and its lowest index in place of the result. No score reaches memory, and every row is one block's alone.
//
// Products are of CUDA cores in float32 (float64 for float64), vectors normalised as they are loaded, as on the CPU:
// what is equal stays equal. 16-bit numbers come here only if token_nearest_half.cu cannot load them in whole packs;
// the norms are computed here for both.
#include <type_traits>

#include "token_nearest.h"

namespace transfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64, kColumns = 128, kDepth = 16;  // of a tile
constexpr int kOwnRows = 4, kQuad = 4, kQuads = 2;      // of a thread: 4 rows, and 4 columns at 2 places
constexpr int kAcross = kColumns / (kQuad * kQuads);    // threads side by side: half a warp
static_assert(kAcross * (kRows / kOwnRows) == kThreads && kAcross == kWarp / 2, "threads cover a tile");

template <class A>
__device__ inline A root(A x) {
  return sqrt(x);
}

// Brings what may overflow as a square back into range.
template <class A>
constexpr A kShrink = std::is_same_v<A, double> ? (A)0x1p-600 : (A)0x1p-80f;

// The sum of the squares of one row, in every lane of its warp; numbers scaled first, and read kSize at a time.
template <class M, int kSize, class A>
__device__ inline A sum_of_squares(const M* p, int64_t stride, int64_t depth, A scale) {
  A sum = A(0);
  for (int64_t c = (int)threadIdx.x % kWarp * kSize; c < depth; c += kWarp * kSize) {
    const auto pack = load_pack<Pack<M, kSize>>(p + c * stride);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A x = widen(pack.v[k]) * scale;
      sum += x * x;
    }
  }
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// 1 / |row|; 0 for one that counts as zero. NaN and infinities give 0 too: 0 times these is NaN, so the row stays
// visible. Where squares overflow they are summed again, smaller.
template <class M, int kSize>
__global__ void __launch_bounds__(kThreads)
    norms_kernel(const View v, int64_t batch, int64_t tokens, int64_t depth, typename Arithmetic<M>::A* inverse) {
  using A = typename Arithmetic<M>::A;
  const int lane = (int)threadIdx.x % kWarp, own = (int)threadIdx.x / kWarp;
  for (int64_t first = (int64_t)blockIdx.x * (kThreads / kWarp); first < batch * tokens;
       first += (int64_t)gridDim.x * (kThreads / kWarp)) {
    const int64_t row = first + own;
    if (row >= batch * tokens) continue;
    const M* p = static_cast<const M*>(v.ptr) + row / tokens * v.stride[0] + row % tokens * v.stride[1];
    A scale = A(1), sum = sum_of_squares<M, kSize, A>(p, v.stride[2], depth, scale);
    if (sum == (A)INFINITY) {
      scale = kShrink<A>;
      sum = sum_of_squares<M, kSize, A>(p, v.stride[2], depth, scale);
    }
    const A norm = root(sum);
    if (lane == 0) inverse[row] = norm > (A)kMergeSmallestNorm * scale ? scale / norm : A(0);
  }
}

template <class A>
struct Search {
  NearestArgs args;
  InverseNorms<A> inverse;
  int64_t tiles;  // of rows, per batch entry
};

// kCount rows of one operand and kDepth channels from `c` on, normalised, channel by channel; zero where nothing is.
template <class M, int kCount, class A>
__device__ inline void load_tile(const View& v, int64_t b, int64_t first, int64_t count, int64_t c, int64_t depth,
                                 const A* inverse, A (*tile)[kCount + kQuad]) {
  const int channel = (int)threadIdx.x % kDepth;
  for (int r = (int)threadIdx.x / kDepth; r < kCount; r += kThreads / kDepth) {
    const int64_t token = first + r;
    A x = A(0);
    if (token < count && c + channel < depth)
      x = widen(static_cast<const M*>(v.ptr)[b * v.stride[0] + token * v.stride[1] + (c + channel) * v.stride[2]]) *
          inverse[token];
    tile[channel][r] = x;
  }
}

template <class M>
__global__ void __launch_bounds__(kThreads) nearest_kernel(const Search<typename Arithmetic<M>::A> g) {
  using A = typename Arithmetic<M>::A;
  __shared__ A rows[kDepth][kRows + kQuad], columns[kDepth][kColumns + kQuad];
  const NearestArgs& n = g.args;
  const int across = (int)threadIdx.x % kAcross, down = (int)threadIdx.x / kAcross;
  for (int64_t block = blockIdx.x; block < n.batch * g.tiles; block += gridDim.x) {
    const int64_t b = block / g.tiles, i0 = block % g.tiles * kRows;
    const A* row_inverse = g.inverse.rows + b * n.rows;
    const A* column_inverse = g.inverse.columns + b * g.inverse.column_stride;
    A best[kOwnRows];
    int64_t found[kOwnRows], allowed[kOwnRows];  // column of the best, and the first that may be chosen; -1: none
    for (int r = 0; r < kOwnRows; ++r) {
      best[r] = -(A)INFINITY;
      found[r] = allowed[r] = -1;
    }
    for (int64_t j0 = 0; j0 < n.columns; j0 += kColumns) {
      A score[kOwnRows][kQuads * kQuad] = {};
      for (int64_t c = 0; c < n.depth; c += kDepth) {
        __syncthreads();
        load_tile<M, kRows>(n.x, b, i0, n.rows, c, n.depth, row_inverse, rows);
        load_tile<M, kColumns>(n.reference, b, j0, n.columns, c, n.depth, column_inverse, columns);
        __syncthreads();
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          A x[kOwnRows], y[kQuads * kQuad];
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r) x[r] = rows[d][down * kOwnRows + r];
#pragma unroll
          for (int q = 0; q < kQuads; ++q)
#pragma unroll
            for (int i = 0; i < kQuad; ++i) y[q * kQuad + i] = columns[d][q * (kColumns / kQuads) + across * kQuad + i];
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r)
#pragma unroll
            for (int i = 0; i < kQuads * kQuad; ++i) score[r][i] += x[r] * y[i];
        }
      }
      // In ascending order, and only what is larger: ties stay with the lowest, and a NaN never wins.
#pragma unroll
      for (int i = 0; i < kQuads * kQuad; ++i) {
        const int64_t j = j0 + i / kQuad * (kColumns / kQuads) + across * kQuad + i % kQuad;
        if (j >= n.columns || masked(n, b, j)) continue;
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          if (n.exclude_self && i0 + down * kOwnRows + r == j) continue;
          if (allowed[r] < 0) allowed[r] = j;
          if (score[r][i] > best[r]) {
            best[r] = score[r][i];
            found[r] = j;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      for (int step = kAcross / 2; step > 0; step /= 2) {
        const A other = __shfl_xor_sync(0xffffffffu, best[r], step);
        const int64_t at = __shfl_xor_sync(0xffffffffu, found[r], step);
        const int64_t may = __shfl_xor_sync(0xffffffffu, allowed[r], step);
        if (at >= 0 && (found[r] < 0 || other > best[r] || (other == best[r] && at < found[r]))) {
          best[r] = other;
          found[r] = at;
        }
        if (may >= 0 && (allowed[r] < 0 || may < allowed[r])) allowed[r] = may;
      }
      const int64_t i = i0 + down * kOwnRows + r;
      if (across != 0 || i >= n.rows) continue;
      // Without a winner: nothing was allowed, or all that was is NaN.
      const bool none = found[r] < 0, nan = none && allowed[r] >= 0;
      static_cast<A*>(n.similarity)[b * n.rows + i] = nan ? (A)NAN : best[r];
      n.index[b * n.rows + i] = none ? allowed[r] : found[r];
    }
  }
}

template <class M>
cudaError_t search(const NearestArgs& args, typename Arithmetic<M>::A* working, cudaStream_t stream) {
  using A = typename Arithmetic<M>::A;
  const bool shared = args.reference.stride[0] == 0;
  const int64_t references = shared ? 1 : args.batch;
  A* const row_inverse = working;
  A* const column_inverse = row_inverse + args.batch * args.rows;
  bool half = false;
  auto* norms = norms_kernel<M, 1>;
  if constexpr (sizeof(M) == 2) {
    half = takes_nearest_half(args);
    if (half) norms = norms_kernel<M, Pack<M>::kSize>;
  }
  const auto start = [&](const View& v, int64_t batch, int64_t tokens, A* inverse) {
    const int64_t blocks = (batch * tokens + kThreads / kWarp - 1) / (kThreads / kWarp);
    return launch(norms, blocks, kThreads, stream, v, batch, tokens, args.depth, inverse);
  };
  cudaError_t error = start(args.x, args.batch, args.rows, row_inverse);
  if (error == cudaSuccess && args.columns > 0) error = start(args.reference, references, args.columns, column_inverse);
  if (error != cudaSuccess) return error;
  const InverseNorms<A> inverse{row_inverse, column_inverse, shared ? 0 : args.columns};
  if constexpr (sizeof(M) == 2) {
    if (half) return search_nearest_half(args, inverse, column_inverse + args.batch * args.columns, stream);
  }
  const int64_t tiles = (args.rows + kRows - 1) / kRows;
  return launch(nearest_kernel<M>, args.batch * tiles, kThreads, stream, Search<A>{args, inverse, tiles});
}

}  // namespace

int64_t nearest_tokens_cuda_working(const NearestArgs& args) {
  const int64_t norms = args.batch * (args.rows + args.columns);
  if (args.dtype == DType::f64) return norms;
  return (norms + (takes_nearest_half(args) ? nearest_half_working(args) : 0) + 1) / 2;
}

const char* nearest_tokens_cuda(const NearestArgs& args, void* working, void* stream) {
  if (args.batch == 0 || args.rows == 0) return nullptr;
  return message_of(with_storage(args.dtype, [&](auto number) {
    using M = decltype(number);
    return search<M>(args, static_cast<typename Arithmetic<M>::A*>(working), static_cast<cudaStream_t>(stream));
  }));
}

}  // namespace transfuse
