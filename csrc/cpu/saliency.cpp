// Gradient-weighted and NormGrad maps on the CPU, at one ISA level (see saliency.h).
//
// Every map is made of two reductions over a block of lines, each a row of contiguous numbers: *across* lines, into as
// many sums as a line is long, and *along* a line, into one sum for each. Where locations are contiguous, lines are
// channels; where channels are (channels last, tokens), lines are locations; the same code serves both with the two
// reductions changing places. Lines are divided into groups by the shape alone, and groups are added in order, so that
// results do not depend on the number of threads.
//
// Each tensor is read from memory once. Weights of channels need all locations first, but of a few channels only:
// where lines are channels, four are pooled and then, still in the cache, added to the map.
#include "transfuse/saliency.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kGroup = 64;        // lines whose sums are taken in one go
constexpr int kTogether = 4;          // lines read side by side
constexpr int64_t kTile = 1024;       // numbers of a line at a time, where lines are converted
constexpr int64_t kChunk = 2048;      // numbers along a line in single precision before sums are widened
constexpr int64_t kSerial = 1 << 15;  // numbers below which waking other threads does not pay
constexpr int64_t kBlock = 16;        // channels that are transposed at a time
constexpr double kPlusEps = 1e-6, kPooledEps = 1e-7;

template <class T>
constexpr DType kDirect = sizeof(T) == 8 ? DType::f64 : DType::f32;

// ---- what is accumulated: of an activation a, a gradient g and an extra number e ------------------------------------
// Written for vectors and numbers alike. NaN must survive, so a comparison decides what is left out, never what stays.

template <class V>
TRANSFUSE_INLINE V constant(double c) {
  if constexpr (std::is_floating_point<V>::value) {
    return (V)c;
  } else {
    using T = typename std::decay<decltype(std::declval<V&>()[0])>::type;
    return splat<T>((T)c);
  }
}
template <class V>
TRANSFUSE_INLINE V positive(V x) {
  return x < V{} ? V{} : x;
}
template <class V>
TRANSFUSE_INLINE V negative(V x) {
  return x > V{} ? V{} : x;
}
template <class V>
TRANSFUSE_INLINE V larger(V a, V b) {
  return (a > b) | (a != a) ? a : b;
}
template <class V>
TRANSFUSE_INLINE V smaller(V a, V b) {
  return (a < b) | (a != a) ? a : b;
}

template <class V>
TRANSFUSE_INLINE void add_all(V* a, const V* b, int count) {
  for (int k = 0; k < count; ++k) a[k] = a[k] + b[k];
}

// A sum of one number. Each mode says whether it reads a and g.
struct Added {
  static constexpr int K = 1;
  static constexpr bool kWeight = false, kSum = false;  // which extra number it reads, if any
  static constexpr double start(int) { return 0.0; }
  template <class V>
  TRANSFUSE_INLINE void merge(V* a, const V* b) {
    add_all(a, b, K);
  }
};
struct OfBoth : Added {
  static constexpr bool kAct = true, kGrad = true;
};
struct OfOne : Added {
  static constexpr bool kAct = true, kGrad = false;
};

struct Product : OfBoth {
  template <class V>
  TRANSFUSE_INLINE void step(V a, V g, V, V* s) {
    s[0] = a * g + s[0];
  }
};
struct PositiveProduct : OfBoth {
  template <class V>
  TRANSFUSE_INLINE void step(V a, V g, V, V* s) {
    s[0] = s[0] + positive(a * g);
  }
};
struct PositiveGradient : OfBoth {
  template <class V>
  TRANSFUSE_INLINE void step(V a, V g, V, V* s) {
    s[0] = positive(g) * a + s[0];
  }
};
struct ProductSquare : OfBoth {
  template <class V>
  TRANSFUSE_INLINE void step(V a, V g, V, V* s) {
    const V t = a * g;
    s[0] = t * t + s[0];
  }
};
struct PositiveProductSquare : OfBoth {
  template <class V>
  TRANSFUSE_INLINE void step(V a, V g, V, V* s) {
    const V t = positive(a * g);
    s[0] = t * t + s[0];
  }
};
struct ProductMax {
  static constexpr int K = 1;
  static constexpr bool kWeight = false, kSum = false;
  static constexpr bool kAct = true, kGrad = true;
  static constexpr double start(int) { return -std::numeric_limits<double>::infinity(); }
  template <class V>
  TRANSFUSE_INLINE void step(V a, V g, V, V* s) {
    s[0] = larger(V(a * g), s[0]);
  }
  template <class V>
  TRANSFUSE_INLINE void merge(V* a, const V* b) {
    a[0] = larger(b[0], a[0]);
  }
};
struct Weighted : OfOne {
  static constexpr bool kWeight = true;  // of the channel
  template <class V>
  TRANSFUSE_INLINE void step(V a, V, V e, V* s) {
    s[0] = a * e + s[0];
  }
};

