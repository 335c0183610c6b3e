// Inner products and norms of lists of tensors, perturbation in place, selection by magnitude and sign election, at one
// ISA level (see multitensor.h).
#include "transfuse/multitensor.h"

#include <cmath>

#include "multitensor_chunks.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

// ---- Gram ------------------------------------------------------------------------------------------------------

constexpr int64_t kGramPiece = 1024;

// sums[c] += a . b[c] for N rows
template <class T, int N>
void dot_rows(const T* a, const T* const* b, int64_t n, double* sums) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  V even[N] = {}, odd[N] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const V x = load<V>(a + i), y = load<V>(a + i + W);
    for (int c = 0; c < N; ++c) {
      even[c] += x * load<V>(b[c] + i);
      odd[c] += y * load<V>(b[c] + i + W);
    }
  }
  for (; i + W <= n; i += W)
    for (int c = 0; c < N; ++c) even[c] += load<V>(a + i) * load<V>(b[c] + i);
  for (int c = 0; c < N; ++c) {
    T rest = T(0);
    for (int64_t j = i; j < n; ++j) rest += a[j] * b[c][j];
    sums[c] += (double)(horizontal_sum<T>(even[c] + odd[c]) + rest);
  }
}

// sums (lists, lists), above the diagonal
template <class T>
void gram_chunk(const GramArgs& args, const Chunk& chunk, double* sums) {
  const int64_t lists = args.lists;
  char* scratch = static_cast<char*>(thread_scratch((size_t)(lists * kGramPiece) * sizeof(T) + (size_t)lists * 16));
  T* room = reinterpret_cast<T*>(scratch);
  const T** rows = reinterpret_cast<const T**>(scratch + lists * kGramPiece * (int64_t)sizeof(T));
  int64_t* number = reinterpret_cast<int64_t*>(rows + lists);
  each_piece(chunk, kGramPiece, [&](int64_t begin, int64_t n) {
    int64_t count = 0;
    for (int64_t k = 0; k < lists; ++k) {
      const Flat& t = args.x[k * args.blocks + chunk.block];
      if (t.ptr == nullptr) continue;
      number[count] = k;
      rows[count] = fetch<T>(t, begin, n, room + k * kGramPiece);
      ++count;
    }
    for (int64_t a = 0; a < count; ++a) {
      int64_t b = a;
      for (; b + 4 <= count; b += 4) {
        double found[4] = {};
        dot_rows<T, 4>(rows[a], rows + b, n, found);
        for (int c = 0; c < 4; ++c) sums[number[a] * lists + number[b + c]] += found[c];
      }
      for (; b < count; ++b) dot_rows<T, 1>(rows[a], rows + b, n, sums + number[a] * lists + number[b]);
    }
  });
}

void run_gram(const GramArgs& args, const Parallel& parallel) {
  const int64_t lists = args.lists, per_chunk = lists * lists;
  int64_t total = 0, segment = kSegment;
  for (int64_t j = 0; j < args.blocks; ++j) total += args.size[j];
  while (segment < total && total / segment * per_chunk > (int64_t)1 << 23) segment *= 2;
  const ChunkTable table(args.blocks, args.size, segment);
  std::vector<double> partial((size_t)(table.size() * per_chunk));
  table.each(parallel, [&](int64_t i, const Chunk& chunk) {
    double* sums = partial.data() + i * per_chunk;
    if (any_double(args.x, lists, args.blocks, chunk.block))
      gram_chunk<double>(args, chunk, sums);
    else
      gram_chunk<float>(args, chunk, sums);
  });
  std::fill(args.products, args.products + per_chunk, 0.0);
  for (int64_t i = 0; i < table.size(); ++i)
    for (int64_t p = 0; p < per_chunk; ++p) args.products[p] += partial[(size_t)(i * per_chunk + p)];
  for (int64_t a = 0; a < lists; ++a)
    for (int64_t b = 0; b < a; ++b) args.products[a * lists + b] = args.products[b * lists + a];
}

// ---- norms -----------------------------------------------------------------------------------------------------

struct Sums {
  VecD part[4] = {};
};

