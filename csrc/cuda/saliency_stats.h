// What the CUDA saliency kernels accumulate: statistics of activations, gradients and weights, one number at a time.
#pragma once

#include "device.h"

namespace transfuse {
namespace saliency {

// What is accumulated of an activation a, a gradient g and a weight. One tensor alone is given as the activation.
enum class Stat : int {
  product,
  positive_product,
  positive_gradient,
  product_square,
  positive_product_square,
  product_max,
  weighted,
  square,
  positive_square,
  sum,
  largest,
  signed_squares,
  extremes
};

__host__ __device__ inline bool reads_gradient(Stat s) { return s <= Stat::product_max; }
__host__ __device__ inline int numbers_of(Stat s) { return s >= Stat::signed_squares ? 2 : 1; }
__device__ inline bool is_largest(Stat s, int k) {
  return s == Stat::product_max || s == Stat::largest || (s == Stat::extremes && k == 0);
}
__device__ inline bool is_smallest(Stat s, int k) { return s == Stat::extremes && k == 1; }

// NaN must survive, so a comparison decides what is left out, never what stays.
template <class A>
__device__ inline A positive(A x) {
  return x < A(0) ? A(0) : x;
}
template <class A>
__device__ inline A negative(A x) {
  return x > A(0) ? A(0) : x;
}
template <class A>
__device__ inline A larger(A a, A b) {
  return a > b || a != a ? a : b;
}
template <class A>
__device__ inline A smaller(A a, A b) {
  return a < b || a != a ? a : b;
}
__device__ inline float infinity_of(float) { return __int_as_float(0x7f800000); }
__device__ inline double infinity_of(double) { return (double)__int_as_float(0x7f800000); }

template <class A>
__device__ inline A start_of(Stat s, int k) {
  return is_largest(s, k) ? -infinity_of(A()) : is_smallest(s, k) ? infinity_of(A()) : A(0);
}
template <class A>
__device__ inline A merged(Stat s, int k, A total, A part) {
  return is_largest(s, k) ? larger(part, total) : is_smallest(s, k) ? smaller(part, total) : total + part;
}

// The statistic is the same for all threads of a launch: one branch for a pack of numbers.
template <class A, int P>
__device__ inline void step(Stat stat, const A (&a)[P], const A (&g)[P], const A (&e)[P], A (&s)[2][P]) {
  const auto each = [&](auto body) {
#pragma unroll
    for (int i = 0; i < P; ++i) body(a[i], g[i], e[i], s[0][i], s[1][i]);
  };
  switch (stat) {
    case Stat::product: return each([](A x, A y, A, A& s0, A&) { s0 += x * y; });
    case Stat::positive_product: return each([](A x, A y, A, A& s0, A&) { s0 += positive(x * y); });
    case Stat::positive_gradient: return each([](A x, A y, A, A& s0, A&) { s0 += positive(y) * x; });
    case Stat::product_square: return each([](A x, A y, A, A& s0, A&) { s0 += x * y * (x * y); });
    case Stat::positive_product_square:
      return each([](A x, A y, A, A& s0, A&) {
        const A t = positive(x * y);
        s0 += t * t;
      });
    case Stat::product_max: return each([](A x, A y, A, A& s0, A&) { s0 = larger(A(x * y), s0); });
    case Stat::weighted: return each([](A x, A, A w, A& s0, A&) { s0 += x * w; });
    case Stat::square: return each([](A x, A, A, A& s0, A&) { s0 += x * x; });
    case Stat::positive_square:
      return each([](A x, A, A, A& s0, A&) {
        const A t = positive(x);
        s0 += t * t;
      });
    case Stat::sum: return each([](A x, A, A, A& s0, A&) { s0 += x; });
    case Stat::largest: return each([](A x, A, A, A& s0, A&) { s0 = larger(x, s0); });
    case Stat::signed_squares:
      return each([](A x, A, A, A& s0, A& s1) {
        const A p = positive(x), m = negative(x);
        s0 += p * p;
        s1 += m * m;
      });
    case Stat::extremes:
      return each([](A x, A, A, A& s0, A& s1) {
        s0 = larger(x, s0);
        s1 = smaller(x, s1);
      });
  }
}

}  // namespace saliency
}  // namespace transfuse