// Statistics of one tensor, given as the activation.
struct Square : OfOne {
  template <class V>
  TRANSFUSE_INLINE void step(V a, V, V, V* s) {
    s[0] = a * a + s[0];
  }
};
struct Sum : OfOne {
  template <class V>
  TRANSFUSE_INLINE void step(V a, V, V, V* s) {
    s[0] = s[0] + a;
  }
};
struct SignedSquares {
  static constexpr int K = 2;
  static constexpr bool kWeight = false, kSum = false;
  static constexpr bool kAct = true, kGrad = false;
  static constexpr double start(int) { return 0.0; }
  template <class V>
  TRANSFUSE_INLINE void step(V a, V, V, V* s) {
    const V p = positive(a), m = negative(a);
    s[0] = p * p + s[0];
    s[1] = m * m + s[1];
  }
  template <class V>
  TRANSFUSE_INLINE void merge(V* a, const V* b) {
    add_all(a, b, K);
  }
};
struct Extremes {
  static constexpr int K = 2;
  static constexpr bool kWeight = false, kSum = false;
  static constexpr bool kAct = true, kGrad = false;
  static constexpr double start(int k) {
    return k == 0 ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::infinity();
  }
  template <class V>
  TRANSFUSE_INLINE void step(V a, V, V, V* s) {
    s[0] = larger(a, s[0]);
    s[1] = smaller(a, s[1]);
  }
  template <class V>
  TRANSFUSE_INLINE void merge(V* a, const V* b) {
    a[0] = larger(b[0], a[0]);
    a[1] = smaller(b[1], a[1]);
  }
};

// Pooled over locations, for weights of channels.
struct PoolGradient : Added {
  static constexpr bool kAct = false, kGrad = true;
  template <class V>
  TRANSFUSE_INLINE void step(V, V g, V, V* s) {
    s[0] = s[0] + g;
  }
};
struct PoolProduct {
  static constexpr int K = 2;
  static constexpr bool kWeight = false, kSum = false;
  static constexpr bool kAct = true, kGrad = true;
  static constexpr double start(int) { return 0.0; }
  template <class V>
  TRANSFUSE_INLINE void step(V a, V g, V, V* s) {
    s[0] = a * g + s[0];
    s[1] = s[1] + a;
  }
  template <class V>
  TRANSFUSE_INLINE void merge(V* a, const V* b) {
    add_all(a, b, K);
  }
};
// e is the sum of the channel's activations.
struct PoolPlus : Added {
  static constexpr bool kSum = true;
  static constexpr bool kAct = false, kGrad = true;
  template <class V>
  TRANSFUSE_INLINE void step(V, V g, V e, V* s) {
    const V square = g * g, below = square * (constant<V>(2.0) + e * g);
    const V eps = constant<V>(kPlusEps);
    s[0] = s[0] + positive(g) * (square / (below < V{} ? V(below - eps) : V(below + eps)));
  }
};

// ---- lines ----------------------------------------------------------------------------------------------------------

// Kept apart, and called: compiled once rather than into every use.
#define TRANSFUSE_APART __attribute__((noinline))

template <class T>
TRANSFUSE_APART void convert(const void* ptr, DType dtype, int64_t at, int64_t stride, int64_t n, T* to) {
  load_row(ptr, dtype, at, stride, n, to);
}

// One tensor of a sample as lines.
struct Lines {
  const void* ptr;
  DType dtype;
  int64_t base, line, inner;  // element offset of the sample, and strides

  template <class T>
  const T* row(int64_t index, int64_t first, int64_t n, T* buffer) const {
    const int64_t at = base + index * line + first * inner;
    if (inner == 1 && dtype == kDirect<T>) return static_cast<const T*>(ptr) + at;
    convert(ptr, dtype, at, inner, n, buffer);
    return buffer;
  }
  // Where that row begins, if what follows it in memory is the rest of it. An address that is not there does no harm:
  // it is only ever prefetched.
  const char* place(int64_t index, int64_t first) const {
    const int64_t at = inner == 1 ? base + index * line + first : base;
    return static_cast<const char*>(ptr) + at * item_size(dtype);
  }
};

TRANSFUSE_INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 3); }

// Sums of lines in the cache would leave the memory idle: what is read next is asked for meanwhile, number by number.
struct Ahead {
  const char* act[kTogether];
  const char* grad[kTogether];
  int64_t item;
};

// sums[k * pitch + i] over U lines, at number i of each. `extra`: a weight per line, or a sum per number of a line.
template <class T, class Mode, int U>
TRANSFUSE_INLINE void across_some(const T* const* a, const T* const* g, const T* extra, int64_t n, int64_t pitch,
                                  const Ahead& ahead, T* sums) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W, K = Mode::K;
  V weight[U];
  for (int u = 0; u < U; ++u) weight[u] = Mode::kWeight ? splat<T>(extra[u]) : V{};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    V s[K];
    for (int k = 0; k < K; ++k) s[k] = load<V>(sums + k * pitch + i);
    const V own = Mode::kSum ? load<V>(extra + i) : V{};
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      if (U > 1 && Mode::kAct) prefetch(ahead.act[u] + i * ahead.item);
      if (U > 1 && Mode::kGrad) prefetch(ahead.grad[u] + i * ahead.item);
      const V av = Mode::kAct ? load<V>(a[u] + i) : V{}, gv = Mode::kGrad ? load<V>(g[u] + i) : V{};
      Mode::step(av, gv, Mode::kSum ? own : weight[u], s);
    }
    for (int k = 0; k < K; ++k) store(sums + k * pitch + i, s[k]);
  }
  for (; i < n; ++i) {
    T s[K];
    for (int k = 0; k < K; ++k) s[k] = sums[k * pitch + i];
    for (int u = 0; u < U; ++u) {
      const T e = Mode::kSum ? extra[i] : Mode::kWeight ? extra[u] : T(0);
      Mode::step(Mode::kAct ? a[u][i] : T(0), Mode::kGrad ? g[u][i] : T(0), e, s);
    }
    for (int k = 0; k < K; ++k) sums[k * pitch + i] = s[k];
  }
}