// Squares (Order 2) or magnitudes (1) of a piece, or its largest magnitude (0), where NaN stays. In double: squares of
// what float holds neither overflow nor vanish.
template <class T, int Order>
void norm_piece(const T* x, const T* scale, int64_t n, double& total) {
  constexpr int W = Simd<T>::W;
  const auto one = [&](int64_t i) { return scale != nullptr ? (double)x[i] * (double)scale[i] : (double)x[i]; };
  if constexpr (Order == 0) {
    for (int64_t i = 0; i < n; ++i) {
      const double a = std::fabs(one(i));
      if (a > total || a != a) total = a;
    }
    return;
  }
  Sums sums;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W)
    for (int u = 0; u < 2; ++u) {
      Wide a = widen_vector(load<typename Simd<T>::V>(x + i + u * W));
      if (scale != nullptr) {
        const Wide b = widen_vector(load<typename Simd<T>::V>(scale + i + u * W));
        for (int h = 0; h < 2; ++h) a.part[h] *= b.part[h];
      }
      for (int h = 0; h < 2; ++h) {
        const VecD v = a.part[h];
        if constexpr (Order == 2)
          sums.part[2 * u + h] += v * v;
        else
          sums.part[2 * u + h] += v < 0 ? -v : v;
      }
    }
  double rest = 0.0;
  for (; i < n; ++i) rest += Order == 2 ? one(i) * one(i) : std::fabs(one(i));
  total += horizontal_sum<double>((sums.part[0] + sums.part[1]) + (sums.part[2] + sums.part[3])) + rest;
}

template <class T, int Order>
void norm_chunk(const NormArgs& args, const Chunk& chunk, double& total) {
  T* room = static_cast<T*>(thread_scratch((size_t)(2 * kPiece) * sizeof(T)));
  each_piece(chunk, kPiece, [&](int64_t begin, int64_t n) {
    const T* x = fetch<T>(args.x[chunk.block], begin, n, room);
    const T* scale = args.scale == nullptr ? nullptr : fetch<T>(args.scale[chunk.block], begin, n, room + kPiece);
    norm_piece<T, Order>(x, scale, n, total);
  });
}

template <int Order>
void norm_ordered(const NormArgs& args, const Parallel& parallel) {
  const ChunkTable table(args.blocks, args.size, kSegment);
  std::vector<double> partial((size_t)table.size());
  table.each(parallel, [&](int64_t i, const Chunk& chunk) {
    if (any_double(args.x, 1, args.blocks, chunk.block) || any_double(args.scale, 1, args.blocks, chunk.block))
      norm_chunk<double, Order>(args, chunk, partial[(size_t)i]);
    else
      norm_chunk<float, Order>(args, chunk, partial[(size_t)i]);
  });
  std::fill(args.sums, args.sums + args.blocks, 0.0);
  for (int64_t i = 0; i < table.size(); ++i) {
    double& sum = args.sums[table[i].block];
    const double own = partial[(size_t)i];
    if (Order != 0)
      sum += own;
    else if (own > sum || own != own)
      sum = own;
  }
}

void run_norm(const NormArgs& args, const Parallel& parallel) {
  if (args.order == 2) return norm_ordered<2>(args, parallel);
  if (args.order == 1) return norm_ordered<1>(args, parallel);
  norm_ordered<0>(args, parallel);
}

// ---- in place --------------------------------------------------------------------------------------------------

template <class T>
void perturb_chunk(const PerturbArgs& args, const Chunk& chunk) {
  const Flat &to = args.x[chunk.block], &kept = args.backup[chunk.block];
  T* room = static_cast<T*>(thread_scratch((size_t)(3 * kPiece) * sizeof(T)));
  const T factor = (T)args.factor;
  each_piece(chunk, kPiece, [&](int64_t begin, int64_t n) {
    std::memcpy(to_element(kept, begin), at_element(to, begin), (size_t)(n * item_size(to.dtype)));
    const T* x = fetch<T>(to, begin, n, room);
    const T* g = fetch<T>(args.grads[chunk.block], begin, n, room + kPiece);
    T* out = room + 2 * kPiece;
    if (args.adaptive)
      for (int64_t i = 0; i < n; ++i) out[i] = x[i] + factor * (x[i] * x[i] * g[i]);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = x[i] + factor * g[i];
    put(to, begin, n, out);
  });
}

void run_perturb(const PerturbArgs& args, const Parallel& parallel) {
  ChunkTable(args.blocks, args.size, kSegment).each(parallel, [&](int64_t, const Chunk& chunk) {
    if (any_double(args.x, 1, args.blocks, chunk.block) || any_double(args.grads, 1, args.blocks, chunk.block))
      perturb_chunk<double>(args, chunk);
    else
      perturb_chunk<float>(args, chunk);
  });
}

void run_copy(const CopyArgs& args, const Parallel& parallel) {
  ChunkTable(args.blocks, args.size, kSegment).each(parallel, [&](int64_t, const Chunk& chunk) {
    const Flat &to = args.to[chunk.block], &from = args.from[chunk.block];
    std::memcpy(to_element(to, chunk.begin), at_element(from, chunk.begin),
                (size_t)(chunk.count * item_size(to.dtype)));
  });
}

// ---- selection by magnitude ------------------------------------------------------------------------------------

