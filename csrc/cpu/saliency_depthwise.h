// NormGrad of depth-wise convolutions: the neighbourhoods of every channel by itself.
#pragma once

#include <limits>
#include <vector>

#include "saliency_lines.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kBlock = 16;  // channels that are transposed at a time

int64_t volume(const int64_t* grid) { return grid[0] * grid[1] * grid[2]; }

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

}  // namespace
}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
