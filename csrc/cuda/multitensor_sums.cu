// Sums over lists of tensors on CUDA: inner products by tensor, Gram matrices and norms (see multitensor.h,
// multitensor_table.h).
//
// Every chunk leaves its sums in memory, and one more kernel adds those of a tensor, or of all, in a fixed order: no
// atomics, the same bits every time. Products are float within a thread, for no more than some hundred of them, and
// double beyond.
#include "multitensor_table.h"

namespace transfuse {
namespace {

using namespace lists;

// ---- sums of chunks -------------------------------------------------------------------------------------------------

// out[w / row, group, w % row] over the chunks of a group; chunk c has number w at partial[w * chunks + c].
struct Fold {
  const double* partial;
  const int64_t* start;  // chunks of each group, or nullptr: one group of all
  int64_t chunks, groups, width, row;
  int64_t mirrored;  // if not 0: (mirrored, mirrored) of which only what is not below the diagonal was left
  bool largest;
  double* out;
};

__global__ void __launch_bounds__(kThreads) fold_kernel(const Fold f) {
  const int64_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t item = (int64_t)blockIdx.x * kWarps + warp; item < f.groups * f.width;
       item += (int64_t)gridDim.x * kWarps) {
    const int64_t group = item / f.width, w = item % f.width;
    int64_t number = w;
    if (f.mirrored != 0) {
      const int64_t a = w / f.mirrored, b = w % f.mirrored;
      number = a <= b ? w : b * f.mirrored + a;
    }
    const int64_t first = f.start == nullptr ? 0 : f.start[group];
    const int64_t last = f.start == nullptr ? f.chunks : f.start[group + 1];
    const double* from = f.partial + number * f.chunks;
    double sum = 0.0;
    for (int64_t c = first + lane; c < last; c += kWarp) sum = f.largest ? larger(sum, from[c]) : sum + from[c];
    sum = f.largest ? warp_largest(sum) : warp_sum(sum);
    if (lane == 0) f.out[(w / f.row * f.groups + group) * f.row + w % f.row] = sum;
  }
}

cudaError_t fold(const Fold& f, cudaStream_t stream) {
  return launch(fold_kernel, (f.groups * f.width + kWarps - 1) / kWarps, kThreads, stream, f);
}

// Adds K numbers of every thread and leaves number k at to[k * stride], or adds it to what is there, where wanted(k).
template <class T, int K, class W>
__device__ inline void leave_sums(const T (&sums)[K], double (*memory)[kWarps], double* to, int64_t stride, bool more,
                                  const W& wanted) {
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const double sum = warp_sum((double)sums[k]);
    if (threadIdx.x % kWarp == 0) memory[k][threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x < K && wanted((int)threadIdx.x)) {
    double sum = more ? to[threadIdx.x * stride] : 0.0;
    for (int w = 0; w < kWarps; ++w) sum += memory[threadIdx.x][w];
    to[threadIdx.x * stride] = sum;
  }
}

// ---- inner products by tensor ---------------------------------------------------------------------------------------

constexpr int kLists = 4;  // summed in one reading of a chunk of gradients

struct Dots {
  Table table;
  int64_t chunks, grads, deltas;
  int lists;
  PartsOf parts;
  double* partial;  // (lists, parts, chunks)
};

template <class A>
__global__ void __launch_bounds__(kThreads) dots_kernel(const Dots c) {
  constexpr int N = kPer<A>;
  __shared__ double memory[kLists][kWarps];
  each_chunk<A>(c.table, c.chunks, [&](const Chunk& chunk, int64_t item) {
    const Place grad = c.table.tensor(c.grads + chunk.block);
    for (int first = 0; first < c.lists; first += kLists) {
      double total[kLists] = {};
      Place list[kLists] = {};
#pragma unroll
      for (int g = 0; g < kLists; ++g)
        if (first + g < c.lists) list[g] = c.table.tensor(c.deltas + (first + g) * c.table.blocks + chunk.block);
      // Not more than kMostRounds products are added in A.
      constexpr int64_t kStep = kThreads * N * kMostRounds;
      for (int64_t begin = 0; begin < chunk.count; begin += kStep) {
        const int64_t end = begin + kStep < chunk.count ? begin + kStep : chunk.count;
        A sum[kLists] = {};
        for (int64_t own = begin + (int64_t)threadIdx.x * N; own < end; own += kThreads * N) {
          const int64_t at = chunk.begin + own, n = chunk.count - own;
          Awaited<A, N> left, right[kLists];
          left.load(grad, at, n);
#pragma unroll
          for (int g = 0; g < kLists; ++g)
            if (first + g < c.lists) right[g].load(list[g], at, n);
          A y[N];
          left.get(y);
#pragma unroll
          for (int g = 0; g < kLists; ++g) {
            if (first + g >= c.lists) continue;
            A x[N];
            right[g].get(x);
#pragma unroll
            for (int i = 0; i < N; ++i) sum[g] += y[i] * x[i];
          }
        }
#pragma unroll
        for (int g = 0; g < kLists; ++g) total[g] += (double)sum[g];
      }
      leave_sums(total, memory, c.partial + first * c.chunks + item, c.chunks, false,
                 [&](int g) { return first + g < c.lists; });
    }
  });
}

// Many coefficients for each tensor: every thread has its own sum for every partition in shared memory, of as many
// partitions as fit; the rest are other thread blocks'.
constexpr int kPartThreads = 128;
constexpr int64_t kPartFlush = 256;  // products that a thread adds in A
template <class A>
constexpr int kPartTile = kIsWide<A> ? 44 : 88;

template <class A>
__global__ void __launch_bounds__(kPartThreads) part_dots_kernel(const Dots c) {
  constexpr int N = kPer<A>, T = kPartTile<A>;
  static_assert(T <= kPartThreads, "a thread for each partition");
  __shared__ A sums[T][kPartThreads];
  const int own = (int)threadIdx.x;
  const int64_t tiles = (c.parts.count + T - 1) / T, many = c.lists * tiles;
  for (int64_t item = blockIdx.x; item < c.chunks * many; item += gridDim.x) {
    const Chunk chunk = find_chunk(c.table, item / many);
    if ((c.table.wide[chunk.block] != 0) != kIsWide<A>) continue;
    const int64_t list = item % many / tiles;
    const int first = (int)(item % tiles) * T, count = c.parts.count - first < T ? c.parts.count - first : T;
    const Place grad = c.table.tensor(c.grads + chunk.block);
    const Place delta = c.table.tensor(c.deltas + list * c.table.blocks + chunk.block);
    double total = 0.0;  // of partition first + own
    for (int64_t begin = 0; begin < chunk.count; begin += kPartThreads * kPartFlush) {
      const int64_t limit = begin + kPartThreads * kPartFlush, end = limit < chunk.count ? limit : chunk.count;
      for (int q = 0; q < count; ++q) sums[q][own] = A(0);
      for (int64_t e = begin + (int64_t)own * N; e < end; e += kPartThreads * N) {
        const int64_t at = chunk.begin + e, n = chunk.count - e;
        Awaited<A, N> left, right;
        int part[N];
        left.load(grad, at, n);
        right.load(delta, at, n);
        read_parts(c.table, c.parts, chunk.block, at, n, part);
        A x[N], y[N];
        left.get(y);
        right.get(x);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int q = part[i] - first;
          if (i < n && q >= 0 && q < count) sums[q][own] += y[i] * x[i];
        }
      }
      __syncthreads();
      // Each thread begins at a column of its own: no two of a warp read the same bank.
      if (own < count)
        for (int t = 0; t < kPartThreads; ++t) total += (double)sums[own][(own + t) % kPartThreads];
      __syncthreads();
    }
    if (own < count) c.partial[(list * c.parts.count + first + own) * c.chunks + item / many] = total;
  }
}