// Bits of |x|, which order as the numbers do; NaN above infinity.
struct Bits32 {
  using Word = uint32_t;
  static constexpr int kBits = 31;
  static Word of(const void* p, int64_t i) {
    Word w;
    std::memcpy(&w, static_cast<const char*>(p) + 4 * i, 4);
    return w & 0x7fffffffu;
  }
};
struct Bits64 {
  using Word = uint64_t;
  static constexpr int kBits = 63;
  static Word of(const void* p, int64_t i) {
    Word w;
    std::memcpy(&w, static_cast<const char*>(p) + 8 * i, 8);
    return w & 0x7fffffffffffffffull;
  }
};
struct Bits16 {
  using Word = uint32_t;
  static constexpr int kBits = 15;
  static Word of(const void* p, int64_t i) {
    uint16_t w;
    std::memcpy(&w, static_cast<const char*>(p) + 2 * i, 2);
    return (Word)(w & 0x7fffu);
  }
};

// Whether any lane is not 0.
TRANSFUSE_INLINE bool any_lane(VecI v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)v, (__m256i)v) == 0;
#else
  int32_t lanes[sizeof(VecI) / 4], found = 0;
  store(lanes, v);
  for (const int32_t lane : lanes) found |= lane;
  return found != 0;
#endif
}

// Whether any of W numbers, |x| shifted down, is the prefix.
TRANSFUSE_INLINE bool any_has(Bits32, const void* p, int64_t i, int above, uint32_t prefix) {
  const VecU w = load<VecU>(static_cast<const uint32_t*>(p) + i) & 0x7fffffffu;
  return any_lane((VecI)((w >> above) == prefix));
}
template <class B>
TRANSFUSE_INLINE bool any_has(B, const void*, int64_t, int, typename B::Word) {
  return true;
}

constexpr int kDigit = 11;         // bits counted at a time: two histograms lie in the first-level cache
constexpr int64_t kCounters = 64;  // histograms, each of a run of chunks: fixed by sizes, like everything here

// Radix selection: the digits of the wanted number from the highest down, one reading of everything for each.
template <class B>
typename B::Word select_bits(const SelectArgs& args, const Parallel& parallel) {
  using Word = typename B::Word;
  const ChunkTable table(args.blocks, args.size, kSegment);
  const int64_t counters = std::min(kCounters, table.size());
  constexpr int64_t kBins = (int64_t)1 << kDigit;
  std::vector<int64_t> counts((size_t)(counters * kBins));
  Word prefix = 0;
  int64_t rank = args.rank;
  for (int shift = B::kBits; shift > 0;) {
    const int digit = std::min(kDigit, shift), above = shift;
    shift -= digit;
    std::fill(counts.begin(), counts.end(), 0);
    const Word mask = ((Word)1 << digit) - 1;
    const Parallel used = counters > 1 ? parallel : serial_parallel();
    for_each_task(used, counters, [&](int64_t c) {
      int64_t* own = counts.data() + c * kBins;
      std::vector<uint32_t> bins((size_t)(2 * kBins));  // 32 bits count a chunk; two, so that equal neighbours overlap
      for (int64_t t = table.size() * c / counters; t < table.size() * (c + 1) / counters; ++t) {
        const Chunk& chunk = table[t];
        const void* p = args.x[chunk.block].ptr;
        std::fill(bins.begin(), bins.end(), 0u);
        if (above == B::kBits) {
          uint32_t *even = bins.data(), *odd = even + kBins;
          const int64_t end = chunk.begin + chunk.count;
          int64_t i = chunk.begin;
          for (; i + 4 <= end; i += 4) {
            const Word w0 = B::of(p, i), w1 = B::of(p, i + 1), w2 = B::of(p, i + 2), w3 = B::of(p, i + 3);
            ++even[w0 >> shift], ++odd[w1 >> shift], ++even[w2 >> shift], ++odd[w3 >> shift];
          }
          for (; i < end; ++i) ++even[B::of(p, i) >> shift];
        } else {
          // Few numbers have the digits found so far: a vector at a time is passed over.
          constexpr int W = Simd<float>::W;
          const auto count_one = [&](int64_t i) {
            const Word w = B::of(p, i);
            if ((w >> above) == prefix) ++bins[(size_t)((w >> shift) & mask)];
          };
          const int64_t end = chunk.begin + chunk.count;
          int64_t i = chunk.begin;
          for (; i + W <= end; i += W)
            if (any_has(B{}, p, i, above, prefix))
              for (int64_t l = 0; l < W; ++l) count_one(i + l);
          for (; i < end; ++i) count_one(i);
        }
        for (int64_t b = 0; b < kBins; ++b) own[b] += bins[(size_t)b] + (int64_t)bins[(size_t)(kBins + b)];
      }
    });
    int64_t b = 0;
    for (;; ++b) {
      int64_t here = 0;
      for (int64_t c = 0; c < counters; ++c) here += counts[(size_t)(c * kBins + b)];
      if (rank < here || b == kBins - 1) break;
      rank -= here;
    }
    prefix = (prefix << digit) | (Word)b;
  }
  return prefix;
}

