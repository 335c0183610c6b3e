// Gradient and Hessian diagonal of a linear head on the CPU, at one ISA level (see head_curvature.h).
#include "transfuse/head_curvature.h"

#include <algorithm>
#include <vector>

#include "transfuse/gemm_tile.h"
#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kDotColumns = 1024;  // columns per block of products over columns
constexpr int64_t kDotRows = 32;       // samples per task of these
constexpr int64_t kRows = 64;          // samples per block of products over samples
constexpr int64_t kSerial = 1 << 16;   // multiply-adds in all below which waking other threads does not pay
constexpr int kDotTile = 4;            // samples of one register tile of a product over columns

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

// ---- products over the columns ------------------------------------------------------------------------------------

// sums[i][j] += sum_k f(x_i[k]) v_j[k] over n columns, f the square or nothing.
template <class T, bool kSquares, int kColumns>
TRANSFUSE_INLINE void dot_tile(int64_t n, const T* const* x, const T* const* v, T (*sums)[kColumns]) {
  using V = typename Simd<T>::V;
  constexpr int64_t W = Simd<T>::W;
  V acc[kDotTile][kColumns];
#pragma GCC unroll 4
  for (int i = 0; i < kDotTile; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kColumns; ++j) acc[i][j] = V{};
  int64_t k = 0;
  for (; k + W <= n; k += W) {
    V vk[kColumns];
#pragma GCC unroll 3
    for (int j = 0; j < kColumns; ++j) vk[j] = load<V>(v[j] + k);
#pragma GCC unroll 4
    for (int i = 0; i < kDotTile; ++i) {
      V xk = load<V>(x[i] + k);
      if (kSquares) xk *= xk;
#pragma GCC unroll 3
      for (int j = 0; j < kColumns; ++j) acc[i][j] = xk * vk[j] + acc[i][j];
    }
  }
  for (int i = 0; i < kDotTile; ++i)
    for (int j = 0; j < kColumns; ++j) {
      T sum = horizontal_sum<T>(acc[i][j]);
      for (int64_t t = k; t < n; ++t) sum += (kSquares ? x[i][t] * x[i][t] : x[i][t]) * v[j][t];
      sums[i][j] += sum;
    }
}

template <class T, bool kSquares, int kColumns>
static __attribute__((noinline)) void dot_panel(int64_t rows, int64_t n, const T* x, int64_t ldx, const T* v,
                                                int64_t ldv, T* out, int64_t ldo) {
  const T* vs[kColumns];
  for (int j = 0; j < kColumns; ++j) vs[j] = v + j * ldv;
  for (int64_t i = 0; i < rows; i += kDotTile) {
    const int live = (int)std::min<int64_t>(kDotTile, rows - i);
    const T* xs[kDotTile];
    // Rows beyond the last are the last once more, and are dropped.
    for (int r = 0; r < kDotTile; ++r) xs[r] = x + (i + std::min(r, live - 1)) * ldx;
    T sums[kDotTile][kColumns] = {};
    dot_tile<T, kSquares, kColumns>(n, xs, vs, sums);
    for (int r = 0; r < live; ++r)
      for (int j = 0; j < kColumns; ++j) out[(i + r) * ldo + j] += sums[r][j];
  }
}

// out[i][c] = start[c * step] + sum_k f(x_i[k]) v_c[k].
template <class T, bool kSquares>
void dots(int64_t rows, int64_t columns, int64_t classes, const T* x, int64_t ldx, const T* v, int64_t ldv,
          const T* start, int64_t step, T* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < classes; ++c) out[i * ldo + c] = start == nullptr ? T(0) : start[c * step];
  for (int64_t k = 0; k < columns; k += kDotColumns) {
    const int64_t n = std::min(kDotColumns, columns - k);
    int64_t c = 0;
    for (; c + 3 <= classes; c += 3) dot_panel<T, kSquares, 3>(rows, n, x + k, ldx, v + c * ldv + k, ldv, out + c, ldo);
    if (classes - c == 2)
      dot_panel<T, kSquares, 2>(rows, n, x + k, ldx, v + c * ldv + k, ldv, out + c, ldo);
    else if (classes - c == 1)
      dot_panel<T, kSquares, 1>(rows, n, x + k, ldx, v + c * ldv + k, ldv, out + c, ldo);
  }
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

