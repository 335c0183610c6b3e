// Gradient, Hessian diagonal and Hessian-vector product of a linear head on the CPU, at one ISA level (see
// head_curvature.h).
#include "transfuse/head_curvature.h"

#include <algorithm>
#include <vector>

#include "row_products.h"
#include "transfuse/gemm_tile.h"
#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kDotRows = 16;      // samples per task of products over columns
constexpr int64_t kRows = 64;         // samples per block of products over samples
constexpr int64_t kSerial = 1 << 16;  // multiply-adds in all below which waking other threads does not pay

// Samples [first, last) of one domain.
struct Rows {
  int64_t domain, first, last;
};

template <class T>
struct Head {
  const HeadArgs& a;
  int64_t width;   // D
  int64_t padded;  // C in whole tiles

  explicit Head(const HeadArgs& args)
      : a(args), width(args.columns + (args.bias != nullptr)), padded(round_up(args.classes, kTileRows)) {}
  const T* x(int64_t n) const { return static_cast<const T*>(a.x) + n * a.columns; }
  const T* weight(int64_t c) const { return static_cast<const T*>(a.weight) + c * a.columns; }
  T* p(int64_t n) const { return static_cast<T*>(a.p) + n * a.classes; }
  T* rest(int64_t n) const { return static_cast<T*>(a.rest) + n * a.classes; }
  const T* target(int64_t n) const { return static_cast<const T*>(a.targets) + n * a.classes; }
  T* u(int64_t n) const { return static_cast<T*>(a.u) + n * a.classes; }
  const T* vectors(int64_t e) const {
    return static_cast<const T*>(a.vectors) + (a.shared ? 0 : e * a.classes * width);
  }
  bool product() const { return a.kind == HeadKind::product; }
  int64_t domain_size(int64_t e) const { return a.offsets[e + 1] - a.offsets[e]; }
  bool diagonal() const { return a.kind == HeadKind::diagonal; }
};

// Stretches of at most `most` samples, none across two domains.
std::vector<Rows> stretches(const HeadArgs& a, int64_t most) {
  std::vector<Rows> found;
  for (int64_t e = 0; e < a.domains; ++e)
    for (int64_t at = a.offsets[e]; at < a.offsets[e + 1]; at += most)
      found.push_back({e, at, std::min(at + most, a.offsets[e + 1])});
  return found;
}

template <class F>
void each(const HeadArgs& a, const Parallel& parallel, int64_t count, const F& body) {
  const Parallel serial = serial_parallel();
  for_each_task(a.samples * a.classes * a.columns < kSerial ? serial : parallel, count, body);
}

// ---- one sample -----------------------------------------------------------------------------------------------------

TRANSFUSE_INLINE float exponential(float x) { return std::exp(x); }
TRANSFUSE_INLINE double exponential(double x) { return std::exp(x); }

// z -> p and 1 - p, both with all their digits: 1 - p of the largest is the sum of the others.
template <class T>
void probabilities(int64_t classes, const T* z, T* p, T* rest) {
  if (classes == 1) {
    const T small = exponential(-std::fabs(z[0])), total = T(1) + small;
    p[0] = (z[0] >= T(0) ? T(1) : small) / total;
    rest[0] = (z[0] >= T(0) ? small : T(1)) / total;
    if (!(z[0] == z[0])) p[0] = rest[0] = z[0];
    return;
  }
  int64_t top = 0;
  for (int64_t c = 1; c < classes; ++c)
    if (z[c] > z[top]) top = c;
  T others = T(0);
  for (int64_t c = 0; c < classes; ++c) {
    p[c] = exponential(z[c] - z[top]);
    if (c != top) others += p[c];
  }
  const T total = p[top] + others, inverse = T(1) / total;
  for (int64_t c = 0; c < classes; ++c) {
    rest[c] = (c == top ? others : total - p[c]) * inverse;
    p[c] *= inverse;
  }
}

