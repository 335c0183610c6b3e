// mix on the CPU, at one ISA level (see mix.h): a chunk of every input is brought into the first-level cache, then
// every output and every product is made from it.
//
// Samples are cut in segments at places that depend on the shape alone, and partial products are added in the order of
// the segments, so results do not depend on the number of threads. Products of float32 numbers are exact in float64 and
// are summed there: cosines near 1 and deviations of shifted data keep their digits.
#include "transfuse/mix.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "storage.h"
#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kChunk = 1024;         // elements per chunk
constexpr int64_t kSegment = 16384;      // elements per task at most
constexpr int64_t kSerial = 16384;       // elements in all below which waking other threads does not pay
constexpr int64_t kStreaming = 4 << 20;  // bytes of an output above which it bypasses the cache

// ---- combinations ----------------------------------------------------------------------------------------------

// dst = offset + sum_k factor[k] p[k].
template <class S, int K>
void combine_fixed(const S* const* p, const Arithmetic<S>* factor, Arithmetic<S> offset, int64_t n, S* dst,
                   bool stream) {
  using T = Arithmetic<S>;
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  const auto single = [&](int64_t i) {
    T v = offset;
    for (int k = 0; k < K; ++k) v += factor[k] * read_one(p[k] + i);
    write_one(dst + i, v);
  };
  V f[K > 0 ? K : 1];
  for (int k = 0; k < K; ++k) f[k] = splat<T>(factor[k]);
  const auto vector = [&](int64_t i) {
    V v = splat<T>(offset);
    for (int k = 0; k < K; ++k) v += f[k] * read(p[k] + i);
    return stored(dst, v);
  };
  int64_t i = 0;
  if (stream) {
    constexpr uintptr_t kAlign = sizeof(vector(0));
    for (; i < n && reinterpret_cast<uintptr_t>(dst + i) % kAlign != 0; ++i) single(i);
    for (; i + W <= n; i += W) store_past_cache(dst + i, vector(i));
  }
  for (; i + W <= n; i += W) {
    const auto v = vector(i);
    std::memcpy(dst + i, &v, sizeof v);
  }
  for (; i < n; ++i) single(i);
}

// The same for many inputs, summed in the arithmetic type.
template <class S>
void combine_many(int count, const S* const* p, const Arithmetic<S>* factor, Arithmetic<S> offset, int64_t n, S* dst) {
  using T = Arithmetic<S>;
  T sum[kChunk];
  for (int64_t i = 0; i < n; ++i) sum[i] = offset;
  for (int k = 0; k < count; ++k)
    for (int64_t i = 0; i < n; ++i) sum[i] += factor[k] * read_one(p[k] + i);
  for (int64_t i = 0; i < n; ++i) write_one(dst + i, sum[i]);
}

template <class S>
void combine(int count, const S* const* p, const Arithmetic<S>* factor, Arithmetic<S> offset, int64_t n, S* dst,
             bool stream) {
  switch (count) {
    case 0: combine_fixed<S, 0>(p, factor, offset, n, dst, stream); return;
    case 1: combine_fixed<S, 1>(p, factor, offset, n, dst, stream); return;
    case 2: combine_fixed<S, 2>(p, factor, offset, n, dst, stream); return;
    case 3: combine_fixed<S, 3>(p, factor, offset, n, dst, stream); return;
    case 4: combine_fixed<S, 4>(p, factor, offset, n, dst, stream); return;
    case 5: combine_fixed<S, 5>(p, factor, offset, n, dst, stream); return;
    case 6: combine_fixed<S, 6>(p, factor, offset, n, dst, stream); return;
    default: combine_many<S>(count, p, factor, offset, n, dst); return;
  }
}

// ---- products --------------------------------------------------------------------------------------------------

// Up to five sums over two rows: a a, a b, b b, a, b. Sums are added in a fixed order.
template <class S, bool Squares, bool Cross, bool Ones>
void sums_of(const S* a, const S* b, int64_t n, double* out) {
  constexpr int W = Simd<Arithmetic<S>>::W;
  VecD aa[2] = {}, ab[2] = {}, bb[2] = {}, la[2] = {}, lb[2] = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Wide x = widen_vector(read(a + i)), y = widen_vector(read(b + i));
    for (int h = 0; h < 2; ++h) {
      if constexpr (Squares) {
        aa[h] += x.part[h] * x.part[h];
        bb[h] += y.part[h] * y.part[h];
      }
      if constexpr (Cross) ab[h] += x.part[h] * y.part[h];
      if constexpr (Ones) {
        la[h] += x.part[h];
        lb[h] += y.part[h];
      }
    }
  }
  const auto fold = [](const VecD* v) { return horizontal_sum<double>(v[0] + v[1]); };
  out[0] = fold(aa), out[1] = fold(ab), out[2] = fold(bb), out[3] = fold(la), out[4] = fold(lb);
  for (; i < n; ++i) {
    const double x = (double)read_one(a + i), y = (double)read_one(b + i);
    if constexpr (Squares) out[0] += x * x, out[2] += y * y;
    if constexpr (Cross) out[1] += x * y;
    if constexpr (Ones) out[3] += x, out[4] += y;
  }
}

