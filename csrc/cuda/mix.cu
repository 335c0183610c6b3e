// mix on CUDA (see mix.h); mix.cpp beside it registers the op.
//
// One block takes one segment of one sample: it reads every input that something needs once, 16 bytes at a time where
// everything is aligned, and makes every output and every product from that. Products are float64, one number per
// segment; a second kernel adds the segments in a fixed order. Where a segment ends depends on the shape alone and
// there are no atomics, so the same bits come out every time. A call with many inputs, which only gradients of large
// calls are, reads them once for every output and every product.
#include "device.h"
#include "transfuse/mix.h"

namespace transfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kFill = 2048;     // blocks that keep any GPU busy
constexpr int64_t kMostRounds = 8;  // packs per thread and segment at most
constexpr int kFew = 4;             // inputs of which every product fits in registers
constexpr int kMany = 8;            // inputs that fit in registers

// Outputs of one launch: the table of coefficients is an argument, and those are at most 4 KiB.
__host__ __device__ constexpr int most_outputs(int inputs) { return inputs <= kMany ? 8 : 4; }

// How samples are cut in segments.
struct Segments {
  int64_t batch, count, per_sample, length;
};

Segments segments_of(const MixArgs& args) {
  const int64_t round = kThreads * (kPackBytes / item_size(args.dtype));
  const int64_t rounds = (args.batch * args.count + round * kFill - 1) / (round * kFill);
  const int64_t length = round * (rounds < 1 ? 1 : rounds > kMostRounds ? kMostRounds : rounds);
  return {args.batch, args.count, (args.count + length - 1) / length, length};
}

// Place of the product of inputs a <= b among all of K inputs and the constant 1, which is number K.
__host__ __device__ constexpr int slot_of(int a, int b, int inputs) { return a * (2 * inputs + 1 - a) / 2 + b; }
template <int K>
constexpr int kSlots = slot_of(K, K, K) + 1;

template <int K>
struct Combination {
  Segments segments;
  int inputs, outputs;
  const void* in[K];
  int64_t in_stride[K];
  void* out[most_outputs(K)];
  const double* table;  // in device memory, or nullptr: numbers
  int64_t table_stride;
  double numbers[most_outputs(K) * (K + 1)];  // (outputs, inputs + 1)
  uint32_t products;                          // slots that are wanted
  int products_count;
  double* partials;  // (batch, segments, products_count)
};

// Sum over the threads of a block, in its first thread: a tree of fixed shape. `memory` holds kWarps numbers.
__device__ inline double block_sum(double x, double* memory) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kWarps; ++w) sum += memory[w];
  return sum;
}

