// mix on the CPU, at one ISA level (see mix.h): a chunk of every input is brought into the first-level cache, then
// every output and every product is made from it.
//
// Samples are cut in segments at places that depend on the shape alone, and partial products are added in the order of
// the segments, so results do not depend on the number of threads. Products of float32 numbers are exact in float64 and
// are summed there: cosines near 1 and deviations of shifted data keep their digits.
#include "transfuse/mix.h"

#include <algorithm>
#include <vector>

#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kChunk = 1024;         // elements per chunk
constexpr int64_t kSegment = 16384;      // elements per task at most
constexpr int64_t kSerial = 16384;       // elements in all below which waking other threads does not pay
constexpr int64_t kStreaming = 4 << 20;  // bytes of an output above which it bypasses the cache
constexpr int kFused = 6;                // inputs added in one sweep

template <class T>
constexpr DType kDirect = sizeof(T) == 8 ? DType::f64 : DType::f32;

// ---- combinations ----------------------------------------------------------------------------------------------

template <class V, class T>
TRANSFUSE_INLINE void store_past_cache(T* p, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}

TRANSFUSE_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// dst = offset + sum_k factor[k] p[k] (+ dst itself, if `more`).
template <class T, int K>
void combine_fixed(const T* const* p, const T* factor, T offset, int64_t n, T* dst, bool more, bool stream) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  const auto value = [&](int64_t i) {
    T v = more ? dst[i] : offset;
    for (int k = 0; k < K; ++k) v += factor[k] * p[k][i];
    return v;
  };
  V f[K > 0 ? K : 1];
  for (int k = 0; k < K; ++k) f[k] = splat<T>(factor[k]);
  const auto vector = [&](int64_t i) {
    V v = more ? load<V>(dst + i) : splat<T>(offset);
    for (int k = 0; k < K; ++k) v += f[k] * load<V>(p[k] + i);
    return v;
  };
  int64_t i = 0;
  if (stream) {
    for (; i < n && reinterpret_cast<uintptr_t>(dst + i) % sizeof(V) != 0; ++i) dst[i] = value(i);
    for (; i + W <= n; i += W) store_past_cache(dst + i, vector(i));
  }
  for (; i + W <= n; i += W) store(dst + i, vector(i));
  for (; i < n; ++i) dst[i] = value(i);
}

template <class T>
void combine(int count, const T* const* p, const T* factor, T offset, int64_t n, T* dst, bool stream) {
  bool more = false;
  do {
    const int now = std::min(count, kFused);
    const bool last = now == count;
    switch (now) {
      case 0: combine_fixed<T, 0>(p, factor, offset, n, dst, more, stream); break;
      case 1: combine_fixed<T, 1>(p, factor, offset, n, dst, more, stream && last); break;
      case 2: combine_fixed<T, 2>(p, factor, offset, n, dst, more, stream && last); break;
      case 3: combine_fixed<T, 3>(p, factor, offset, n, dst, more, stream && last); break;
      case 4: combine_fixed<T, 4>(p, factor, offset, n, dst, more, stream && last); break;
      case 5: combine_fixed<T, 5>(p, factor, offset, n, dst, more, stream && last); break;
      default: combine_fixed<T, 6>(p, factor, offset, n, dst, more, stream && last); break;
    }
    p += now;
    factor += now;
    count -= now;
    more = true;
  } while (count > 0);
}

// ---- products --------------------------------------------------------------------------------------------------

typedef float HalfF __attribute__((vector_size(kVectorBytes / 2)));

TRANSFUSE_INLINE VecD wide(const float* p) { return __builtin_convertvector(load<HalfF>(p), VecD); }
TRANSFUSE_INLINE VecD wide(const double* p) { return load<VecD>(p); }

// Sum of a b, of a a where b is a, of a alone where b is null. Four accumulators in a fixed order.
template <int Kind, class T>
double product_of(const T* a, const T* b, int64_t n) {
  constexpr int W = Simd<double>::W, U = 4;
  VecD sum[U] = {};
  const auto term = [&](int64_t i) {
    const VecD x = wide(a + i);
    if constexpr (Kind == 0) return x * wide(b + i);
    if constexpr (Kind == 1) return x * x;
    return x;
  };
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W)
    for (int u = 0; u < U; ++u) sum[u] += term(i + u * W);
  for (; i + W <= n; i += W) sum[0] += term(i);
  double rest = 0.0;
  for (; i < n; ++i) rest += Kind == 0 ? (double)a[i] * (double)b[i] : Kind == 1 ? (double)a[i] * (double)a[i] : a[i];
  return horizontal_sum<double>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

template <class T>
double product(const MixArgs& args, const T* const* p, int pair, int64_t n) {
  const int first = args.pair[pair][0], second = args.pair[pair][1], ones = args.inputs;
  if (first == ones && second == ones) return (double)n;
  if (second == ones) return product_of<2>(p[first], p[first], n);
  if (first == ones) return product_of<2>(p[second], p[second], n);
  return first == second ? product_of<1>(p[first], p[first], n) : product_of<0>(p[first], p[second], n);
}