void run_select(const SelectArgs& args, const Parallel& parallel) {
  DType dtype = DType::f32;
  for (int64_t j = 0; j < args.blocks; ++j)
    if (args.size[j] > 0) dtype = args.x[j].dtype;
  if (dtype == DType::f64) {
    const uint64_t bits = select_bits<Bits64>(args, parallel);
    std::memcpy(args.value, &bits, 8);
  } else if (dtype == DType::f32) {
    const uint32_t bits = select_bits<Bits32>(args, parallel);
    float value;
    std::memcpy(&value, &bits, 4);
    *args.value = (double)value;
  } else {
    const uint16_t bits = (uint16_t)select_bits<Bits16>(args, parallel);
    *args.value = dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
  }
}

// ---- sign election ---------------------------------------------------------------------------------------------

// sum += x where |x| is not below the least (NaN is kept, and shows)
template <class T>
void add_trimmed(const T* x, T least, int64_t n, T* sum) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const V v = load<V>(x + i), a = v < 0 ? -v : v;
    store(sum + i, load<V>(sum + i) + (a < splat<T>(least) ? V{} : v));
  }
  for (; i < n; ++i) sum[i] += (x[i] < T(0) ? -x[i] : x[i]) < least ? T(0) : x[i];
}

// Adds, and counts, the trimmed numbers of a sign.
template <class T>
void add_agreeing(const T* x, T least, const T* sign, int64_t n, T* sum, T* count) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  const V one = splat<T>(T(1));
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const V v = load<V>(x + i), along = v * load<V>(sign + i), a = v < 0 ? -v : v;
    const auto agrees = (a >= splat<T>(least)) & (along > 0);
    store(sum + i, load<V>(sum + i) + (agrees ? v : V{}));
    store(count + i, load<V>(count + i) + (agrees ? one : V{}));
  }
  for (; i < n; ++i) {
    const bool agrees = (x[i] < T(0) ? -x[i] : x[i]) >= least && x[i] * sign[i] > T(0);
    sum[i] += agrees ? x[i] : T(0);
    count[i] += agrees ? T(1) : T(0);
  }
}

template <class T>
void elect_chunk(const ElectArgs& args, const Chunk& chunk) {
  char* scratch = static_cast<char*>(
      thread_scratch((size_t)((args.lists + 3) * kGramPiece) * sizeof(T) + (size_t)args.lists * sizeof(T*)));
  T* room = reinterpret_cast<T*>(scratch);
  T *sum = room + args.lists * kGramPiece, *count = sum + kGramPiece, *base = count + kGramPiece;
  const T** x = reinterpret_cast<const T**>(base + kGramPiece);
  const T scale = (T)args.scale;
  each_piece(chunk, kGramPiece, [&](int64_t begin, int64_t n) {
    for (int64_t i = 0; i < n; ++i) sum[i] = T(0);
    for (int k = 0; k < args.lists; ++k) {
      x[k] = fetch<T>(args.deltas[k * args.blocks + chunk.block], begin, n, room + k * kGramPiece);
      add_trimmed(x[k], (T)args.thresholds[k], n, sum);
    }
    const T* from = args.base == nullptr ? nullptr : fetch<T>(args.base[chunk.block], begin, n, base);
    T out[kGramPiece];
    for (int64_t i = 0; i < n; ++i) {
      sum[i] = sum[i] > T(0) ? T(1) : sum[i] < T(0) ? T(-1) : sum[i];  // the sign; NaN stays
      count[i] = T(0);
      out[i] = T(0);
    }
    for (int k = 0; k < args.lists; ++k) add_agreeing(x[k], (T)args.thresholds[k], sum, n, out, count);
    for (int64_t i = 0; i < n; ++i) {
      const T mean = count[i] > T(0) ? out[i] / count[i] : sum[i] * T(0);
      out[i] = (from == nullptr ? T(0) : from[i]) + scale * mean;
    }
    put(args.out[chunk.block], begin, n, out);
  });
}

void run_elect(const ElectArgs& args, const Parallel& parallel) {
  ChunkTable(args.blocks, args.size, kSegment).each(parallel, [&](int64_t, const Chunk& chunk) {
    if (any_double(args.base, 1, args.blocks, chunk.block) ||
        any_double(args.deltas, args.lists, args.blocks, chunk.block))
      elect_chunk<double>(args, chunk);
    else
      elect_chunk<float>(args, chunk);
  });
}

}  // namespace

extern const MultitensorSumKernels kMultitensorSums;
const MultitensorSumKernels kMultitensorSums = {run_gram, run_norm, run_perturb, run_copy, run_select, run_elect};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
