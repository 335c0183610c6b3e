// Between torch's stable ABI and the torch-free kernels: views, dtypes, allocation, and torch's thread pool.
// Everything a kernel relies on is checked here a last time, so that a raw op called by hand fails with an error
// instead of reading out of bounds; the Python wrappers give the friendlier messages.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensorList = std::vector<std::optional<Tensor>>;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
  return DType::f32;
}

inline ScalarType scalar_type_of(DType t) {
  switch (t) {
    case DType::f32: return ScalarType::Float;
    case DType::f64: return ScalarType::Double;
    case DType::bf16: return ScalarType::BFloat16;
    case DType::f16: return ScalarType::Half;
  }
  return ScalarType::Float;
}

// float statistics, double for double.
inline ScalarType statistics_type(DType t) { return t == DType::f64 ? ScalarType::Double : ScalarType::Float; }

inline void check_shape(const Tensor& t, const std::vector<int64_t>& want, const std::string& name) {
  bool same = t.dim() == (int64_t)want.size();
  for (size_t i = 0; same && i < want.size(); ++i) same = t.size((int64_t)i) == want[i];
  if (same) return;
  std::string expected, got;
  for (const int64_t n : want) expected += (expected.empty() ? "" : ", ") + std::to_string(n);
  for (int64_t i = 0; i < t.dim(); ++i) got += (got.empty() ? "" : ", ") + std::to_string(t.size(i));
  STD_TORCH_CHECK(false, name, " must have shape (", expected, "), got (", got, ")");
}

// A view of a tensor of any device whose shape has been checked; up to four axes, right-padded with stride 0.
inline View strided_view(const Tensor& t, const char* name) {
  View v;
  v.dtype = t.scalar_type() == ScalarType::Bool ? DType::f32 : dtype_of(t, name);
  STD_TORCH_CHECK(t.dim() <= 4, name, " must have at most 4 axes");
  v.ptr = t.const_data_ptr();
  for (int64_t i = 0; i < t.dim(); ++i) v.stride[i] = t.stride(i);
  return v;
}

// The same of a CPU tensor.
inline View view_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  return strided_view(t, name);
}

// The same of a tensor that has to be on the device of `first`.
inline View view_beside(const Tensor& first, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.device() == first.device(), name, " must be on the device of the first tensor");
  return strided_view(t, name);
}

// A view, beside `first`, of a tensor each of whose axes is full or 1; axes of 1 broadcast with stride 0.
inline View broadcast_view(const Tensor& first, const Tensor& t, const std::vector<int64_t>& full,
                           const std::string& name) {
  std::vector<int64_t> allowed = full;
  for (size_t i = 0; i < full.size() && (int64_t)i < t.dim(); ++i)
    if (t.size((int64_t)i) == 1) allowed[i] = 1;
  check_shape(t, allowed, name);
  View v = view_beside(first, t, name.c_str());
  for (size_t i = 0; i < full.size(); ++i)
    if (allowed[i] == 1) v.stride[i] = 0;
  return v;
}

inline MutableView mutable_view_of(const Tensor& t) {
  MutableView v;
  v.dtype = dtype_of(t, "output");
  v.ptr = t.mutable_data_ptr();
  for (int64_t i = 0; i < t.dim(); ++i) v.stride[i] = t.stride(i);
  return v;
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}
inline Tensor new_zeros(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, shape, dtype);
}

// torch's own pool, as torch.set_num_threads left it; serial in a forked child, where that pool would hang.
Parallel torch_parallel();

}  // namespace transfuse