// ---- Gram matrices --------------------------------------------------------------------------------------------------

struct Gram {
  Table table;
  int64_t chunks, x;
  int lists;
  double* partial;  // (lists, lists, chunks), not below the diagonal
};

// Tile x Tile inner products of a chunk: thread blocks that take the same chunk follow each other, so that it is read
// from memory once.
template <class A, int Tile>
__global__ void __launch_bounds__(kThreads) gram_kernel(const Gram c) {
  // Few numbers of each list where there are many: all of them have to fit in registers.
  constexpr int N = (Tile > 4 ? 8 : 16) / (int)sizeof(A), kRows = 2 * Tile;
  __shared__ double memory[Tile][kWarps];
  const int64_t side = (c.lists + Tile - 1) / Tile, tiles = side * (side + 1) / 2;
  for (int64_t item = blockIdx.x; item < c.chunks * tiles; item += gridDim.x) {
    const int64_t number = item / tiles;
    const Chunk chunk = find_chunk(c.table, number);
    if ((c.table.wide[chunk.block] != 0) != kIsWide<A>) continue;
    int64_t up = 0, rest = item % tiles;
    while (rest >= side - up) rest -= side - up++;
    const int first[2] = {(int)up * Tile, (int)(up + rest) * Tile};
    const bool diagonal = rest == 0;
    Place row[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int k = first[r / Tile] + r % Tile;
      if (k < c.lists) row[r] = c.table.tensor(c.x + k * c.table.blocks + chunk.block);
    }
    // Not more than some hundred products are added in A.
    constexpr int64_t kStep = kThreads * 64;
    for (int64_t begin = 0; begin < chunk.count; begin += kStep) {
      const int64_t end = begin + kStep < chunk.count ? begin + kStep : chunk.count;
      A sum[Tile][Tile] = {};
      for (int64_t own = begin + (int64_t)threadIdx.x * N; own < end; own += kThreads * N) {
        const int64_t at = chunk.begin + own, n = chunk.count - own;
        Awaited<A, N> rows[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (row[r].address != 0 && (r < Tile || !diagonal)) rows[r].load(row[r], at, n);
        A x[kRows][N] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (row[r].address == 0) continue;
          if (r < Tile || !diagonal) {
            rows[r].get(x[r]);
          } else {
#pragma unroll
            for (int i = 0; i < N; ++i) x[r][i] = x[r - Tile][i];
          }
        }
#pragma unroll
        for (int a = 0; a < Tile; ++a)
#pragma unroll
          for (int b = 0; b < Tile; ++b)
#pragma unroll
            for (int i = 0; i < N; ++i) sum[a][b] += x[a][i] * x[Tile + b][i];
      }
#pragma unroll
      for (int a = 0; a < Tile; ++a) {
        const int i = first[0] + a;
        double* to = c.partial + ((int64_t)i * c.lists + first[1]) * c.chunks + number;
        leave_sums(sum[a], memory, to, c.chunks, begin > 0,
                   [&](int b) { return i < c.lists && first[1] + b < c.lists && i <= first[1] + b; });
      }
    }
  }
}