// ---- one segment -----------------------------------------------------------------------------------------------

template <class T>
void run_segment(const MixArgs& args, int64_t sample, int64_t begin, int64_t end, double* products) {
  const bool direct = args.dtype == kDirect<T>;
  const int64_t item = item_size(args.dtype);
  const bool stream = direct && args.batch * args.count * item >= kStreaming;
  T* buffer = direct ? nullptr : static_cast<T*>(thread_scratch(sizeof(T) * (size_t)((args.inputs + 1) * kChunk)));
  // Which inputs any result of this sample needs, and each output's nonzero coefficients.
  bool used[kMixMaxInputs + 1] = {false};
  for (int p = 0; p < args.pairs; ++p) used[args.pair[p][0]] = used[args.pair[p][1]] = true;
  struct Row {
    int count = 0, at[kMixMaxInputs];
    T factor[kMixMaxInputs], offset = T(0);
  };
  std::vector<Row> rows((size_t)args.outputs);
  for (int j = 0; j < args.outputs; ++j) {
    const double* c = args.coefficients + sample * args.coefficient_stride + (int64_t)j * (args.inputs + 1);
    Row& row = rows[(size_t)j];
    for (int k = 0; k < args.inputs; ++k) {
      if (c[k] == 0.0) continue;
      row.at[row.count] = k;
      row.factor[row.count++] = (T)c[k];
      used[k] = true;
    }
    row.offset = (T)c[args.inputs];
  }
  for (int p = 0; p < args.pairs; ++p) products[p] = 0.0;
  const T* in[kMixMaxInputs + 1] = {nullptr};
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t n = std::min(kChunk, end - at);
    for (int k = 0; k < args.inputs; ++k) {
      if (!used[k]) continue;
      const int64_t offset = sample * args.in_stride[k] + at;
      if (direct) {
        in[k] = static_cast<const T*>(args.in[k]) + offset;
      } else {
        load_row(args.in[k], args.dtype, offset, 1, n, buffer + k * kChunk);
        in[k] = buffer + k * kChunk;
      }
    }
    // Products first: they bring the chunk into the cache, and a stream past the cache follows.
    for (int p = 0; p < args.pairs; ++p) products[p] += product(args, in, p, n);
    for (int j = 0; j < args.outputs; ++j) {
      const Row& row = rows[(size_t)j];
      const T* p[kMixMaxInputs];
      for (int k = 0; k < row.count; ++k) p[k] = in[row.at[k]];
      const int64_t offset = sample * args.count + at;
      if (direct) {
        combine(row.count, p, row.factor, row.offset, n, static_cast<T*>(args.out[j]) + offset, stream);
      } else {
        T* result = buffer + args.inputs * kChunk;
        combine(row.count, p, row.factor, row.offset, n, result, false);
        store_row(args.out[j], args.dtype, offset, 1, n, result);
      }
    }
  }
  if (stream) finish_streaming();
}

template <class T>
void run_typed(const MixArgs& args, const Parallel& parallel) {
  const int64_t segments = std::max<int64_t>(1, (args.count + kSegment - 1) / kSegment);
  // Small samples share a task.
  const int64_t grain = std::max<int64_t>(1, kSegment / std::max<int64_t>(1, args.count));
  const int64_t total = args.batch * segments, tasks = (total + grain - 1) / grain;
  std::vector<double> partial((size_t)(segments > 1 ? total * args.pairs : 0));
  double* sums = segments > 1 ? partial.data() : args.products;
  const Parallel serial = serial_parallel();
  for_each_task(args.batch * args.count < kSerial ? serial : parallel, tasks, [&](int64_t task) {
    const int64_t last = std::min(total, (task + 1) * grain);
    for (int64_t i = task * grain; i < last; ++i) {
      const int64_t begin = i % segments * kSegment;
      double none;
      run_segment<T>(args, i / segments, begin, std::min(args.count, begin + kSegment),
                     args.pairs > 0 ? sums + i * args.pairs : &none);
    }
  });
  if (segments == 1) return;
  for (int64_t b = 0; b < args.batch; ++b)
    for (int p = 0; p < args.pairs; ++p) {
      double sum = 0.0;
      for (int64_t s = 0; s < segments; ++s) sum += partial[(size_t)((b * segments + s) * args.pairs + p)];
      args.products[b * args.pairs + p] = sum;
    }
}

void mix_run(const MixArgs& args, const Parallel& parallel) {
  if (args.dtype == DType::f64)
    run_typed<double>(args, parallel);
  else
    run_typed<float>(args, parallel);
}

}  // namespace

extern const MixKernels kMix;
const MixKernels kMix = {mix_run};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
