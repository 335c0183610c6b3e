// Gradient, Hessian diagonal and Hessian-vector product of a linear head on CUDA (see head_curvature.h).
//
// Forward: products over the columns (logits, and u), a warp for the arithmetic of each sample, a product over the
// samples of each domain. Backward the same, and the product that gives the gradient by x. Samples are cut in stretches
// that do not cross domains, so that every launch serves all domains; a batch of few samples is spread over columns and
// a long one over stretches, whose sums one more kernel adds in order: no atomics, the same bits every time. Products
// are plain fused multiply-adds: 1 - p and differences of slopes would not survive tensor cores' shorter numbers.
#include "transfuse/head_curvature.h"

#include <algorithm>
#include <vector>

#include "words.h"

namespace transfuse {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kFill = kMaxBlocks < 512 ? kMaxBlocks : 512;  // thread blocks that are enough to keep a GPU busy
constexpr int kDotSamples = 4;                                  // samples and
constexpr int kClasses = 8;        // classes whose products a thread block holds in registers
constexpr int kMoveSamples = 8;    // samples of a thread block where the gradient by x is made
constexpr int kMoveClasses = 32;   // classes whose factors lie in shared memory meanwhile
constexpr int64_t kLeastSum = 32;  // samples of a stretch, where sums over samples are cut
constexpr int kSumSamples = 64;    // samples whose factors lie in shared memory

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }

template <class T>
__device__ inline T warp_sum(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// Domains as stretches of at most `length` samples.
struct Stretches {
  int64_t domains, length, count;
  const int64_t* offset;  // domains + 1: where each begins
  const int64_t* start;   // domains + 1: stretches before it
};

struct Rows {
  int64_t domain, first, last;
};

__device__ inline Rows find_rows(const Stretches& s, int64_t number) {
  const int64_t domain = find_segment(s.start, s.domains, number);
  const int64_t first = s.offset[domain] + (number - s.start[domain]) * s.length;
  const int64_t end = s.offset[domain + 1], last = first + s.length;
  return {domain, first, last < end ? last : end};
}

// A matrix (classes x columns) for each domain, and a further column beside it.
template <class T>
struct Matrix {
  const T* at;
  int64_t stride, domain_stride;
  const T* ones;  // or nullptr
  int64_t ones_stride, ones_domain;
};

// ---- products over the columns
// ----------------------------------------------------------------------------------------

template <class T>
struct Dots {
  Stretches parts;  // of kDotSamples
  int64_t columns, classes;
  const T* x;
  int products;  // 1 or 2
  Matrix<T> with[2];
  T* out[2];  // (samples, classes)
};

// Halves the numbers a lane has: it keeps those of its half of the lanes and gives the others away. Numbers have to be
// in registers, so every index is known when this is compiled.
template <int Step, class T>
__device__ inline void transpose(T (&v)[kWarp]) {
  const bool upper = (threadIdx.x & Step) != 0;
#pragma unroll
  for (int i = 0; i < Step; ++i) {
    const T kept = upper ? v[i + Step] : v[i], given = upper ? v[i] : v[i + Step];
    v[i] = kept + __shfl_xor_sync(kAll, given, Step);
  }
  if constexpr (Step > 1) transpose<Step / 2>(v);
}

// Of 32 numbers in each lane of a warp, lane l gets the sum over lanes of number l.
template <class T>
__device__ inline T transposed_sum(T (&v)[kWarp]) {
  transpose<kWarp / 2>(v);
  return v[0];
}

template <class T, int P, bool Squared>
__global__ void __launch_bounds__(kThreads) dots_kernel(const Dots<T> d) {
  static_assert(kDotSamples * kClasses == kWarp, "a lane for each product");
  using Q = Pack<T, P>;
  __shared__ T memory[kWarps][kWarp];
  const int64_t tiles = (d.classes + kClasses - 1) / kClasses, many = d.products * tiles;
  for (int64_t item = blockIdx.x; item < d.parts.count * many; item += gridDim.x) {
    const Rows rows = find_rows(d.parts, item / many);
    const int which = (int)(item % many / tiles);
    const int64_t first = item % tiles * kClasses;
    const Matrix<T>& m = d.with[which];
    const T *x[kDotSamples], *w[kClasses];
    // Beyond the last, the last again.
#pragma unroll
    for (int s = 0; s < kDotSamples; ++s)
      x[s] = d.x + (rows.first + s < rows.last ? rows.first + s : rows.last - 1) * d.columns;
#pragma unroll
    for (int c = 0; c < kClasses; ++c)
      w[c] = m.at + rows.domain * m.domain_stride + (first + c < d.classes ? first + c : d.classes - 1) * m.stride;
    T sum[kWarp] = {};
    for (int64_t k = (int64_t)threadIdx.x * P; k < d.columns; k += kThreads * P) {
      Q a[kDotSamples], b[kClasses];
#pragma unroll
      for (int s = 0; s < kDotSamples; ++s) a[s] = load_pack<Q>(x[s] + k);
#pragma unroll
      for (int c = 0; c < kClasses; ++c) b[c] = load_pack<Q>(w[c] + k);
#pragma unroll
      for (int i = 0; i < P; ++i)
#pragma unroll
        for (int s = 0; s < kDotSamples; ++s) {
          const T v = Squared ? a[s].v[i] * a[s].v[i] : a[s].v[i];
#pragma unroll
          for (int c = 0; c < kClasses; ++c) sum[s * kClasses + c] += v * b[c].v[i];
        }
    }
    const T own = transposed_sum(sum);
    __syncthreads();
    memory[threadIdx.x / kWarp][threadIdx.x % kWarp] = own;
    __syncthreads();
    if (threadIdx.x >= kWarp) continue;
    const int64_t sample = rows.first + threadIdx.x / kClasses, c = first + threadIdx.x % kClasses;
    if (sample >= rows.last || c >= d.classes) continue;
    T total = m.ones == nullptr ? T(0) : m.ones[rows.domain * m.ones_domain + c * m.ones_stride];
    for (int g = 0; g < kWarps; ++g) total += memory[g][threadIdx.x];
    d.out[which][sample * d.classes + c] = total;
  }
}

// ---- one sample -----------------------------------------------------------------------------------------------------

template <class T>
struct Samples {
  HeadKind kind;
  bool backward;
  int64_t samples, classes;
  Stretches parts;  // for its domains
  T *p, *rest;      // p holds the logits where probabilities are made
  const T* targets;
  const T* u;
  T* left;   // the factor of the sample in the result
  T* slope;  // the gradient by it, then that by the logits
  T* turn;   // that by u
};

// The number of the largest of p, the first of equal ones, and its value; the same in all lanes.
template <class T>
__device__ inline int64_t largest(int64_t classes, const T* p, T& peak) {
  const int64_t lane = threadIdx.x % kWarp;
  int64_t top = lane < classes ? lane : 0;
  for (int64_t c = lane + kWarp; c < classes; c += kWarp)
    if (p[c] > p[top]) top = c;
  peak = p[top];
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, peak, step);
    const int64_t index = __shfl_xor_sync(kAll, top, step);
    if (other > peak || (other == peak && index < top)) peak = other, top = index;
  }
  // NaN compares with nothing: lanes may hold different ones, and must agree.
  peak = __shfl_sync(kAll, peak, 0);
  return __shfl_sync(kAll, top, 0);
}

// z -> p and 1 - p, both with all their digits: 1 - p of the largest is the sum of the others.
template <class T>
__device__ inline void probabilities(int64_t classes, T* p, T* rest) {
  const int64_t lane = threadIdx.x % kWarp;
  if (classes == 1) {
    if (lane != 0) return;
    const T z = p[0], small = exponential(-magnitude(z)), total = T(1) + small;
    p[0] = (z >= T(0) ? T(1) : small) / total;
    rest[0] = (z >= T(0) ? small : T(1)) / total;
    if (!(z == z)) p[0] = rest[0] = z;
    return;
  }
  T peak;
  const int64_t top = largest(classes, p, peak);
  T others = T(0);
  for (int64_t c = lane; c < classes; c += kWarp) {
    const T power = exponential(p[c] - peak);
    p[c] = power;
    if (c != top) others += power;
  }
  others = warp_sum(others);
  const T total = exponential(peak - peak) + others, inverse = T(1) / total;
  for (int64_t c = lane; c < classes; c += kWarp) {
    rest[c] = (c == top ? others : total - p[c]) * inverse;
    p[c] *= inverse;
  }
}