// The factor of the sample in the result: p (1 - p) / n or (p - y) / n.
template <class T>
void row_factor(const Head<T>& head, int64_t sample, T scale, T* left) {
  const T *p = head.p(sample), *rest = head.rest(sample);
  for (int64_t c = 0; c < head.a.classes; ++c)
    left[c] = scale * (head.diagonal() ? p[c] * rest[c] : p[c] - head.target(sample)[c]);
}

// Gradient by the factor (n times too large) -> gradient by the logits, in place.
template <class T>
void row_backward(const Head<T>& head, int64_t sample, T scale, T* g) {
  const T *p = head.p(sample), *rest = head.rest(sample);
  const int64_t classes = head.a.classes;
  T along = T(0);
  for (int64_t c = 0; c < classes; ++c) {
    g[c] *= scale;
    if (head.diagonal()) g[c] *= rest[c] - p[c];
    along += p[c] * g[c];
  }
  if (classes == 1)
    g[0] *= p[0] * rest[0];
  else
    for (int64_t c = 0; c < classes; ++c) g[c] = p[c] * (g[c] - along);
}

// ---- products over the samples
// ----------------------------------------------------------------------------------------

// Columns [k, k + live) of `rows` rows into a block of `columns` columns, zeros behind; column `ones` is 1.
template <class T>
void pack(const T* from, int64_t stride, int64_t rows, int64_t k, int64_t live, int64_t ones, int64_t columns, T* to) {
  for (int64_t i = 0; i < rows; ++i, to += columns) {
    const int64_t real = std::min(live, ones - k);
    copy_row(from + i * stride + k, real, to);
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
    dots<T, false>(part.last - part.first, args.columns, classes, head.x(part.first), args.columns, head.weight(0),
                   args.columns, static_cast<const T*>(args.bias), 1, z, classes);
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
  std::vector<T> left((size_t)((args.samples + kTileRows) * padded), T(0)), slope = left;
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
      row_backward(head, n, scale, g);
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
    T* x = static_cast<T*>(thread_scratch(sizeof(T) * (2 * tile + 3 * matrix)));
    T *moved = x + tile, *weight = moved + tile, *own = weight + matrix, *sum = own + matrix;
    pack(head.weight(0), args.columns, classes, k, real, args.columns, columns, weight);
    const std::vector<Rows> pieces = stretches(args, kRows);
    bool first = true;
    int64_t domain = -1;
    for (const Rows& piece : pieces) {
      const int64_t rows = piece.last - piece.first;
      const T *l = &left[(size_t)(piece.first * padded)], *s = &slope[(size_t)(piece.first * padded)];
      pack(head.x(piece.first), args.columns, rows, k, live, args.columns, columns, x);
      if (args.weight_grad != nullptr)
        gemm<Plain, true>((int)padded, vecs, rows, s, padded, x, columns, sum, columns, !first);
      first = false;
      if (args.x_grad == nullptr || real == 0) continue;
      if (piece.domain != domain) {
        domain = piece.domain;
        pack(grad + domain * classes * width, width, classes, k, real, width, columns, own);
      }
      const int tiled = (int)round_up(rows, kTileRows);
      gemm<Plain, false>(tiled, vecs, classes, l, padded, own, columns, moved, columns, false);
      if (head.diagonal())
        for (int64_t i = 0; i < rows * columns; ++i) moved[i] *= T(2) * x[i];
      gemm<Plain, false>(tiled, vecs, classes, s, padded, weight, columns, moved, columns, true);
      T* out = static_cast<T*>(args.x_grad) + piece.first * args.columns + k;
      for (int64_t i = 0; i < rows; ++i) copy_row(moved + i * columns, real, out + i * args.columns);
    }
    if (args.weight_grad == nullptr) return;
    for (int64_t c = 0; c < classes; ++c) {
      copy_row(sum + c * columns, real, static_cast<T*>(args.weight_grad) + c * args.columns + k);
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