// g -> J g = p * (g - p.g), for one output p (1 - p) g, in place. For the largest class it is p (g (1 - p) - sum of the
// others), which keeps its digits when p is near 1. Returns p.g.
template <class T>
T jacobian(int64_t classes, const T* p, const T* rest, T* g) {
  if (classes == 1) {
    const T along = p[0] * g[0];
    g[0] *= p[0] * rest[0];
    return along;
  }
  int64_t top = 0;
  for (int64_t c = 1; c < classes; ++c)
    if (p[c] > p[top]) top = c;
  T others = T(0);
  for (int64_t c = 0; c < classes; ++c)
    if (c != top) others += p[c] * g[c];
  const T along = others + p[top] * g[top];
  for (int64_t c = 0; c < classes; ++c) g[c] = p[c] * (c == top ? g[c] * rest[c] - others : g[c] - along);
  return along;
}

// The factor of the sample in the result: p (1 - p) / n, (p - y) / n or J u / n.
template <class T>
void row_factor(const Head<T>& head, int64_t sample, T scale, T* left) {
  const T *p = head.p(sample), *rest = head.rest(sample);
  const int64_t classes = head.a.classes;
  switch (head.a.kind) {
    case HeadKind::diagonal:
      for (int64_t c = 0; c < classes; ++c) left[c] = scale * (p[c] * rest[c]);
      return;
    case HeadKind::gradient:
      for (int64_t c = 0; c < classes; ++c) left[c] = scale * (p[c] - head.target(sample)[c]);
      return;
    case HeadKind::product:
      for (int64_t c = 0; c < classes; ++c) left[c] = scale * head.u(sample)[c];
      jacobian(classes, p, rest, left);
      return;
  }
}

// g, the gradient by the factor of the sample (n times too large), becomes that by its logits; turn becomes that by u.
template <class T>
void row_backward(const Head<T>& head, int64_t sample, T scale, T* g, T* turn) {
  const T *p = head.p(sample), *rest = head.rest(sample);
  const int64_t classes = head.a.classes;
  for (int64_t c = 0; c < classes; ++c) g[c] *= scale;
  if (head.diagonal())
    for (int64_t c = 0; c < classes; ++c) g[c] *= rest[c] - p[c];
  if (head.product()) {
    // By p: g * (u - p.u) - u * p.g.
    const T* u = head.u(sample);
    T mean = T(0);
    for (int64_t c = 0; c < classes; ++c) {
      mean += p[c] * u[c];
      turn[c] = g[c];
    }
    const T along = jacobian(classes, p, rest, turn);
    for (int64_t c = 0; c < classes; ++c) g[c] = g[c] * (u[c] - mean) - u[c] * along;
  }
  jacobian(classes, p, rest, g);
}

// ---- products over the samples -------------------------------------------------------------------------------------

// Columns [k, k + live) of `rows` rows into a block of `columns` columns, zeros behind; column `ones` is 1.
template <class T>
void pack(const T* from, int64_t stride, int64_t rows, int64_t k, int64_t live, int64_t ones, int64_t columns, T* to) {
  for (int64_t i = 0; i < rows; ++i, to += columns) {
    const int64_t real = std::min(live, ones - k);
    if (real > 0) copy_row(from + i * stride + k, real, to);
    for (int64_t j = real; j < columns; ++j) to[j] = j < live ? T(1) : T(0);
  }
}

template <class T>
void square(int64_t n, T* block) {
  for (int64_t i = 0; i < n; ++i) block[i] *= block[i];
}

// Columns per task: narrow enough that there are tasks for several threads, in whole panels of vectors.
template <class T>
constexpr int64_t block_columns() {
  return kPanelVecs * Simd<T>::W * (kVectorBytes == 64 ? 2 : 4);
}