template <class M, int K, bool Products>
__global__ void __launch_bounds__(kThreads) combine_kernel(const Combination<K> c) {
  using A = typename Arithmetic<M>::A;
  constexpr int kOutputs = most_outputs(K), P = Pack<M>::kSize;
  __shared__ A factor[kOutputs][K + 1];  // the last is the constant
  __shared__ bool read[K];
  __shared__ double memory[kWarps];
  const Segments& s = c.segments;
  for (int64_t item = blockIdx.x; item < s.batch * s.per_sample; item += gridDim.x) {
    const int64_t sample = item / s.per_sample, begin = item % s.per_sample * s.length;
    const int64_t end = begin + s.length < s.count ? begin + s.length : s.count;
    __syncthreads();
    for (int t = (int)threadIdx.x; t < c.outputs * (K + 1); t += kThreads) {
      const int j = t / (K + 1), k = t % (K + 1), at = j * (c.inputs + 1);
      const double* row = c.table != nullptr ? c.table + sample * c.table_stride + at : c.numbers + at;
      factor[j][k] = k == K ? (A)row[c.inputs] : k < c.inputs ? (A)row[k] : A(0);
    }
    __syncthreads();
    if (threadIdx.x < K) {
      const int k = (int)threadIdx.x;
      bool wanted = false;
      for (int j = 0; j < c.outputs; ++j) wanted = wanted || !(factor[j][k] == A(0));
      if constexpr (Products)
        for (int a = 0; a <= k; ++a)
          for (int b = k; b <= K; ++b)
            if (a == k || b == k) wanted = wanted || (c.products >> slot_of(a, b, K) & 1u) != 0;
      read[k] = wanted && k < c.inputs;
    }
    __syncthreads();
    const M* in[K];
    bool packs = true;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      in[k] = static_cast<const M*>(c.in[k]) + (read[k] ? sample * c.in_stride[k] : 0);
      packs = packs && (!read[k] || pack_aligned(in[k]));
    }
    for (int j = 0; j < c.outputs; ++j) packs = packs && pack_aligned(static_cast<M*>(c.out[j]) + sample * s.count);
    [[maybe_unused]] double sums[Products ? kSlots<K> : 1] = {};

    // One pack of every input that is read, at `at`; Size is that of a whole pack or 1.
    const auto take = [&](auto pack, int64_t at) {
      using Q = decltype(pack);
      Q x[K] = {};
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (read[k]) x[k] = load_pack<Q>(in[k] + at);
      if constexpr (Products) {
#pragma unroll
        for (int i = 0; i < Q::kSize; ++i) {
          double wide[K + 1];
#pragma unroll
          for (int k = 0; k < K; ++k) wide[k] = (double)widen(x[k].v[i]);
          wide[K] = 1.0;
#pragma unroll
          for (int a = 0; a <= K; ++a)
#pragma unroll
            for (int b = a; b <= K; ++b)
              if ((c.products >> slot_of(a, b, K) & 1u) != 0) sums[slot_of(a, b, K)] += wide[a] * wide[b];
        }
      }
      for (int j = 0; j < c.outputs; ++j) {
        A sum[Q::kSize];
#pragma unroll
        for (int i = 0; i < Q::kSize; ++i) sum[i] = factor[j][K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const A f = factor[j][k];
          if (f == A(0)) continue;  // whatever the input holds: it leaves no trace
#pragma unroll
          for (int i = 0; i < Q::kSize; ++i) sum[i] += f * widen(x[k].v[i]);
        }
        Q y;
#pragma unroll
        for (int i = 0; i < Q::kSize; ++i) narrow(sum[i], &y.v[i]);
        *reinterpret_cast<Q*>(static_cast<M*>(c.out[j]) + sample * s.count + at) = y;
      }
    };
    int64_t rest = begin;
    if (packs) {
      rest = end - (end - begin) % P;
      for (int64_t at = begin + (int64_t)threadIdx.x * P; at < rest; at += kThreads * P) take(Pack<M>(), at);
    }
    for (int64_t at = rest + threadIdx.x; at < end; at += kThreads) take(Pack<M, 1>(), at);
    if constexpr (Products) {
      double* to = c.partials + item * c.products_count;
#pragma unroll
      for (int p = 0; p < kSlots<K>; ++p) {
        if ((c.products >> p & 1u) == 0) continue;
        const double sum = block_sum(sums[p], memory);
        if (threadIdx.x == 0) *to = sum;
        ++to;
      }
    }
  }
}

// The same for more inputs than fit in registers.
template <class M>
__global__ void __launch_bounds__(kThreads) combine_many_kernel(const Combination<kMixMaxInputs> c) {
  using A = typename Arithmetic<M>::A;
  __shared__ A factor[most_outputs(kMixMaxInputs)][kMixMaxInputs + 1];
  const Segments& s = c.segments;
  for (int64_t item = blockIdx.x; item < s.batch * s.per_sample; item += gridDim.x) {
    const int64_t sample = item / s.per_sample, begin = item % s.per_sample * s.length;
    const int64_t end = begin + s.length < s.count ? begin + s.length : s.count;
    __syncthreads();
    for (int t = (int)threadIdx.x; t < c.outputs * (c.inputs + 1); t += kThreads)
      factor[t / (c.inputs + 1)][t % (c.inputs + 1)] =
          (A)(c.table != nullptr ? c.table[sample * c.table_stride + t] : c.numbers[t]);
    __syncthreads();
    for (int j = 0; j < c.outputs; ++j)
      for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
        A sum = factor[j][c.inputs];
        for (int k = 0; k < c.inputs; ++k)
          if (!(factor[j][k] == A(0)))
            sum += factor[j][k] * widen(static_cast<const M*>(c.in[k])[sample * c.in_stride[k] + at]);
        narrow(sum, static_cast<M*>(c.out[j]) + sample * s.count + at);
      }
  }
}

