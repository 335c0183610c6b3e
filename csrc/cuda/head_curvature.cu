// Gradient, Hessian diagonal and Hessian-vector product of a linear head on CUDA (see head_curvature.h).
//
// Forward: products over the columns (logits, and u), a warp for the arithmetic of each sample, a product over the
// samples of each domain. Backward the same, and the product that gives the gradient by x. Samples are cut in stretches
// that do not cross domains, so that every launch serves all domains; a batch of few samples is spread over columns and
// a long one over stretches, whose sums one more kernel adds in order: no atomics, the same bits every time. Products
// are plain fused multiply-adds: 1 - p and differences of slopes would not survive tensor cores' shorter numbers.
#include "transfuse/head_curvature.h"

#include <algorithm>

#include "head_curvature_products.h"
#include "head_curvature_samples.h"

namespace transfuse {
namespace {

using namespace head;

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