template <class T>
void run_forward(const HeadArgs& args, const Parallel& parallel) {
  using Plain = DotPlain<T>;
  const Head<T> head(args);
  const int64_t classes = args.classes, padded = head.padded, columns = block_columns<T>();
  std::vector<T> left((size_t)(args.samples * padded), T(0));
  const std::vector<Rows> parts = stretches(args, kDotRows);
  each(args, parallel, (int64_t)parts.size(), [&](int64_t task) {
    const Rows& part = parts[(size_t)task];
    const T scale = T(1) / (T)head.domain_size(part.domain);
    T* z = static_cast<T*>(thread_scratch(sizeof(T) * (size_t)(kDotRows * classes)));
    const int64_t rows = part.last - part.first;
    dots<T, false>(rows, args.columns, classes, head.x(part.first), args.columns, head.weight(0), args.columns,
                   static_cast<const T*>(args.bias), 1, z, classes);
    if (head.product()) {
      const T* v = head.vectors(part.domain);
      dots<T, false>(rows, args.columns, classes, head.x(part.first), args.columns, v, head.width,
                     args.bias == nullptr ? nullptr : v + args.columns, head.width, head.u(part.first), classes);
    }
    for (int64_t n = part.first; n < part.last; ++n, z += classes) {
      probabilities(classes, z, head.p(n), head.rest(n));
      row_factor(head, n, scale, &left[(size_t)(n * padded)]);
    }
  });
  const int64_t blocks = (head.width + columns - 1) / columns;
  each(args, parallel, args.domains * blocks, [&](int64_t task) {
    const int64_t e = task / blocks, k = task % blocks * columns, live = std::min(columns, head.width - k);
    T* x = static_cast<T*>(thread_scratch(sizeof(T) * (size_t)((kRows + padded) * columns)));
    T* sum = x + kRows * columns;
    for (int64_t at = args.offsets[e]; at < args.offsets[e + 1]; at += kRows) {
      const int64_t rows = std::min(kRows, args.offsets[e + 1] - at);
      pack(head.x(at), args.columns, rows, k, live, args.columns, columns, x);
      if (head.diagonal()) square(rows * columns, x);
      gemm<Plain, true>((int)padded, (int)(columns / Simd<T>::W), rows, &left[(size_t)(at * padded)], padded, x,
                        columns, sum, columns, at != args.offsets[e]);
    }
    T* out = static_cast<T*>(args.out) + e * classes * head.width + k;
    for (int64_t c = 0; c < classes; ++c) copy_row(sum + c * columns, live, out + c * head.width);
  });
}