struct Pairs {
  Segments segments;
  int inputs, count;
  const void* in[kMixMaxInputs];
  int64_t in_stride[kMixMaxInputs];
  uint8_t pair[kMixMaxPairs][2];
  double* partials;  // (batch, segments, count)
};

// Any products: one block for each segment and pair.
template <class M>
__global__ void __launch_bounds__(kThreads) products_kernel(const Pairs g) {
  __shared__ double memory[kWarps];
  const Segments& s = g.segments;
  for (int64_t item = blockIdx.x; item < s.batch * s.per_sample * g.count; item += gridDim.x) {
    const int p = (int)(item % g.count);
    const int64_t sample = item / g.count / s.per_sample, begin = item / g.count % s.per_sample * s.length;
    const int64_t end = begin + s.length < s.count ? begin + s.length : s.count;
    const M* in[2];
    for (int side = 0; side < 2; ++side) {
      const int k = g.pair[p][side];
      in[side] = k == g.inputs ? nullptr : static_cast<const M*>(g.in[k]) + sample * g.in_stride[k];
    }
    double sum = 0.0;
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      const double x = in[0] == nullptr ? 1.0 : (double)widen(in[0][at]);
      sum += x * (in[1] == nullptr ? 1.0 : (double)widen(in[1][at]));
    }
    sum = block_sum(sum, memory);
    if (threadIdx.x == 0) g.partials[item] = sum;
  }
}

struct Reduction {
  int64_t batch, segments;
  int pairs, partials_count;
  uint8_t slot[kMixMaxPairs];  // of the partial sums, by pair
  const double* partials;      // (batch, segments, partials_count)
  double* products;            // (batch, pairs)
};

__global__ void __launch_bounds__(kThreads) reduce_kernel(const Reduction r) {
  __shared__ double memory[kWarps];
  for (int64_t item = blockIdx.x; item < r.batch * r.pairs; item += gridDim.x) {
    const double* from = r.partials + item / r.pairs * r.segments * r.partials_count + r.slot[item % r.pairs];
    double sum = 0.0;
    for (int64_t at = threadIdx.x; at < r.segments; at += kThreads) sum += from[at * r.partials_count];
    sum = block_sum(sum, memory);
    if (threadIdx.x == 0) r.products[item] = sum;
  }
}

// ---- host ---------------------------------------------------------------------------------------------------------

// Launches the outputs from `first` on, as many as one launch takes, for the samples [sample, sample + samples).
template <class M, int K>
cudaError_t launch_outputs(const MixArgs& args, bool numbers, int64_t sample, int64_t samples, int first,
                           uint32_t products, int products_count, double* partials, cudaStream_t stream) {
  Combination<K> c = {};
  c.segments = segments_of(args);
  c.segments.batch = samples;
  c.inputs = args.inputs;
  c.outputs = args.outputs - first < most_outputs(K) ? args.outputs - first : most_outputs(K);
  const int64_t item = (int64_t)sizeof(M);
  for (int k = 0; k < args.inputs; ++k) {
    c.in[k] = static_cast<const char*>(args.in[k]) + sample * args.in_stride[k] * item;
    c.in_stride[k] = args.in_stride[k];
  }
  for (int j = 0; j < c.outputs; ++j) c.out[j] = static_cast<char*>(args.out[first + j]) + sample * args.count * item;
  if (c.outputs > 0) {
    const double* row = args.coefficients + sample * args.coefficient_stride + (int64_t)first * (args.inputs + 1);
    if (!numbers) c.table = row;
    if (numbers)
      for (int i = 0; i < c.outputs * (args.inputs + 1); ++i) c.numbers[i] = row[i];
  }
  c.table_stride = args.coefficient_stride;
  c.products = products;
  c.products_count = products_count;
  c.partials = partials + sample * c.segments.per_sample * products_count;
  const int64_t blocks = samples * c.segments.per_sample;
  if constexpr (K > kMany)
    return launch(combine_many_kernel<M>, blocks, kThreads, stream, c);
  else if constexpr (K > kFew)
    return launch(combine_kernel<M, K, false>, blocks, kThreads, stream, c);
  else if (products != 0)
    return launch(combine_kernel<M, K, true>, blocks, kThreads, stream, c);
  else
    return launch(combine_kernel<M, K, false>, blocks, kThreads, stream, c);
}