// g -> J g = p * (g - p.g), for one output p (1 - p) g, at c = lane, lane + 32, ... Returns p.g.
template <class T, class G>
__device__ inline T jacobian(int64_t classes, const T* p, const T* rest, const G& g, T* out) {
  const int64_t lane = threadIdx.x % kWarp;
  if (classes == 1) {
    const T own = g(0), along = p[0] * own;
    __syncwarp();
    if (lane == 0) out[0] = own * (p[0] * rest[0]);
    return along;
  }
  T peak;
  const int64_t top = largest(classes, p, peak);
  T others = T(0);
  for (int64_t c = lane; c < classes; c += kWarp)
    if (c != top) others += p[c] * g(c);
  others = warp_sum(others);
  const T along = others + peak * g(top);
  __syncwarp();  // g may be where `out` is
  for (int64_t c = lane; c < classes; c += kWarp) {
    const T own = g(c);
    // For the largest class in a form that keeps its digits when p is near 1.
    out[c] = p[c] * (c == top ? own * rest[c] - others : own - along);
  }
  return along;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) samples_kernel(const Samples<T> s) {
  const int64_t lane = threadIdx.x % kWarp, classes = s.classes;
  const int64_t warps = (int64_t)gridDim.x * kWarps;
  for (int64_t n = (int64_t)blockIdx.x * kWarps + threadIdx.x / kWarp; n < s.samples; n += warps) {
    const int64_t domain = find_segment(s.parts.offset, s.parts.domains, n), at = n * classes;
    const T scale = T(1) / (T)(s.parts.offset[domain + 1] - s.parts.offset[domain]);
    T *p = s.p + at, *rest = s.rest + at, *left = s.left + at;
    if (!s.backward) {
      probabilities(classes, p, rest);
      __syncwarp();
    }
    if (s.kind == HeadKind::product) {
      const T* u = s.u + at;
      jacobian(classes, p, rest, [&](int64_t c) { return scale * u[c]; }, left);
    } else {
      for (int64_t c = lane; c < classes; c += kWarp)
        left[c] = scale * (s.kind == HeadKind::diagonal ? p[c] * rest[c] : p[c] - s.targets[at + c]);
    }
    if (!s.backward) continue;
    T* g = s.slope + at;
    if (s.kind == HeadKind::diagonal)
      for (int64_t c = lane; c < classes; c += kWarp) g[c] = scale * g[c] * (rest[c] - p[c]);
    if (s.kind == HeadKind::gradient)
      for (int64_t c = lane; c < classes; c += kWarp) g[c] *= scale;
    if (s.kind == HeadKind::product) {
      // By p: g * (u - p.u) - u * p.g.
      const T* u = s.u + at;
      const T along = jacobian(classes, p, rest, [&](int64_t c) { return scale * g[c]; }, s.turn + at);
      T mean = T(0);
      for (int64_t c = lane; c < classes; c += kWarp) mean += p[c] * u[c];
      mean = warp_sum(mean);
      for (int64_t c = lane; c < classes; c += kWarp) {
        const T own = scale * g[c];
        g[c] = own * (u[c] - mean) - u[c] * along;
      }
    }
    __syncwarp();
    jacobian(classes, p, rest, [&](int64_t c) { return g[c]; }, g);
  }
}

// ---- products over the samples --------------------------------------------------------------------------------------

// Results (domains, classes, columns), and a further column beside them.
template <class T>
struct Result {
  T* at;
  int64_t stride, domain_stride;
  T* ones;  // or nullptr
  int64_t ones_stride, ones_domain;
};