// ---- norms ----------------------------------------------------------------------------------------------------------

struct Norm {
  Table table;
  int64_t chunks, x, scale;
  bool scaled;
  double* partial;  // (chunks)
};

// Squares (Order 2), magnitudes (1) or the largest (0), in double: squares of what float holds neither overflow nor
// vanish.
template <class A, int Order>
__global__ void __launch_bounds__(kThreads) norm_kernel(const Norm c) {
  constexpr int N = kPer<A>;
  __shared__ double memory[kWarps];
  each_chunk<A>(c.table, c.chunks, [&](const Chunk& chunk, int64_t item) {
    const Place from = c.table.tensor(c.x + chunk.block);
    const Place scale = c.scaled ? c.table.tensor(c.scale + chunk.block) : Place{};
    double sum = 0.0;
    for (int64_t own = (int64_t)threadIdx.x * N; own < chunk.count; own += kThreads * N) {
      const int64_t at = chunk.begin + own, n = chunk.count - own;
      A x[N], f[N];
      load_numbers(from, at, n, x);
      if (c.scaled) load_numbers(scale, at, n, f);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const double v = c.scaled ? (double)x[i] * (double)f[i] : (double)x[i];
        if (Order == 2) sum += v * v;
        if (Order == 1) sum += fabs(v);
        if (Order == 0) sum = larger(sum, fabs(v));
      }
    }
    sum = Order == 0 ? warp_largest(sum) : warp_sum(sum);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) sum = Order == 0 ? larger(sum, memory[w]) : sum + memory[w];
      c.partial[item] = sum;
    }
  });
}

int64_t dots_sums(const BlockDotsArgs& args) { return (int64_t)args.lists * args.partition.count; }
int64_t gram_sums(const GramArgs& args) { return (int64_t)args.lists * args.lists; }

}  // namespace

// ---- host -----------------------------------------------------------------------------------------------------------