template <class T>
T* line_buffer() {
  return static_cast<T*>(thread_scratch(sizeof(T) * 2 * kTogether * std::max(kTile, kChunk)));
}

// Lines [first, first + count), numbers [begin, end) of each.
template <class T, class Mode>
TRANSFUSE_APART void across(const Lines& act, const Lines& grad, int64_t first, int64_t count, int64_t begin,
                            int64_t end, const T* extra, int64_t pitch, T* sums, T* buffer) {
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    T* to = sums + at - begin;
    for (int64_t r = 0; r < count; r += kTogether) {
      const int64_t rows = std::min<int64_t>(kTogether, count - r);
      const T *a[kTogether] = {}, *g[kTogether] = {};
      for (int64_t u = 0; u < rows; ++u) {
        if (Mode::kAct) a[u] = act.row<T>(first + r + u, at, n, buffer + u * kTile);
        if (Mode::kGrad) g[u] = grad.row<T>(first + r + u, at, n, buffer + (kTogether + u) * kTile);
      }
      const T* own = Mode::kSum ? extra + at : Mode::kWeight ? extra + r : nullptr;
      Ahead ahead;
      ahead.item = item_size(act.dtype);
      for (int u = 0; u < kTogether; ++u) {
        ahead.act[u] = act.place(first + r + kTogether + u, at);
        ahead.grad[u] = grad.place(first + r + kTogether + u, at);
      }
      if (rows == kTogether) {
        across_some<T, Mode, kTogether>(a, g, own, n, pitch, ahead, to);
      } else {
        for (int64_t u = 0; u < rows; ++u)
          across_some<T, Mode, 1>(a + u, g + u, Mode::kWeight ? own + u : own, n, pitch, ahead, to);
      }
    }
  }
}

template <class T, class Mode>
void start(T* sums, int64_t n) {
  for (int k = 0; k < Mode::K; ++k) std::fill(sums + k * n, sums + (k + 1) * n, (T)Mode::start(k));
}

template <class T, class Mode>
TRANSFUSE_APART void merge_lines(T* total, const T* part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T s[Mode::K], t[Mode::K];
    for (int k = 0; k < Mode::K; ++k) {
      s[k] = total[k * n + i];
      t[k] = part[k * n + i];
    }
    Mode::merge(s, t);
    for (int k = 0; k < Mode::K; ++k) total[k * n + i] = s[k];
  }
}

// result[k] over the n numbers of one line. `extra`: a weight per number, or one sum for all. `next`: where as many
// numbers begin that are read next.
template <class T, class Mode>
TRANSFUSE_APART void along(const Lines& act, const Lines& grad, int64_t index, int64_t n, const T* extra,
                           const char* next, double* result, T* buffer) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W, K = Mode::K, U = 4;
  const int64_t item = item_size(act.dtype);
  const T sum = Mode::kSum ? extra[0] : T(0);
  for (int k = 0; k < K; ++k) result[k] = Mode::start(k);
  for (int64_t at = 0; at < n; at += kChunk) {
    const int64_t length = std::min(kChunk, n - at);
    const T* a = Mode::kAct ? act.row<T>(index, at, length, buffer) : nullptr;
    const T* g = Mode::kGrad ? grad.row<T>(index, at, length, buffer + kChunk) : nullptr;
    const T* weight = Mode::kWeight ? extra + at : nullptr;
    V s[U][K];
    for (int u = 0; u < U; ++u)
      for (int k = 0; k < K; ++k) s[u][k] = splat<T>((T)Mode::start(k));
    const auto take = [&](int64_t i, V* to) {
      const V av = Mode::kAct ? load<V>(a + i) : V{}, gv = Mode::kGrad ? load<V>(g + i) : V{};
      Mode::step(av, gv, Mode::kWeight ? load<V>(weight + i) : splat<T>(sum), to);
    };
    int64_t i = 0;
    for (; i + U * W <= length; i += U * W) {
      for (int64_t b = 0; b < U * W * item; b += 64) prefetch(next + (at + i) * item + b);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) take(i + u * W, s[u]);
    }
    for (; i + W <= length; i += W) take(i, s[0]);
    Mode::merge(s[0], s[1]);
    Mode::merge(s[2], s[3]);
    Mode::merge(s[0], s[2]);
    T rest[K];
    for (int k = 0; k < K; ++k) rest[k] = (T)Mode::start(k);
    for (; i < length; ++i)
      Mode::step(Mode::kAct ? a[i] : T(0), Mode::kGrad ? g[i] : T(0), Mode::kWeight ? weight[i] : sum, rest);
    if constexpr (Mode::start(0) == 0.0) {
      for (int k = 0; k < K; ++k) result[k] += (double)horizontal_sum<T>(s[0][k]) + (double)rest[k];
    } else {
      T lanes[K][W];
      for (int k = 0; k < K; ++k) store(lanes[k], s[0][k]);
      double part[K];
      for (int lane = 0; lane <= W; ++lane) {
        for (int k = 0; k < K; ++k) part[k] = lane < W ? (double)lanes[k][lane] : (double)rest[k];
        Mode::merge(result, part);
      }
    }
  }
}