template <class T>
struct Sums {
  Stretches parts;
  int64_t columns, width, classes;  // width: with the column of ones, if that is wanted
  const T* x;
  const T* left;  // (samples, classes)
  T* partial;     // (stretches, classes, width); nullptr: one stretch for each domain
  Result<T> to;
};

template <class T>
__device__ inline void put_result(const Result<T>& to, int64_t domain, int64_t c, int64_t k, int64_t columns, T x) {
  if (k < columns)
    to.at[domain * to.domain_stride + c * to.stride + k] = x;
  else
    to.ones[domain * to.ones_domain + c * to.ones_stride] = x;
}

template <class T, int P, bool Squared>
__global__ void __launch_bounds__(kThreads, 1) sums_kernel(const Sums<T> s) {
  using Q = Pack<T, P>;
  constexpr int kWide = kWarp * P;  // columns of a thread block; its warps share the samples
  __shared__ T factor[kSumSamples][kClasses];
  __shared__ T memory[kWarps][kClasses][kWide];
  const int64_t tiles = (s.classes + kClasses - 1) / kClasses, blocks = (s.width + kWide - 1) / kWide;
  const int lane = (int)(threadIdx.x % kWarp), warp = (int)(threadIdx.x / kWarp);
  for (int64_t item = blockIdx.x; item < s.parts.count * tiles * blocks; item += gridDim.x) {
    const int64_t part = item / (tiles * blocks), first = item / blocks % tiles * kClasses;
    const int64_t k = item % blocks * kWide + lane * P;
    const Rows rows = find_rows(s.parts, part);
    T sum[kClasses][P] = {};
    for (int64_t begin = rows.first; begin < rows.last; begin += kSumSamples) {
      const int count = rows.last - begin < kSumSamples ? (int)(rows.last - begin) : kSumSamples;
      __syncthreads();
      for (int i = (int)threadIdx.x; i < count * kClasses; i += kThreads) {
        const int64_t c = first + i % kClasses;
        factor[i / kClasses][i % kClasses] = c < s.classes ? s.left[(begin + i / kClasses) * s.classes + c] : T(0);
      }
      __syncthreads();
      T own[kClasses][P] = {};  // a sum over many samples is one of short sums
#pragma unroll(sizeof(T) == 8 ? 2 : 4)
      for (int n = warp; n < count; n += kWarps) {
        Q x = {};
        if (k < s.columns) x = load_pack<Q>(s.x + (begin + n) * s.columns + k);
        // The column of ones; a pack does not reach from the others into it.
        if (k == s.columns) x.v[0] = T(1);
#pragma unroll
        for (int i = 0; i < P; ++i) {
          const T v = Squared ? x.v[i] * x.v[i] : x.v[i];
#pragma unroll
          for (int c = 0; c < kClasses; ++c) own[c][i] += factor[n][c] * v;
        }
      }
#pragma unroll
      for (int c = 0; c < kClasses; ++c)
#pragma unroll
        for (int i = 0; i < P; ++i) sum[c][i] += own[c][i];
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kClasses; ++c)
#pragma unroll
      for (int i = 0; i < P; ++i) memory[warp][c][lane * P + i] = sum[c][i];
    __syncthreads();
    for (int t = (int)threadIdx.x; t < kClasses * kWide; t += kThreads) {
      const int64_t c = first + t / kWide, column = item % blocks * kWide + t % kWide;
      if (c >= s.classes || column >= s.width) continue;
      T total = memory[0][t / kWide][t % kWide];
      for (int w = 1; w < kWarps; ++w) total += memory[w][t / kWide][t % kWide];
      if (s.partial != nullptr)
        s.partial[(part * s.classes + c) * s.width + column] = total;
      else
        put_result(s.to, rows.domain, c, column, s.columns, total);
    }
  }
}

