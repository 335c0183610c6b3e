// What the CPU and the CUDA registration of the head curvature ops share: checks, and calls as the kernels take them.
#pragma once

#include "torch_glue.h"
#include "transfuse/head_curvature.h"

namespace transfuse {

struct HeadCall {
  HeadArgs args;
  int64_t width = 0;
};

inline const void* head_input(const Tensor& t, const Tensor& like, const std::vector<int64_t>& shape,
                              const char* name) {
  check_shape(t, shape, name);
  STD_TORCH_CHECK(t.is_contiguous() && t.device() == like.device() && t.scalar_type() == like.scalar_type(), name,
                  " must be a contiguous tensor of the dtype of x on its device");
  return t.const_data_ptr();
}

inline HeadCall head_call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& targets, const OptionalTensor& vectors,
                          const std::vector<int64_t>& offsets) {
  HeadCall call;
  HeadArgs& a = call.args;
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x and weight must have two axes");
  const DType dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, "x must be float32 or float64");
  a.f64 = dtype == DType::f64;
  a.samples = x.size(0), a.columns = x.size(1), a.classes = weight.size(0);
  a.domains = (int64_t)offsets.size() - 1;
  STD_TORCH_CHECK(a.domains >= 1 && a.classes >= 1, "there must be at least one domain and one class");
  STD_TORCH_CHECK(offsets.front() == 0 && offsets.back() == a.samples, "offsets must go from 0 to ", a.samples);
  for (size_t e = 0; e + 1 < offsets.size(); ++e)
    STD_TORCH_CHECK(offsets[e] < offsets[e + 1], "offsets must ascend, domain ", e, " is empty");
  a.offsets = offsets.data();
  a.x = head_input(x, x, {a.samples, a.columns}, "x");
  a.weight = head_input(weight, x, {a.classes, a.columns}, "weight");
  if (bias.has_value()) a.bias = head_input(*bias, x, {a.classes}, "bias");
  call.width = a.columns + (bias.has_value() ? 1 : 0);
  STD_TORCH_CHECK(!targets.has_value() || !vectors.has_value(), "targets and vectors exclude each other");
  if (targets.has_value()) {
    a.kind = HeadKind::gradient;
    a.targets = head_input(*targets, x, {a.samples, a.classes}, "targets");
  } else if (vectors.has_value()) {
    a.kind = HeadKind::product;
    STD_TORCH_CHECK(vectors->dim() == 3, "vectors must have three axes");
    a.shared = vectors->size(0) == 1;
    a.vectors = head_input(*vectors, x, {a.shared ? 1 : a.domains, a.classes, call.width}, "vectors");
  }
  return call;
}

// The ops over a launcher: `Run::check(x)` refuses other devices, `Run::forward(args, x)` and `backward` compute.
template <class Run>
struct HeadOps {
  // The result, p, 1 - p and u (empty where there are no vectors).
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight,
                                                            const OptionalTensor& bias, const OptionalTensor& targets,
                                                            const OptionalTensor& vectors,
                                                            const std::vector<int64_t>& offsets) {
    Run::check(x);
    HeadCall call = head_call(x, weight, bias, targets, vectors, offsets);
    HeadArgs& a = call.args;
    Tensor out = new_empty(x, {a.domains, a.classes, call.width}, x.scalar_type());
    Tensor p = new_empty(x, {a.samples, a.classes}, x.scalar_type()), rest = torch::stable::empty_like(p);
    Tensor u = new_empty(x, {a.kind == HeadKind::product ? a.samples : 0, a.classes}, x.scalar_type());
    a.out = out.mutable_data_ptr();
    a.p = p.mutable_data_ptr();
    a.rest = rest.mutable_data_ptr();
    a.u = u.mutable_data_ptr();
    Run::forward(a, x);
    return {out, p, rest, u};
  }

  // Gradients of x, weight, bias and vectors; one that is not wanted, or not there, is an empty tensor.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& p, const Tensor& rest,
                                                             const Tensor& u, const Tensor& x, const Tensor& weight,
                                                             const OptionalTensor& bias, const OptionalTensor& targets,
                                                             const OptionalTensor& vectors,
                                                             const std::vector<int64_t>& offsets, bool x_grad,
                                                             bool head_grad, bool vectors_grad) {
    Run::check(x);
    HeadCall call = head_call(x, weight, bias, targets, vectors, offsets);
    HeadArgs& a = call.args;
    const bool product = a.kind == HeadKind::product;
    a.grad = head_input(grad, x, {a.domains, a.classes, call.width}, "grad");
    a.p = const_cast<void*>(head_input(p, x, {a.samples, a.classes}, "p"));
    a.rest = const_cast<void*>(head_input(rest, x, {a.samples, a.classes}, "rest"));
    a.u = const_cast<void*>(head_input(u, x, {product ? a.samples : 0, a.classes}, "u"));
    const auto result = [&](bool wanted, const Tensor& like) {
      return wanted ? torch::stable::empty_like(like) : new_empty(x, {0}, x.scalar_type());
    };
    const bool with_bias = head_grad && bias.has_value();
    Tensor to_x = result(x_grad, x), to_weight = result(head_grad, weight);
    Tensor to_bias = new_empty(x, {with_bias ? a.classes : 0}, x.scalar_type());
    Tensor to_vectors = result(vectors_grad && product, product ? *vectors : x);
    if (x_grad) a.x_grad = to_x.mutable_data_ptr();
    a.head_grad = head_grad;
    if (head_grad) a.weight_grad = to_weight.mutable_data_ptr();
    if (with_bias) a.bias_grad = to_bias.mutable_data_ptr();
    if (vectors_grad && product) a.vectors_grad = to_vectors.mutable_data_ptr();
    if (x_grad || head_grad || vectors_grad) Run::backward(a, x);
    return {to_x, to_weight, to_bias, to_vectors};
  }
};

}  // namespace transfuse