// ---- maps -----------------------------------------------------------------------------------------------------------

// Both tensors of one call; the second may have another number of locations.
struct Shape {
  DType dtype;
  int64_t batch, channels, locations;
};

bool channels_last(const SaliencyTensor& t, const Shape& s) {
  return t.channel == 1 && s.channels > 1 && (t.location != 1 || s.locations == 1);
}

Lines lines_of(const SaliencyTensor& t, const Shape& s, int64_t sample, bool last) {
  return {t.ptr, s.dtype, sample * t.batch, last ? t.location : t.channel, last ? t.channel : t.location};
}

int64_t groups_of(int64_t lines) { return (lines + kGroup - 1) / kGroup; }

// Calls given(sample, part) for every part of every sample: samples side by side where there are enough of them (what a
// sample has read is still near when its next part comes), parts otherwise. `then(sample)` follows its parts.
template <class F, class G>
void for_each_part(const Parallel& parallel, const Shape& s, int64_t parts, const F& given, const G& then) {
  const auto body = [&](int64_t b, int64_t p) TRANSFUSE_APART { given(b, p); };
  const auto after = [&](int64_t b) TRANSFUSE_APART { then(b); };
  const bool small = s.batch * s.channels * s.locations < kSerial;
  const Parallel serial = serial_parallel();
  const Parallel& workers = small ? serial : parallel;
  if (s.batch >= 2 * parallel.threads || small) {
    for_each_task(workers, s.batch, [&](int64_t b) {
      for (int64_t p = 0; p < parts; ++p) body(b, p);
      after(b);
    });
    return;
  }
  for_each_task(workers, s.batch * parts, [&](int64_t i) { body(i / parts, i % parts); });
  for (int64_t b = 0; b < s.batch; ++b) after(b);
}

// Sums over channels at every location, (batch, K, locations).
template <class T, class Mode>
void over_channels(const Parallel& parallel, const Shape& s, const SaliencyTensor& act, const SaliencyTensor& grad,
                   T* out) {
  constexpr int K = Mode::K;
  const int64_t n = s.locations;
  const auto nothing = [](int64_t) {};
  if (channels_last(Mode::kAct ? act : grad, s)) {
    for_each_part(
        parallel, s, groups_of(n),
        [&](int64_t b, int64_t part) {
          const Lines a = lines_of(act, s, b, true), g = lines_of(grad, s, b, true);
          T* buffer = line_buffer<T>();
          for (int64_t l = part * kGroup; l < std::min(n, (part + 1) * kGroup); ++l) {
            double result[K];
            along<T, Mode>(a, g, l, s.channels, nullptr, (Mode::kAct ? a : g).place(l + 1, 0), result, buffer);
            for (int k = 0; k < K; ++k) out[(b * K + k) * n + l] = (T)result[k];
          }
        },
        nothing);
    return;
  }
  const int64_t groups = groups_of(s.channels);
  std::vector<T> parts((size_t)(s.batch * groups * K * n));
  for_each_part(
      parallel, s, groups,
      [&](int64_t b, int64_t part) {
        const Lines a = lines_of(act, s, b, false), g = lines_of(grad, s, b, false);
        T* sums = parts.data() + (b * groups + part) * K * n;
        start<T, Mode>(sums, n);
        const int64_t first = part * kGroup, count = std::min(kGroup, s.channels - first);
        across<T, Mode>(a, g, first, count, 0, n, nullptr, n, sums, line_buffer<T>());
      },
      [&](int64_t b) {
        T* total = out + b * K * n;
        const T* own = parts.data() + b * groups * K * n;
        std::copy(own, own + K * n, total);
        for (int64_t part = 1; part < groups; ++part) merge_lines<T, Mode>(total, own + part * K * n, n);
      });
}

// The weight of a channel from its pooled sums.
double away_from_zero(double x, double eps) { return x < 0 ? x - eps : x + eps; }

struct GradCam {
  using Pool = PoolGradient;
  static constexpr bool kSumFirst = false;
  static double weight(const double* s, int64_t n) { return s[0] / (double)n; }
};
struct GradCamPlus {
  using Pool = PoolPlus;
  static constexpr bool kSumFirst = true;
  static double weight(const double* s, int64_t) { return s[0]; }
};
struct XGradCam {
  using Pool = PoolProduct;
  static constexpr bool kSumFirst = false;
  static double weight(const double* s, int64_t) { return s[0] / away_from_zero(s[1], kPooledEps); }
};