// Products of a chunk, added to the sums. The moments of two inputs, which guidance asks for, are one sweep.
template <class S>
void products_of(const MixArgs& args, const S* const* in, int64_t n, double* sums) {
  const int ones = args.inputs;
  double found[5];
  const auto is = [&](int p, int first, int second) {
    return p < args.pairs && args.pair[p][0] == first && args.pair[p][1] == second;
  };
  int p = 0;
  if (args.inputs >= 2 && is(0, 0, 0) && is(1, 0, 1) && is(2, 1, 1)) {
    const bool linear = is(3, 0, ones) && is(4, 1, ones);
    if (linear)
      sums_of<S, true, true, true>(in[0], in[1], n, found);
    else
      sums_of<S, true, true, false>(in[0], in[1], n, found);
    for (; p < (linear ? 5 : 3); ++p) sums[p] += found[p];
  }
  for (; p < args.pairs; ++p) {
    const int first = args.pair[p][0], second = args.pair[p][1];
    if (first == ones && second == ones) {
      sums[p] += (double)n;
    } else if (first == ones || second == ones) {
      const S* row = in[first == ones ? second : first];
      sums_of<S, false, false, true>(row, row, n, found);
      sums[p] += found[3];
    } else {
      sums_of<S, false, true, false>(in[first], in[second], n, found);
      sums[p] += found[1];
    }
  }
}

// ---- one segment -----------------------------------------------------------------------------------------------

template <class S>
void run_segment(const MixArgs& args, int64_t sample, int64_t begin, int64_t end, double* products) {
  using T = Arithmetic<S>;
  const bool stream = args.batch * args.count * (int64_t)sizeof(S) >= kStreaming;
  struct Row {
    int count = 0, at[kMixMaxInputs];
    T factor[kMixMaxInputs], offset = T(0);
  };
  // Each output's nonzero coefficients.
  std::vector<Row> rows((size_t)args.outputs);
  for (int j = 0; j < args.outputs; ++j) {
    const double* c = args.coefficients + sample * args.coefficient_stride + (int64_t)j * (args.inputs + 1);
    Row& row = rows[(size_t)j];
    for (int k = 0; k < args.inputs; ++k) {
      if (c[k] == 0.0) continue;
      row.at[row.count] = k;
      row.factor[row.count++] = (T)c[k];
    }
    row.offset = (T)c[args.inputs];
  }
  for (int p = 0; p < args.pairs; ++p) products[p] = 0.0;
  const S* in[kMixMaxInputs] = {nullptr};
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t n = std::min(kChunk, end - at);
    for (int k = 0; k < args.inputs; ++k) in[k] = static_cast<const S*>(args.in[k]) + sample * args.in_stride[k] + at;
    // Products first: they bring the chunk into the cache, and a stream past the cache follows.
    if (args.pairs > 0) products_of<S>(args, in, n, products);
    for (int j = 0; j < args.outputs; ++j) {
      const Row& row = rows[(size_t)j];
      const S* p[kMixMaxInputs];
      for (int k = 0; k < row.count; ++k) p[k] = in[row.at[k]];
      combine<S>(row.count, p, row.factor, row.offset, n, static_cast<S*>(args.out[j]) + sample * args.count + at,
                 stream);
    }
  }
  if (stream) finish_streaming();
}

template <class S>
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
      run_segment<S>(args, i / segments, begin, std::min(args.count, begin + kSegment),
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
  switch (args.dtype) {
    case DType::f32: run_typed<float>(args, parallel); return;
    case DType::f64: run_typed<double>(args, parallel); return;
    case DType::bf16: run_typed<Bf16>(args, parallel); return;
    case DType::f16: run_typed<F16>(args, parallel); return;
  }
}

}  // namespace

extern const MixKernels kMix;
const MixKernels kMix = {mix_run};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
