// Weighted sums and means of lists of tensors, and steps in place, on CUDA (see multitensor.h, multitensor_table.h).
//
// A thread block takes a chunk of one tensor of every list and a thread 32 bytes of it at a time, four lists in flight
// at once: everything is read once, 16 bytes at a time where it is aligned, and written once.
#include "multitensor_table.h"

namespace transfuse {
namespace {

using namespace lists;

// ---- weighted sums --------------------------------------------------------------------------------------------------

template <class A>
constexpr int kTogether = kIsWide<A> ? 2 : 4;  // lists whose elements are on their way at once

struct Lincomb {
  Table table;
  int64_t chunks, base, deltas, out;  // numbers of the first tensors
  bool has_base;
  int lists;
  PartsOf parts;
  const double* coefficients;  // (lists, blocks, parts)
};

template <class A, bool Parted>
__global__ void __launch_bounds__(kThreads) lincomb_kernel(const Lincomb c) {
  constexpr int N = kPer<A>, G = kTogether<A>;
  each_chunk<A>(c.table, c.chunks, [&](const Chunk& chunk, int64_t) {
    const int64_t block = chunk.block, blocks = c.table.blocks;
    for (int64_t own = (int64_t)threadIdx.x * N; own < chunk.count; own += kThreads * N) {
      const int64_t at = chunk.begin + own, n = chunk.count - own;
      A sum[N] = {};
      if (c.has_base) load_numbers(c.table.tensor(c.base + block), at, n, sum);
      [[maybe_unused]] int part[Parted ? N : 1];
      if constexpr (Parted) read_parts(c.table, c.parts, block, at, n, part);
      for (int first = 0; first < c.lists; first += G) {
        Awaited<A, N> awaited[G];
#pragma unroll
        for (int g = 0; g < G; ++g) {
          if (first + g >= c.lists) continue;
          awaited[g].load(c.table.tensor(c.deltas + (first + g) * blocks + block), at, n);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
          if (first + g >= c.lists) continue;
          A x[N];
          awaited[g].get(x);
          const double* factor = c.coefficients + ((first + g) * blocks + block) * c.parts.count;
          if constexpr (Parted) {
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i] += (part[i] < c.parts.count ? (A)factor[part[i]] : A(0)) * x[i];
          } else {
            const A f = (A)factor[0];
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i] += f * x[i];
          }
        }
      }
      store_numbers(c.table.tensor(c.out + block), at, n, sum);
    }
  });
}

// ---- weighted means -------------------------------------------------------------------------------------------------

constexpr int kFewModels = 4;  // that stay in registers for all settings

struct Ratio {
  Table table;
  int64_t chunks, thetas, weights, out;
  int models, settings;
  const double* coefficients;  // (settings, models)
  const double* floors;        // (models)
  double* refused;             // (chunks)
};

// How many of n weights are negative or not finite.
template <class A, int N>
__device__ inline int refused_of(const A (&f)[N], int64_t n) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) count += i < n && !(f[i] >= A(0) && f[i] - f[i] == A(0));
  return count;
}