// Lines are channels: pooled a few at a time, and added to the map at once.
template <class T, class Method>
void weighted_channels(const GradMapArgs& args, const Shape& s, const Parallel& parallel) {
  const int64_t n = s.locations, groups = groups_of(s.channels);
  std::vector<T> parts((size_t)(s.batch * groups * n));
  for_each_part(
      parallel, s, groups,
      [&](int64_t b, int64_t part) {
        const Lines a = lines_of(args.act, s, b, false), g = lines_of(args.grad, s, b, false);
        T* sums = parts.data() + (b * groups + part) * n;
        T* buffer = line_buffer<T>();
        std::fill(sums, sums + n, T(0));
        const int64_t last = std::min(s.channels, (part + 1) * kGroup);
        for (int64_t c = part * kGroup; c < last; c += kTogether) {
          const int64_t count = std::min<int64_t>(kTogether, last - c);
          T weights[kTogether];
          for (int64_t u = 0; u < count; ++u) {
            double pooled[Method::Pool::K], sum = 0.0;
            if (Method::kSumFirst) along<T, Sum>(a, g, c + u, n, nullptr, g.place(c + u, 0), &sum, buffer);
            const T rounded = (T)sum;
            const char* next = Method::Pool::kAct ? g.place(c + u + 1, 0) : a.place(c + u, 0);
            along<T, typename Method::Pool>(a, g, c + u, n, &rounded, next, pooled, buffer);
            weights[u] = (T)Method::weight(pooled, n);
          }
          across<T, Weighted>(a, g, c, count, 0, n, weights, n, sums, buffer);
        }
      },
      [&](int64_t b) {
        T* total = static_cast<T*>(args.out) + b * n;
        const T* own = parts.data() + b * groups * n;
        std::copy(own, own + n, total);
        for (int64_t part = 1; part < groups; ++part)
          for (int64_t i = 0; i < n; ++i) total[i] += own[part * n + i];
      });
}

// Sums over all locations of channels [begin, end), where lines are locations.
template <class T, class Mode>
void pool_block(const Lines& a, const Lines& g, int64_t locations, int64_t begin, int64_t end, const T* extra,
                double* result, T* buffer) {
  const int64_t n = end - begin;
  std::vector<T> sums((size_t)(Mode::K * n));
  std::fill(result, result + Mode::K * n, 0.0);
  for (int64_t l = 0; l < locations; l += kGroup) {
    start<T, Mode>(sums.data(), n);
    across<T, Mode>(a, g, l, std::min(kGroup, locations - l), begin, end, extra, n, sums.data(), buffer);
    for (int64_t i = 0; i < Mode::K * n; ++i) result[i] += (double)sums[(size_t)i];
  }
}

// Lines are locations: weights of all channels first.
template <class T, class Method>
void weighted_locations(const GradMapArgs& args, const Shape& s, const Parallel& parallel) {
  constexpr int K = Method::Pool::K;
  constexpr int64_t kBlockChannels = 256;
  const int64_t n = s.locations, blocks = (s.channels + kBlockChannels - 1) / kBlockChannels;
  std::vector<T> weights((size_t)(s.batch * s.channels));
  const auto pool = [&](int64_t b, int64_t block) {
    const Lines a = lines_of(args.act, s, b, true), g = lines_of(args.grad, s, b, true);
    const int64_t begin = block * kBlockChannels, end = std::min(s.channels, begin + kBlockChannels), m = end - begin;
    T* buffer = line_buffer<T>();
    std::vector<double> pooled((size_t)(K * m));
    std::vector<T> sums((size_t)(Method::kSumFirst ? end : 0));
    if (Method::kSumFirst) {
      std::vector<double> total((size_t)m);
      pool_block<T, Sum>(a, g, n, begin, end, nullptr, total.data(), buffer);
      for (int64_t i = 0; i < m; ++i) sums[(size_t)(begin + i)] = (T)total[(size_t)i];
    }
    pool_block<T, typename Method::Pool>(a, g, n, begin, end, sums.data(), pooled.data(), buffer);
    for (int64_t i = 0; i < m; ++i) {
      double own[K];
      for (int k = 0; k < K; ++k) own[k] = pooled[(size_t)(k * m + i)];
      weights[(size_t)(b * s.channels + begin + i)] = (T)Method::weight(own, n);
    }
  };
  const auto add = [&](int64_t b, int64_t part) {
    const Lines a = lines_of(args.act, s, b, true), g = lines_of(args.grad, s, b, true);
    T* buffer = line_buffer<T>();
    T* out = static_cast<T*>(args.out) + b * n;
    for (int64_t l = part * kGroup; l < std::min(n, (part + 1) * kGroup); ++l) {
      double result;
      along<T, Weighted>(a, g, l, s.channels, weights.data() + b * s.channels, a.place(l + 1, 0), &result, buffer);
      out[l] = (T)result;
    }
  };
  const auto nothing = [](int64_t) {};
  const int64_t parts = groups_of(n);
  if (s.batch >= 2 * parallel.threads) {
    for_each_part(
        parallel, s, 1,
        [&](int64_t b, int64_t) {
          for (int64_t block = 0; block < blocks; ++block) pool(b, block);
          for (int64_t part = 0; part < parts; ++part) add(b, part);
        },
        nothing);
    return;
  }
  for_each_part(parallel, s, blocks, pool, nothing);
  for_each_part(parallel, s, parts, add, nothing);
}