template <class T>
void run_backward(const HeadArgs& args, const Parallel& parallel) {
  using Plain = DotPlain<T>;
  const Head<T> head(args);
  const int64_t classes = args.classes, padded = head.padded, columns = block_columns<T>(), width = head.width;
  const T* grad = static_cast<const T*>(args.grad);
  // A block of samples is read in whole tiles, the last of them beyond the last sample.
  std::vector<T> left((size_t)((args.samples + kTileRows) * padded), T(0)), slope = left, turn;
  if (head.product()) turn = left;
  const std::vector<Rows> parts = stretches(args, kDotRows);
  each(args, parallel, (int64_t)parts.size(), [&](int64_t task) {
    const Rows& part = parts[(size_t)task];
    const T scale = T(1) / (T)head.domain_size(part.domain);
    const T* own = grad + part.domain * classes * width;
    const T* ones = args.bias == nullptr ? nullptr : own + args.columns;
    const auto product = head.diagonal() ? dots<T, true> : dots<T, false>;
    T* g = &slope[(size_t)(part.first * padded)];
    product(part.last - part.first, args.columns, classes, head.x(part.first), args.columns, own, width, ones, width, g,
            padded);
    for (int64_t n = part.first; n < part.last; ++n, g += padded) {
      row_backward(head, n, scale, g, head.product() ? &turn[(size_t)(n * padded)] : nullptr);
      row_factor(head, n, scale, &left[(size_t)(n * padded)]);
    }
  });
  const int64_t blocks = (width + columns - 1) / columns;
  const int vecs = (int)(columns / Simd<T>::W);
  each(args, parallel, blocks, [&](int64_t task) {
    const int64_t k = task * columns, live = std::min(columns, width - k);
    // Of x, W and their gradients, without the column of ones.
    const int64_t real = std::max<int64_t>(0, std::min(live, args.columns - k));
    const size_t tile = (size_t)(round_up(kRows, kTileRows) * columns), matrix = (size_t)(padded * columns);
    T* x = static_cast<T*>(thread_scratch(sizeof(T) * (2 * tile + 5 * matrix)));
    T *moved = x + tile, *weight = moved + tile, *own = weight + matrix, *vectors = own + matrix;
    T *sum = vectors + matrix, *turned = sum + matrix;
    pack(head.weight(0), args.columns, classes, k, real, args.columns, columns, weight);
    int64_t domain = -1, turned_domain = -1;
    for (const Rows& piece : stretches(args, kRows)) {
      const int64_t rows = piece.last - piece.first, at = piece.first * padded;
      const T *l = &left[(size_t)at], *s = &slope[(size_t)at];
      const T* t = head.product() ? &turn[(size_t)at] : nullptr;
      pack(head.x(piece.first), args.columns, rows, k, live, args.columns, columns, x);
      if (args.head_grad)
        gemm<Plain, true>((int)padded, vecs, rows, s, padded, x, columns, sum, columns, piece.first > 0);
      if (args.vectors_grad != nullptr) {
        const bool more = args.shared ? piece.first > 0 : piece.domain == turned_domain;
        turned_domain = piece.domain;
        gemm<Plain, true>((int)padded, vecs, rows, t, padded, x, columns, turned, columns, more);
        if (piece.last == (args.shared ? args.samples : args.offsets[piece.domain + 1])) {
          T* out = static_cast<T*>(args.vectors_grad) + (args.shared ? 0 : piece.domain * classes * width) + k;
          for (int64_t c = 0; c < classes; ++c) copy_row(turned + c * columns, live, out + c * width);
        }
      }
      if (args.x_grad == nullptr || real == 0) continue;
      if (piece.domain != domain) {
        domain = piece.domain;
        pack(grad + domain * classes * width, width, classes, k, real, width, columns, own);
        if (head.product()) pack(head.vectors(domain), width, classes, k, real, width, columns, vectors);
      }
      const int tiled = (int)round_up(rows, kTileRows);
      gemm<Plain, false>(tiled, vecs, classes, l, padded, own, columns, moved, columns, false);
      if (head.diagonal())
        for (int64_t i = 0; i < rows * columns; ++i) moved[i] *= T(2) * x[i];
      if (head.product()) gemm<Plain, false>(tiled, vecs, classes, t, padded, vectors, columns, moved, columns, true);
      gemm<Plain, false>(tiled, vecs, classes, s, padded, weight, columns, moved, columns, true);
      T* out = static_cast<T*>(args.x_grad) + piece.first * args.columns + k;
      for (int64_t i = 0; i < rows; ++i) copy_row(moved + i * columns, real, out + i * args.columns);
    }
    if (!args.head_grad) return;
    for (int64_t c = 0; c < classes; ++c) {
      if (real > 0) copy_row(sum + c * columns, real, static_cast<T*>(args.weight_grad) + c * args.columns + k);
      if (real < live) static_cast<T*>(args.bias_grad)[c] = sum[c * columns + real];
    }
  });
}

void forward(const HeadArgs& args, const Parallel& parallel) {
  args.f64 ? run_forward<double>(args, parallel) : run_forward<float>(args, parallel);
}
void backward(const HeadArgs& args, const Parallel& parallel) {
  args.f64 ? run_backward<double>(args, parallel) : run_backward<float>(args, parallel);
}

}  // namespace

extern const HeadKernels kHead;
const HeadKernels kHead = {forward, backward};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