int64_t block_dots_cuda_memory(const BlockDotsArgs& args) {
  const int64_t sums = dots_sums(args), lists = args.lists + 1 + (args.partition.ids != nullptr);
  return TableBuilder::words(args.blocks, lists * args.blocks) +
         sums * TableBuilder(args.blocks, args.size, sums).chunks();
}

const char* block_dots_cuda(const BlockDotsArgs& args, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t sums = dots_sums(args);
  if (args.blocks == 0) return nullptr;
  TableBuilder table(args.blocks, args.size, sums);
  Dots c = {};
  c.chunks = table.chunks();
  c.grads = table.add(args.grads, 1);
  c.deltas = table.add(args.deltas, args.lists);
  c.parts = parts_of(args.partition, table);
  c.lists = args.lists;
  auto* words = static_cast<uint64_t*>(memory);
  cudaError_t error = table.upload(args.partition.keys, words, c.table, on);
  c.partial = reinterpret_cast<double*>(words);
  if (error == cudaSuccess)
    error = for_both_types(table, [&](auto number) {
      using A = decltype(number);
      if (c.parts.kind == Parts::one) return launch(dots_kernel<A>, c.chunks, kThreads, on, c);
      const int64_t tiles = (c.parts.count + kPartTile<A> - 1) / kPartTile<A>;
      return launch(part_dots_kernel<A>, c.chunks * c.lists * tiles, kPartThreads, on, c);
    });
  if (error == cudaSuccess)
    error =
        fold({c.partial, c.table.start, c.chunks, args.blocks, sums, args.partition.count, 0, false, args.sums}, on);
  return message_of(error);
}

int64_t gram_cuda_memory(const GramArgs& args) {
  const int64_t sums = gram_sums(args);
  return TableBuilder::words(args.blocks, args.lists * args.blocks) +
         sums * TableBuilder(args.blocks, args.size, sums).chunks();
}

const char* gram_cuda(const GramArgs& args, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t sums = gram_sums(args);
  TableBuilder table(args.blocks, args.size, sums);
  Gram c = {};
  c.chunks = table.chunks();
  c.x = table.add(args.x, args.lists);
  c.lists = args.lists;
  auto* words = static_cast<uint64_t*>(memory);
  cudaError_t error = table.upload(nullptr, words, c.table, on);
  c.partial = reinterpret_cast<double*>(words);
  const auto tiles = [&](int64_t tile) {
    const int64_t side = (c.lists + tile - 1) / tile;
    return c.chunks * side * (side + 1) / 2;
  };
  if (error == cudaSuccess)
    error = for_both_types(table, [&](auto number) {
      using A = decltype(number);
      if constexpr (!kIsWide<A>)
        if (c.lists > 4) return launch(gram_kernel<A, 8>, tiles(8), kThreads, on, c);
      return launch(gram_kernel<A, 4>, tiles(4), kThreads, on, c);
    });
  if (error == cudaSuccess)
    error = fold({c.partial, nullptr, c.chunks, 1, sums, 1, args.lists, false, args.products}, on);
  return message_of(error);
}

int64_t norm_cuda_memory(const NormArgs& args) {
  return TableBuilder::words(args.blocks, (1 + (args.scale != nullptr)) * args.blocks) +
         TableBuilder(args.blocks, args.size, 1).chunks();
}

const char* norm_cuda(const NormArgs& args, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  TableBuilder table(args.blocks, args.size, 1);
  Norm c = {};
  c.chunks = table.chunks();
  c.x = table.add(args.x, 1);
  c.scaled = args.scale != nullptr;
  if (c.scaled) c.scale = table.add(args.scale, 1);
  auto* words = static_cast<uint64_t*>(memory);
  cudaError_t error = table.upload(nullptr, words, c.table, on);
  c.partial = reinterpret_cast<double*>(words);
  if (error == cudaSuccess)
    error = for_both_types(table, [&](auto number) {
      using A = decltype(number);
      if (args.order == 2) return launch(norm_kernel<A, 2>, c.chunks, kThreads, on, c);
      if (args.order == 1) return launch(norm_kernel<A, 1>, c.chunks, kThreads, on, c);
      return launch(norm_kernel<A, 0>, c.chunks, kThreads, on, c);
    });
  if (error == cudaSuccess)
    error = fold({c.partial, c.table.start, c.chunks, args.blocks, 1, 1, 0, args.order == 0, args.sums}, on);
  return message_of(error);
}

}  // namespace transfuse