template <class T, class Method>
void weighted(const GradMapArgs& args, const Shape& s, const Parallel& parallel) {
  if (channels_last(args.act, s))
    weighted_locations<T, Method>(args, s, parallel);
  else
    weighted_channels<T, Method>(args, s, parallel);
}

template <class T>
void grad_map_as(const GradMapArgs& args, const Parallel& parallel) {
  const Shape s{args.dtype, args.batch, args.channels, args.locations};
  T* out = static_cast<T*>(args.out);
  switch (args.method) {
    case MapMethod::gradcam: weighted<T, GradCam>(args, s, parallel); return;
    case MapMethod::gradcam_pp: weighted<T, GradCamPlus>(args, s, parallel); return;
    case MapMethod::xgradcam: weighted<T, XGradCam>(args, s, parallel); return;
    case MapMethod::layercam: over_channels<T, PositiveGradient>(parallel, s, args.act, args.grad, out); return;
    case MapMethod::hirescam: over_channels<T, Product>(parallel, s, args.act, args.grad, out); return;
    case MapMethod::elementwise: over_channels<T, PositiveProduct>(parallel, s, args.act, args.grad, out); return;
  }
}

// ---- NormGrad -------------------------------------------------------------------------------------------------------

int64_t volume(const int64_t* grid) { return grid[0] * grid[1] * grid[2]; }

template <class T>
void root(T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(out[i]);
}

template <class T>
void scaled(const NormGradArgs& args, const Shape& s, const Parallel& parallel) {
  T* out = static_cast<T*>(args.out);
  switch (args.phase2) {
    case Phase2::norm: over_channels<T, ProductSquare>(parallel, s, args.act, args.grad, out); break;
    case Phase2::filter_norm: over_channels<T, PositiveProductSquare>(parallel, s, args.act, args.grad, out); break;
    case Phase2::sum: over_channels<T, Product>(parallel, s, args.act, args.grad, out); return;
    case Phase2::max: over_channels<T, ProductMax>(parallel, s, args.act, args.grad, out); return;
  }
  root(out, s.batch * s.locations);
}

// The statistics that a phase 2 needs, of one tensor: (batch, K, locations).
template <class T>
int statistics(Phase2 phase2, const SaliencyTensor& x, const Shape& s, const Parallel& parallel, std::vector<T>* out) {
  const int count = phase2 == Phase2::filter_norm || phase2 == Phase2::max ? 2 : 1;
  out->resize((size_t)(s.batch * count * s.locations));
  switch (phase2) {
    case Phase2::norm: over_channels<T, Square>(parallel, s, x, x, out->data()); break;
    case Phase2::filter_norm: over_channels<T, SignedSquares>(parallel, s, x, x, out->data()); break;
    case Phase2::sum: over_channels<T, Sum>(parallel, s, x, x, out->data()); break;
    case Phase2::max: over_channels<T, Extremes>(parallel, s, x, x, out->data()); break;
  }
  return count;
}

template <class T>
void bias(const NormGradArgs& args, const Shape& s, const Parallel& parallel) {
  std::vector<T> found;
  const int count = statistics(args.phase2, args.grad, s, parallel, &found);
  T* out = static_cast<T*>(args.out);
  for (int64_t b = 0; b < s.batch; ++b)
    std::copy_n(found.data() + b * count * s.locations, s.locations, out + b * s.locations);
  if (args.phase2 == Phase2::norm || args.phase2 == Phase2::filter_norm) root(out, s.batch * s.locations);
}

// One statistic of the activations over the neighbourhood of an output location.
template <class T>
struct Neighbourhood {
  const NormGradArgs& args;
  int64_t at[3];  // first input position of the neighbourhood, padding counted from -1 down

  template <class F>
  void each(const F& body) const {
    for (int64_t i = 0; i < args.kernel[0]; ++i)
      for (int64_t j = 0; j < args.kernel[1]; ++j)
        for (int64_t k = 0; k < args.kernel[2]; ++k) {
          const int64_t z = at[0] + i * args.dilation[0], y = at[1] + j * args.dilation[1],
                        x = at[2] + k * args.dilation[2];
          const bool inside = z >= 0 && z < args.grid[0] && y >= 0 && y < args.grid[1] && x >= 0 && x < args.grid[2];
          body(inside ? (z * args.grid[1] + y) * args.grid[2] + x : int64_t(-1));
        }
  }
  double sum(const T* map) const {
    double total = 0.0;
    each([&](int64_t i) { total += i < 0 ? 0.0 : (double)map[i]; });
    return total;
  }
  template <bool kLargest>
  double extreme(const T* map) const {
    double found = kLargest ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::infinity();
    each([&](int64_t i) {
      const double x = i < 0 ? 0.0 : (double)map[i];
      found = kLargest ? larger(x, found) : smaller(x, found);
    });
    return found;
  }
};

