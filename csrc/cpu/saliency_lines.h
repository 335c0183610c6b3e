// The two reductions that saliency maps are made of: across lines, into as many sums as a line is long, and along a
// line, into one sum for each.
#pragma once

#include <algorithm>

#include "saliency_modes.h"
#include "transfuse/saliency.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kGroup = 64;        // lines whose sums are taken in one go
constexpr int kTogether = 4;          // lines read side by side
constexpr int64_t kTile = 1024;       // numbers of a line at a time, where lines are converted
constexpr int64_t kChunk = 2048;      // numbers along a line in single precision before sums are widened
constexpr int64_t kSerial = 1 << 15;  // numbers below which waking other threads does not pay

template <class T>
constexpr DType kDirect = sizeof(T) == 8 ? DType::f64 : DType::f32;

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
    T lanes[K][W], rest[K];
    for (int k = 0; k < K; ++k) {
      store(lanes[k], s[0][k]);
      rest[k] = (T)Mode::start(k);
    }
    for (; i < length; ++i)
      Mode::step(Mode::kAct ? a[i] : T(0), Mode::kGrad ? g[i] : T(0), Mode::kWeight ? weight[i] : sum, rest);
    double part[K];
    for (int lane = 0; lane <= W; ++lane) {
      for (int k = 0; k < K; ++k) part[k] = lane < W ? (double)lanes[k][lane] : (double)rest[k];
      Mode::merge(result, part);
    }
  }
}

// ---- samples and their parts ----------------------------------------------------------------------------------------

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

}  // namespace
}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