template <class A, bool Few>
__global__ void __launch_bounds__(kThreads) ratio_kernel(const Ratio c) {
  constexpr int N = 16 / (int)sizeof(A), K = Few ? kFewModels : 1;
  __shared__ double memory[kWarps];
  each_chunk<A>(c.table, c.chunks, [&](const Chunk& chunk, int64_t item) {
    const int64_t block = chunk.block, blocks = c.table.blocks;
    double refused = 0.0;
    for (int64_t own = (int64_t)threadIdx.x * N; own < chunk.count; own += kThreads * N) {
      const int64_t at = chunk.begin + own, n = chunk.count - own;
      A x[K][N], f[K][N], target[N];
      // Brings model k into place p.
      const auto read = [&](int k, int p, bool count) {
        load_numbers(c.table.tensor(c.weights + k * blocks + block), at, n, f[p]);
        if (count) refused += refused_of(f[p], n);
        const A floor = (A)c.floors[k];
#pragma unroll
        for (int i = 0; i < N; ++i) f[p][i] = f[p][i] < floor ? floor : f[p][i];
        load_numbers(c.table.tensor(c.thetas + k * blocks + block), at, n, x[p]);
      };
      if constexpr (Few) {
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (k < c.models) read(k, k, true);
      } else {
        for (int k = 0; k < c.models; ++k) {
          load_numbers(c.table.tensor(c.weights + k * blocks + block), at, n, f[0]);
          refused += refused_of(f[0], n);
        }
      }
      load_numbers(c.table.tensor(c.thetas + block), at, n, target);
      for (int s = 0; s < c.settings; ++s) {
        const double* w = c.coefficients + (int64_t)s * c.models;
        A above[N] = {}, below[N] = {};
        const auto take = [&](int k, int p) {
          const A factor = (A)w[k];
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const A own_factor = factor * f[p][i];
            below[i] += own_factor;
            above[i] += own_factor * x[p][i];
          }
        };
        // A model of coefficient 0 leaves no trace.
        if constexpr (Few) {
#pragma unroll
          for (int k = 0; k < K; ++k)
            if (k < c.models && w[k] != 0.0) take(k, k);
        } else {
          for (int k = 0; k < c.models; ++k) {
            if (w[k] == 0.0) continue;
            read(k, 0, false);
            take(k, 0);
          }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) above[i] = below[i] > A(0) ? above[i] / below[i] : target[i];
        store_numbers(c.table.tensor(c.out + s * blocks + block), at, n, above);
      }
    }
    refused = warp_sum(refused);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = refused;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) refused += memory[w];
      c.refused[item] = refused;
    }
  });
}

__global__ void __launch_bounds__(kThreads) count_kernel(const double* counts, int64_t chunks, int64_t* total) {
  __shared__ double memory[kWarps];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += counts[i];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) sum += memory[w];
  *total = (int64_t)sum;
}

// ---- in place -------------------------------------------------------------------------------------------------------

struct Perturb {
  Table table;
  int64_t chunks, x, grads, backup;
  const double* factor;
  bool adaptive;
};

template <class A>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const Perturb c) {
  constexpr int N = kPer<A>;
  const A factor = (A)*c.factor;
  each_chunk<A>(c.table, c.chunks, [&](const Chunk& chunk, int64_t) {
    const Place to = c.table.tensor(c.x + chunk.block), kept = c.table.tensor(c.backup + chunk.block);
    const Place grad = c.table.tensor(c.grads + chunk.block);
    for (int64_t own = (int64_t)threadIdx.x * N; own < chunk.count; own += kThreads * N) {
      const int64_t at = chunk.begin + own, n = chunk.count - own;
      A x[N], g[N];
      with_stored<A, N>(to.dtype, [&](auto room) {
        load_packs<N>(to, at, n, room.packs);
        load_numbers(grad, at, n, g);
        store_packs<N>(kept, at, n, room.packs);
        widen_packs(room.packs, x);
      });
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] += factor * (c.adaptive ? x[i] * x[i] * g[i] : g[i]);
      store_numbers(to, at, n, x);
    }
  });
}

struct Copy {
  Table table;  // sizes count bytes
  int64_t chunks, to, from;
};

__global__ void __launch_bounds__(kThreads) copy_kernel(const Copy c) {
  constexpr int N = 2 * kPackBytes;
  using P = Pack<uint8_t, kPackBytes>;
  each_chunk<float>(c.table, c.chunks, [&](const Chunk& chunk, int64_t) {
    const Place to = c.table.tensor(c.to + chunk.block), from = c.table.tensor(c.from + chunk.block);
    for (int64_t own = (int64_t)threadIdx.x * N; own < chunk.count; own += kThreads * N) {
      P packs[2];
      load_packs<N>(from, chunk.begin + own, chunk.count - own, packs);
      store_packs<N>(to, chunk.begin + own, chunk.count - own, packs);
    }
  });
}

// ---- host -----------------------------------------------------------------------------------------------------------

std::vector<int64_t> bytes_of(const CopyArgs& args) {
  std::vector<int64_t> bytes((size_t)args.blocks);
  for (int64_t j = 0; j < args.blocks; ++j) bytes[(size_t)j] = args.size[j] * item_size(args.to[j].dtype);
  return bytes;
}

}  // namespace

int64_t lincomb_cuda_memory(const LincombArgs& args) {
  const int64_t lists = args.lists + 1 + (args.base != nullptr) + (args.partition.ids != nullptr);
  return TableBuilder::words(args.blocks, lists * args.blocks);
}