template <class T>
void convolved(const NormGradArgs& args, const Parallel& parallel) {
  const int64_t n = volume(args.grid), m = volume(args.out_grid);
  const Shape in{args.dtype, args.batch, args.act_channels, n}, out{args.dtype, args.batch, args.grad_channels, m};
  std::vector<T> of_act, of_grad;
  const int count = statistics(args.phase2, args.act, in, parallel, &of_act);
  statistics(args.phase2, args.grad, out, parallel, &of_grad);
  const Parallel serial = serial_parallel();
  for_each_task(args.batch * m < kSerial ? serial : parallel, args.batch, [&](int64_t b) {
    const T *a = of_act.data() + b * count * n, *g = of_grad.data() + b * count * m;
    T* to = static_cast<T*>(args.out) + b * m;
    Neighbourhood<T> near{args, {0, 0, 0}};
    for (int64_t i = 0; i < m; ++i) {
      const int64_t z = i / (args.out_grid[1] * args.out_grid[2]), y = i / args.out_grid[2] % args.out_grid[1];
      const int64_t position[3] = {z, y, i % args.out_grid[2]};
      for (int d = 0; d < 3; ++d) near.at[d] = position[d] * args.step[d] - args.padding[d];
      double value = 0.0;
      // In double: products of squares leave the range of single precision.
      switch (args.phase2) {
        case Phase2::norm: value = std::sqrt(near.sum(a) * (double)g[i]); break;
        case Phase2::filter_norm:
          value = std::sqrt(near.sum(a) * (double)g[i] + near.sum(a + n) * (double)g[m + i]);
          break;
        case Phase2::sum: value = near.sum(a) * (double)g[i]; break;
        case Phase2::max: {
          const double high = near.template extreme<true>(a), low = near.template extreme<false>(a + n);
          const double top = (double)g[i], bottom = (double)g[m + i];
          value = larger(larger(high * top, high * bottom), larger(low * top, low * bottom));
          break;
        }
      }
      to[i] = (T)value;
    }
  });
}

// ---- NormGrad, depth-wise: neighbourhoods of every channel by itself ------------------------------------------------

// Planes are padded by zeros all around, so that neighbours are at fixed distances in one run of numbers.
struct Padded {
  int64_t size[3], offset[3], count, front;

  explicit Padded(const NormGradArgs& args) {
    for (int d = 0; d < 3; ++d) size[d] = args.grid[d] + 2 * args.padding[d];
    offset[2] = args.padding[2];
    offset[1] = args.padding[1] * size[2];
    offset[0] = args.padding[0] * size[1] * size[2];
    front = offset[0] + offset[1] + offset[2];  // the furthest neighbour, and the first place of the grid
    count = volume(size);
  }
};

// part[o + i] (+)= over the neighbours -step, 0, step.
template <class T, class F>
TRANSFUSE_INLINE void three(const T* from, int64_t step, int64_t n, T* to, const F& fold) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W)
    store(to + i, fold(fold(load<V>(from + i - step), load<V>(from + i)), load<V>(from + i + step)));
  for (; i < n; ++i) to[i] = fold(fold(from[i - step], from[i]), from[i + step]);
}

// Along every axis of kernel 3; `spare` is as long. Both have `margin` numbers before and behind.
template <class T, class F>
const T* neighbours(const Padded& p, T* plane, T* spare, const F& fold) {
  for (int d = 2; d >= 0; --d) {
    if (p.offset[d] == 0) continue;
    three(plane, p.offset[d], p.count, spare, fold);
    std::swap(plane, spare);
  }
  return plane;
}

template <class T>
struct Depthwise {
  using V = typename Simd<T>::V;
  static constexpr int W = Simd<T>::W;
  const NormGradArgs& args;
  const Shape s;
  const Padded p;
  const int64_t margin, length;

  Depthwise(const NormGradArgs& a, const Shape& shape)
      : args(a), s(shape), p(a), margin(p.front + W), length(p.count + 2 * (p.front + W)) {}

  // Channels [first, first + count) of a tensor into padded planes.
  void load_planes(const SaliencyTensor& t, int64_t b, int64_t first, int64_t count, T* planes) const {
    std::fill(planes, planes + count * length, T(0));
    const bool last = channels_last(t, s);
    T few[kBlock];
    std::vector<T> row((size_t)(last ? 0 : args.grid[2]));
    for (int64_t z = 0; z < args.grid[0]; ++z)
      for (int64_t y = 0; y < args.grid[1]; ++y) {
        const int64_t from = (z * args.grid[1] + y) * args.grid[2];
        T* to = planes + margin + p.front + z * p.size[1] * p.size[2] + y * p.size[2];
        if (!last) {
          for (int64_t c = 0; c < count; ++c)
            convert(t.ptr, s.dtype, b * t.batch + (first + c) * t.channel + from * t.location, t.location, args.grid[2],
                    to + c * length);
          continue;
        }
        for (int64_t x = 0; x < args.grid[2]; ++x) {
          convert(t.ptr, s.dtype, b * t.batch + first * t.channel + (from + x) * t.location, t.channel, count, few);
          for (int64_t c = 0; c < count; ++c) to[c * length + x] = few[c];
        }
      }
  }