template <class M, int K>
cudaError_t launch_combinations(const MixArgs& args, bool numbers, double* partials, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const Segments s = segments_of(args);
  Reduction r = {};
  r.batch = s.batch;
  r.segments = s.per_sample;
  r.pairs = args.pairs;
  r.partials = partials;
  r.products = args.products;
  uint32_t products = 0;
  if (args.pairs > 0 && K > kFew) {
    Pairs g = {};
    g.segments = s;
    g.inputs = args.inputs;
    g.count = args.pairs;
    for (int k = 0; k < args.inputs; ++k) {
      g.in[k] = args.in[k];
      g.in_stride[k] = args.in_stride[k];
    }
    for (int p = 0; p < args.pairs; ++p) {
      for (int side = 0; side < 2; ++side) g.pair[p][side] = (uint8_t)args.pair[p][side];
      r.slot[p] = (uint8_t)p;
    }
    g.partials = partials;
    r.partials_count = args.pairs;
    error = launch(products_kernel<M>, s.batch * s.per_sample * args.pairs, kThreads, stream, g);
  } else if (args.pairs > 0) {
    int slot[kMixMaxPairs] = {};
    for (int p = 0; p < args.pairs; ++p) {
      // The constant 1 is number K here.
      const int a = args.pair[p][0] == args.inputs ? K : args.pair[p][0];
      const int b = args.pair[p][1] == args.inputs ? K : args.pair[p][1];
      slot[p] = slot_of(a < b ? a : b, a < b ? b : a, K);
      products |= 1u << slot[p];
    }
    for (uint32_t rest = products; rest != 0; rest &= rest - 1) ++r.partials_count;
    for (int p = 0; p < args.pairs; ++p)
      for (uint32_t below = products & ((1u << slot[p]) - 1u); below != 0; below &= below - 1) ++r.slot[p];
  }
  // Numbers of each sample's own go with one launch for each sample.
  const int64_t samples = numbers && args.coefficient_stride != 0 ? 1 : args.batch;
  for (int64_t sample = 0; sample < args.batch; sample += samples) {
    for (int first = 0; error == cudaSuccess && (first < args.outputs || (first == 0 && products != 0));
         first += most_outputs(K))
      error = launch_outputs<M, K>(args, numbers, sample, samples, first, first == 0 ? products : 0, r.partials_count,
                                   partials, stream);
  }
  if (error == cudaSuccess && args.pairs > 0) error = launch(reduce_kernel, r.batch * r.pairs, kThreads, stream, r);
  return error;
}

template <class M>
cudaError_t launch_inputs(const MixArgs& args, bool numbers, double* partials, cudaStream_t stream) {
  if (args.inputs <= 2) return launch_combinations<M, 2>(args, numbers, partials, stream);
  if (args.inputs <= kFew) return launch_combinations<M, kFew>(args, numbers, partials, stream);
  if (args.inputs <= kMany) return launch_combinations<M, kMany>(args, numbers, partials, stream);
  return launch_combinations<M, kMixMaxInputs>(args, numbers, partials, stream);
}

}  // namespace

int64_t mix_cuda_partials(const MixArgs& args) {
  if (args.batch == 0 || args.count == 0) return 0;
  return args.batch * segments_of(args).per_sample * args.pairs;
}

const char* mix_cuda(const MixArgs& args, bool numbers, double* partials, void* stream) {
  if (args.batch == 0 || args.count == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  return message_of(with_storage(
      args.dtype, [&](auto number) { return launch_inputs<decltype(number)>(args, numbers, partials, on); }));
}

}  // namespace transfuse