const char* lincomb_cuda(const LincombArgs& args, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  TableBuilder table(args.blocks, args.size, 1);
  if (table.chunks() == 0) return nullptr;
  Lincomb c = {};
  c.chunks = table.chunks();
  c.has_base = args.base != nullptr;
  if (c.has_base) c.base = table.add(args.base, 1);
  c.deltas = table.add(args.deltas, args.lists);
  c.out = table.add(args.out, 1);
  c.parts = parts_of(args.partition, table);
  c.lists = args.lists;
  c.coefficients = args.coefficients;
  auto* words = static_cast<uint64_t*>(memory);
  const cudaError_t error = table.upload(args.partition.keys, words, c.table, on);
  if (error != cudaSuccess) return message_of(error);
  return message_of(for_both_types(table, [&](auto number) {
    using A = decltype(number);
    return c.parts.kind == Parts::one ? launch(lincomb_kernel<A, false>, c.chunks, kThreads, on, c)
                                      : launch(lincomb_kernel<A, true>, c.chunks, kThreads, on, c);
  }));
}

int64_t ratio_cuda_memory(const RatioArgs& args) {
  const int64_t chunks = TableBuilder(args.blocks, args.size, 1).chunks();
  return TableBuilder::words(args.blocks, (2 * args.models + args.settings) * args.blocks) + chunks + args.models;
}

const char* ratio_cuda(const RatioArgs& args, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  TableBuilder table(args.blocks, args.size, 1);
  Ratio c = {};
  c.chunks = table.chunks();
  c.thetas = table.add(args.thetas, args.models);
  c.weights = table.add(args.weights, args.models);
  c.out = table.add(args.out, args.settings);
  c.models = args.models;
  c.settings = args.settings;
  c.coefficients = args.coefficients;
  auto* words = static_cast<uint64_t*>(memory);
  cudaError_t error = table.upload(nullptr, words, c.table, on);
  std::vector<uint64_t> floors((size_t)args.models);
  std::memcpy(floors.data(), args.floors, floors.size() * 8);
  if (error == cudaSuccess) error = upload_words(words, floors.data(), floors.size(), on);
  c.floors = reinterpret_cast<const double*>(words);
  c.refused = reinterpret_cast<double*>(words + args.models);
  if (error == cudaSuccess)
    error = for_both_types(table, [&](auto number) {
      using A = decltype(number);
      return c.models <= kFewModels ? launch(ratio_kernel<A, true>, c.chunks, kThreads, on, c)
                                    : launch(ratio_kernel<A, false>, c.chunks, kThreads, on, c);
    });
  if (error == cudaSuccess)
    error = launch(count_kernel, 1, kThreads, on, (const double*)c.refused, c.chunks, args.refused);
  return message_of(error);
}

int64_t perturb_cuda_memory(const PerturbArgs& args) { return TableBuilder::words(args.blocks, 3 * args.blocks); }

const char* perturb_cuda(const PerturbArgs& args, const double* factor, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  TableBuilder table(args.blocks, args.size, 1);
  if (table.chunks() == 0) return nullptr;
  Perturb c = {};
  c.chunks = table.chunks();
  c.x = table.add(args.x, 1);
  c.grads = table.add(args.grads, 1);
  c.backup = table.add(args.backup, 1);
  c.factor = factor;
  c.adaptive = args.adaptive;
  auto* words = static_cast<uint64_t*>(memory);
  const cudaError_t error = table.upload(nullptr, words, c.table, on);
  if (error != cudaSuccess) return message_of(error);
  return message_of(for_both_types(
      table, [&](auto number) { return launch(perturb_kernel<decltype(number)>, c.chunks, kThreads, on, c); }));
}

int64_t copy_cuda_memory(const CopyArgs& args) { return TableBuilder::words(args.blocks, 2 * args.blocks); }

const char* copy_cuda(const CopyArgs& args, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const std::vector<int64_t> bytes = bytes_of(args);
  TableBuilder table(args.blocks, bytes.data(), 1);
  if (table.chunks() == 0) return nullptr;
  Copy c = {};
  c.chunks = table.chunks();
  c.to = table.add(args.to, 1, false);
  c.from = table.add(args.from, 1, false);
  auto* words = static_cast<uint64_t*>(memory);
  cudaError_t error = table.upload(nullptr, words, c.table, on);
  if (error == cudaSuccess) error = launch(copy_kernel, c.chunks, kThreads, on, c);
  return message_of(error);
}

}  // namespace transfuse