  template <class F>
  void each(T* to, const T* x, const F& body) const {
    int64_t i = 0;
    for (; i + W <= length; i += W) store(to + i, body(load<V>(x + i)));
    for (; i < length; ++i) to[i] = body(x[i]);
  }
  template <class F>
  void fold(T* to, const T* x, const T* g, const F& body) const {
    int64_t i = 0;
    for (; i + W <= p.count; i += W) store(to + i, body(load<V>(to + i), load<V>(x + i), load<V>(g + i)));
    for (; i < p.count; ++i) to[i] = body(to[i], x[i], g[i]);
  }

  // One channel added to the sums, `a` and `g` padded planes, three spare ones.
  void add(const T* a, const T* g, T* spare, T* sums) const {
    T *one = spare, *two = spare + length;
    const auto plus = [](auto x, auto y) { return x + y; };
    const auto squares = [](auto x) { return x * x; };
    const T* own = g + margin;
    const auto weigh = [](auto total, auto x, auto y) { return y * y * x + total; };
    switch (args.phase2) {
      case Phase2::norm:
        each(one, a, squares);
        fold(sums, neighbours(p, one + margin, two + margin, plus), own, weigh);
        return;
      case Phase2::filter_norm:
        each(one, a, [](auto x) { return positive(x) * positive(x); });
        fold(sums, neighbours(p, one + margin, two + margin, plus), own,
             [](auto total, auto x, auto y) { return positive(y) * positive(y) * x + total; });
        each(one, a, [](auto x) { return negative(x) * negative(x); });
        fold(sums, neighbours(p, one + margin, two + margin, plus), own,
             [](auto total, auto x, auto y) { return negative(y) * negative(y) * x + total; });
        return;
      case Phase2::sum:
        each(one, a, [](auto x) { return x; });
        fold(sums, neighbours(p, one + margin, two + margin, plus), own,
             [](auto total, auto x, auto y) { return x * y + total; });
        return;
      case Phase2::max: {
        const auto copy = [](auto x) { return x; };
        const auto product = [](auto total, auto x, auto y) { return larger(decltype(x * y)(x * y), total); };
        each(one, a, copy);
        fold(sums, neighbours(p, one + margin, two + margin, [](auto x, auto y) { return larger(y, x); }), own,
             product);
        each(one, a, copy);
        fold(sums, neighbours(p, one + margin, two + margin, [](auto x, auto y) { return smaller(y, x); }), own,
             product);
        return;
      }
    }
  }

  void run(const Parallel& parallel) const {
    const int64_t groups = groups_of(s.channels), n = s.locations;
    const bool largest = args.phase2 == Phase2::max;
    const T first = largest ? -std::numeric_limits<T>::infinity() : T(0);
    std::vector<T> parts((size_t)(s.batch * groups * p.count), first);
    for_each_part(
        parallel, s, groups,
        [&](int64_t b, int64_t part) {
          std::vector<T> memory((size_t)((2 * kBlock + 2) * length));
          T *a = memory.data(), *g = a + kBlock * length, *spare = g + kBlock * length;
          const int64_t last = std::min(s.channels, (part + 1) * kGroup);
          for (int64_t c = part * kGroup; c < last; c += kBlock) {
            const int64_t count = std::min(kBlock, last - c);
            load_planes(args.act, b, c, count, a);
            load_planes(args.grad, b, c, count, g);
            for (int64_t i = 0; i < count; ++i)
              add(a + i * length, g + i * length, spare, parts.data() + (b * groups + part) * p.count);
          }
        },
        [&](int64_t b) {
          T* out = static_cast<T*>(args.out) + b * n;
          for (int64_t z = 0; z < args.grid[0]; ++z)
            for (int64_t y = 0; y < args.grid[1]; ++y)
              for (int64_t x = 0; x < args.grid[2]; ++x) {
                const int64_t at = p.front + (z * p.size[1] + y) * p.size[2] + x;
                T total = first;
                for (int64_t part = 0; part < groups; ++part) {
                  const T own = parts[(size_t)((b * groups + part) * p.count + at)];
                  total = largest ? larger(own, total) : total + own;
                }
                if (args.phase2 == Phase2::norm || args.phase2 == Phase2::filter_norm) total = std::sqrt(total);
                *out++ = total;
              }
        });
  }
};

template <class T>
void normgrad_as(const NormGradArgs& args, const Parallel& parallel) {
  const Shape s{args.dtype, args.batch, args.grad_channels, volume(args.out_grid)};
  switch (args.phase1) {
    case Phase1::scaling: scaled<T>(args, s, parallel); return;
    case Phase1::bias: bias<T>(args, s, parallel); return;
    case Phase1::conv: convolved<T>(args, parallel); return;
    case Phase1::depthwise: Depthwise<T>(args, s).run(parallel); return;
  }
}

void grad_map(const GradMapArgs& args, const Parallel& parallel) {
  args.dtype == DType::f64 ? grad_map_as<double>(args, parallel) : grad_map_as<float>(args, parallel);
}

void normgrad(const NormGradArgs& args, const Parallel& parallel) {
  args.dtype == DType::f64 ? normgrad_as<double>(args, parallel) : normgrad_as<float>(args, parallel);
}

}  // namespace

extern const SaliencyKernels kSaliency;
const SaliencyKernels kSaliency = {grad_map, normgrad};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