// Adds the stretches of each domain in order.
template <class T>
__global__ void __launch_bounds__(kThreads) fold_kernel(const Sums<T> s) {
  const int64_t plane = s.classes * s.width;
  for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < s.parts.domains * plane;
       i += (int64_t)gridDim.x * kThreads) {
    const int64_t domain = i / plane, at = i % plane;
    T total = T(0);
#pragma unroll 4
    for (int64_t part = s.parts.start[domain]; part < s.parts.start[domain + 1]; ++part)
      total += s.partial[part * plane + at];
    put_result(s.to, domain, at / s.width, at % s.width, s.columns, total);
  }
}

// ---- the gradient by x ----------------------------------------------------------------------------------------------

template <class T>
struct Moves {
  Stretches parts;  // of kMoveSamples
  int64_t columns, classes;
  const T* x;
  int products;        // 2, or 3 with turn
  const T* factor[3];  // left, slope, turn: (samples, classes)
  Matrix<T> with[3];   // the cotangent, the weight, the vectors
  T* out;
};

// out = (2 x *) left G + slope W + turn V
template <class T, int P, bool Squared>
__global__ void __launch_bounds__(kThreads) moves_kernel(const Moves<T> m) {
  using Q = Pack<T, P>;
  constexpr int kWide = kThreads * P;
  __shared__ T factor[3][kMoveClasses][kMoveSamples];
  const int64_t blocks = (m.columns + kWide - 1) / kWide;
  for (int64_t item = blockIdx.x; item < m.parts.count * blocks; item += gridDim.x) {
    const Rows rows = find_rows(m.parts, item / blocks);
    const int64_t k = item % blocks * kWide + (int64_t)threadIdx.x * P;
    const int count = (int)(rows.last - rows.first);
    T sum[kMoveSamples][P] = {}, moved[Squared ? kMoveSamples : 1][P] = {};
    for (int64_t first = 0; first < m.classes; first += kMoveClasses) {
      const int classes = m.classes - first < kMoveClasses ? (int)(m.classes - first) : kMoveClasses;
      __syncthreads();
      for (int i = (int)threadIdx.x; i < m.products * kMoveClasses * kMoveSamples; i += kThreads) {
        const int j = i / (kMoveClasses * kMoveSamples), rest = i % (kMoveClasses * kMoveSamples);
        const int n = rest / kMoveClasses, c = rest % kMoveClasses;
        factor[j][c][n] = n < count && c < classes ? m.factor[j][(rows.first + n) * m.classes + first + c] : T(0);
      }
      __syncthreads();
      if (k >= m.columns) continue;
      for (int j = 0; j < m.products; ++j) {
        const Matrix<T>& with = m.with[j];
        const T* from = with.at + rows.domain * with.domain_stride + first * with.stride + k;
#pragma unroll 2
        for (int c = 0; c < classes; ++c) {
          const Q w = load_pack<Q>(from + c * with.stride);
#pragma unroll
          for (int n = 0; n < kMoveSamples; ++n)
#pragma unroll
            for (int i = 0; i < P; ++i) {
              if (Squared && j == 0)
                moved[Squared ? n : 0][i] += factor[j][c][n] * w.v[i];
              else
                sum[n][i] += factor[j][c][n] * w.v[i];
            }
        }
      }
    }
    if (k >= m.columns) continue;
#pragma unroll
    for (int n = 0; n < kMoveSamples; ++n) {
      if (n >= count) continue;
      const int64_t at = (rows.first + n) * m.columns + k;
      Q y;
      if constexpr (Squared) {
        const Q x = load_pack<Q>(m.x + at);
#pragma unroll
        for (int i = 0; i < P; ++i) sum[n][i] += T(2) * x.v[i] * moved[n][i];
      }
#pragma unroll
      for (int i = 0; i < P; ++i) y.v[i] = sum[n][i];
      *reinterpret_cast<Q*>(m.out + at) = y;
    }
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Samples of a stretch of sums over samples: as many thread blocks as keep the GPU busy, if there are samples enough.
int64_t sum_length(const HeadArgs& a) {
  const int64_t width = a.columns + (a.bias != nullptr), tiles = (a.classes + kClasses - 1) / kClasses;
  // As if packs of 16 bytes were taken, so that the length does not depend on where tensors lie.
  const int64_t blocks = std::max<int64_t>((width + kWarp * 4 - 1) / (kWarp * 4), 1) * tiles;
  return std::max((a.samples * blocks + kFill - 1) / kFill, kLeastSum);
}

int64_t count_of(const HeadArgs& a, int64_t length, bool together) {
  if (together) return (a.samples + length - 1) / length;
  int64_t count = 0;
  for (int64_t e = 0; e < a.domains; ++e) count += (a.offsets[e + 1] - a.offsets[e] + length - 1) / length;
  return count;
}

// Working memory of a call, 8-byte words at a time.
class Memory {
 public:
  explicit Memory(void* memory) : at_(static_cast<uint64_t*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* found = reinterpret_cast<T*>(at_);
    at_ += words(count, sizeof(T));
    return found;
  }
  static int64_t words(int64_t count, size_t size) { return (count * (int64_t)size + 7) / 8; }

 private:
  uint64_t* at_;
};

// The tables of stretches of a call: by samples of products over columns, of sums, of the gradient by x; and sums of
// all domains together.
struct Tables {
  Stretches dots, sums, moves, all;
};

int64_t table_words(const HeadArgs& a) { return 4 * (a.domains + 1) + 4; }

cudaError_t upload_tables(const HeadArgs& a, Memory& memory, Tables& t, cudaStream_t stream) {
  std::vector<uint64_t> words;
  for (int64_t e = 0; e <= a.domains; ++e) words.push_back((uint64_t)a.offsets[e]);
  auto* to = memory.take<uint64_t>(table_words(a));
  const auto* offset = reinterpret_cast<const int64_t*>(to);
  const auto add = [&](int64_t length) {
    Stretches s{a.domains, length, 0, offset, reinterpret_cast<const int64_t*>(to + words.size())};
    words.push_back(0);
    for (int64_t e = 0; e < a.domains; ++e) {
      s.count += (a.offsets[e + 1] - a.offsets[e] + length - 1) / length;
      words.push_back((uint64_t)s.count);
    }
    return s;
  };
  const int64_t length = sum_length(a);
  t.dots = add(kDotSamples);
  t.sums = add(length);
  t.moves = add(kMoveSamples);
  t.all = {1, length, count_of(a, length, true), reinterpret_cast<const int64_t*>(to + words.size()), nullptr};
  for (const uint64_t word : {(uint64_t)0, (uint64_t)a.samples, (uint64_t)0, (uint64_t)t.all.count})
    words.push_back(word);
  t.all.start = t.all.offset + 2;
  return upload_words(to, words.data(), words.size(), stream);
}

template <class T>
bool aligned(const void* p, int64_t stride) {
  return p == nullptr || (pack_aligned(static_cast<const T*>(p)) && stride % (kPackBytes / (int64_t)sizeof(T)) == 0);
}

// Calls body(P as a type) with as many numbers as are read at once.
template <class T, class F>
cudaError_t with_packs(bool packs, const F& body) {
  return packs ? body(Pack<T>()) : body(Pack<T, 1>());
}

template <class T>
cudaError_t launch_sums(const HeadArgs& a, const Stretches& parts, const T* left, const Result<T>& to, bool squared,
                        T* partial, cudaStream_t stream) {
  const int64_t width = a.columns + (to.ones != nullptr);
  if (width == 0) return cudaSuccess;
  const bool direct = parts.count == parts.domains;
  const Sums<T> s{parts, a.columns, width, a.classes, static_cast<const T*>(a.x), left, direct ? nullptr : partial, to};
  const int64_t tiles = (a.classes + kClasses - 1) / kClasses;
  cudaError_t error = with_packs<T>(aligned<T>(a.x, a.columns), [&](auto pack) {
    constexpr int P = decltype(pack)::kSize;
    const int64_t blocks = parts.count * tiles * ((width + kWarp * P - 1) / (kWarp * P));
    return squared ? launch(sums_kernel<T, P, true>, blocks, kThreads, stream, s)
                   : launch(sums_kernel<T, P, false>, blocks, kThreads, stream, s);
  });
  if (error == cudaSuccess && !direct)
    error = launch(fold_kernel<T>, (parts.domains * a.classes * width + kThreads - 1) / kThreads, kThreads, stream, s);
  return error;
}

template <class T>
cudaError_t launch_dots(const Dots<T>& d, bool squared, cudaStream_t stream) {
  bool packs = aligned<T>(d.x, d.columns);
  for (int i = 0; i < d.products; ++i)
    packs = packs && aligned<T>(d.with[i].at, d.with[i].stride) && aligned<T>(d.with[i].at, d.with[i].domain_stride);
  const int64_t blocks = d.parts.count * d.products * ((d.classes + kClasses - 1) / kClasses);
  return with_packs<T>(packs, [&](auto pack) {
    constexpr int P = decltype(pack)::kSize;
    return squared ? launch(dots_kernel<T, P, true>, blocks, kThreads, stream, d)
                   : launch(dots_kernel<T, P, false>, blocks, kThreads, stream, d);
  });
}

// A matrix (domains, classes, columns) whose last column is that of ones, if there is a bias.
template <class T>
Matrix<T> matrix_of(const HeadArgs& a, const void* at, bool shared) {
  const int64_t width = a.columns + (a.bias != nullptr), plane = shared ? 0 : a.classes * width;
  const T* p = static_cast<const T*>(at);
  return {p, width, plane, a.bias == nullptr ? nullptr : p + a.columns, width, plane};
}

template <class T>
Matrix<T> weight_of(const HeadArgs& a) {
  return {static_cast<const T*>(a.weight), a.columns, 0, static_cast<const T*>(a.bias), 1, 0};
}

template <class T>
Result<T> result_of(const HeadArgs& a, void* at, bool shared) {
  const int64_t width = a.columns + (a.bias != nullptr), plane = shared ? 0 : a.classes * width;
  T* p = static_cast<T*>(at);
  return {p, width, plane, a.bias == nullptr ? nullptr : p + a.columns, width, plane};
}

template <class T>
Samples<T> samples_of(const HeadArgs& a, const Tables& t, T* left) {
  Samples<T> s = {};
  s.kind = a.kind;
  s.samples = a.samples;
  s.classes = a.classes;
  s.parts = t.dots;
  s.p = static_cast<T*>(a.p);
  s.rest = static_cast<T*>(a.rest);
  s.targets = static_cast<const T*>(a.targets);
  s.u = static_cast<const T*>(a.u);
  s.left = left;
  return s;
}

template <class T>
cudaError_t launch_samples(const Samples<T>& s, cudaStream_t stream) {
  return launch(samples_kernel<T>, (s.samples + kWarps - 1) / kWarps, kThreads, stream, s);
}

template <class T>
cudaError_t forward(const HeadArgs& a, void* working, cudaStream_t stream) {
  Memory memory(working);
  Tables t;
  cudaError_t error = upload_tables(a, memory, t, stream);
  T* left = memory.take<T>(a.samples * a.classes);
  T* partial = memory.take<T>(0);
  Dots<T> d = {};
  d.parts = t.dots;
  d.columns = a.columns;
  d.classes = a.classes;
  d.x = static_cast<const T*>(a.x);
  d.products = a.kind == HeadKind::product ? 2 : 1;
  d.with[0] = weight_of<T>(a);
  d.out[0] = static_cast<T*>(a.p);
  if (a.kind == HeadKind::product) {
    d.with[1] = matrix_of<T>(a, a.vectors, a.shared);
    d.out[1] = static_cast<T*>(a.u);
  }
  if (error == cudaSuccess) error = launch_dots(d, false, stream);
  if (error == cudaSuccess) error = launch_samples(samples_of(a, t, left), stream);
  if (error != cudaSuccess) return error;
  return launch_sums<T>(a, t.sums, left, result_of<T>(a, a.out, false), a.kind == HeadKind::diagonal, partial, stream);
}

template <class T>
cudaError_t backward(const HeadArgs& a, void* working, cudaStream_t stream) {
  Memory memory(working);
  Tables t;
  cudaError_t error = upload_tables(a, memory, t, stream);
  const bool product = a.kind == HeadKind::product, diagonal = a.kind == HeadKind::diagonal;
  T* left = memory.take<T>(a.samples * a.classes);
  T* slope = memory.take<T>(a.samples * a.classes);
  T* turn = memory.take<T>(product ? a.samples * a.classes : 0);
  T* partial = memory.take<T>(0);
  Dots<T> d = {};
  d.parts = t.dots;
  d.columns = a.columns;
  d.classes = a.classes;
  d.x = static_cast<const T*>(a.x);
  d.products = 1;
  d.with[0] = matrix_of<T>(a, a.grad, false);
  d.out[0] = slope;
  if (error == cudaSuccess) error = launch_dots(d, diagonal, stream);
  Samples<T> s = samples_of(a, t, left);
  s.backward = true;
  s.slope = slope;
  s.turn = turn;
  if (error == cudaSuccess) error = launch_samples(s, stream);
  if (error == cudaSuccess && a.head_grad) {
    const Result<T> to{static_cast<T*>(a.weight_grad), a.columns, 0, static_cast<T*>(a.bias_grad), 1, 0};
    error = launch_sums<T>(a, t.all, slope, to, false, partial, stream);
  }
  if (error == cudaSuccess && a.vectors_grad != nullptr)
    error = launch_sums<T>(a, a.shared ? t.all : t.sums, turn, result_of<T>(a, a.vectors_grad, a.shared), false,
                           partial, stream);
  if (error != cudaSuccess || a.x_grad == nullptr || a.columns == 0) return error;
  Moves<T> m = {};
  m.parts = t.moves;
  m.columns = a.columns;
  m.classes = a.classes;
  m.x = static_cast<const T*>(a.x);
  m.products = product ? 3 : 2;
  m.factor[0] = left;
  m.factor[1] = slope;
  m.factor[2] = turn;
  m.with[0] = matrix_of<T>(a, a.grad, false);
  m.with[1] = weight_of<T>(a);
  if (product) m.with[2] = matrix_of<T>(a, a.vectors, a.shared);
  m.out = static_cast<T*>(a.x_grad);
  bool packs = aligned<T>(m.x, a.columns) && aligned<T>(m.out, a.columns);
  for (int j = 0; j < m.products; ++j)
    packs = packs && aligned<T>(m.with[j].at, m.with[j].stride) && aligned<T>(m.with[j].at, m.with[j].domain_stride);
  return with_packs<T>(packs, [&](auto pack) {
    constexpr int P = decltype(pack)::kSize;
    const int64_t blocks = m.parts.count * ((a.columns + kThreads * P - 1) / (kThreads * P));
    return diagonal ? launch(moves_kernel<T, P, true>, blocks, kThreads, stream, m)
                    : launch(moves_kernel<T, P, false>, blocks, kThreads, stream, m);
  });
}

}  // namespace

int64_t head_cuda_memory(const HeadArgs& a, bool backward) {
  const size_t size = a.f64 ? 8 : 4;
  const int64_t width = a.columns + (a.bias != nullptr), length = sum_length(a);
  const int64_t parts = std::max(count_of(a, length, true), count_of(a, length, false));
  return table_words(a) + (backward ? 3 : 1) * Memory::words(a.samples * a.classes, size) +
         Memory::words(parts * a.classes * width, size);
}

const char* head_forward_cuda(const HeadArgs& a, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return message_of(a.f64 ? forward<double>(a, memory, on) : forward<float>(a, memory, on));
}

const char* head_backward_cuda(const HeadArgs& a, void* memory, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return message_of(a.f64 ? backward<double>(a, memory, on) : backward<float>(a, memory, on));
}

}  // namespace transfuse
