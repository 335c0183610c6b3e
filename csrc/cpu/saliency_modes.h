// What the saliency kernels accumulate, of an activation a, a gradient g and an extra number e.
//
// Written for vectors and numbers alike. NaN must survive, so a comparison decides what is left out, never what stays.
#pragma once

#include <limits>
#include <type_traits>
#include <utility>

#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr double kPlusEps = 1e-6;

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

}  // namespace
}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
