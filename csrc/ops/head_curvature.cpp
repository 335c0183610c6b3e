// Registration of the head curvature ops: schemas, and the CPU kernels.
#include "transfuse/head_curvature.h"

#include "torch_glue.h"

namespace transfuse {
namespace {

struct HeadCall {
  HeadArgs args;
  int64_t width = 0;
};

const void* head_input(const Tensor& t, const Tensor& like, const std::vector<int64_t>& shape, const char* name) {
  check_shape(t, shape, name);
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == like.scalar_type(), name,
                  " must be a contiguous CPU tensor of the dtype of x");
  return t.const_data_ptr();
}

HeadCall head_call(const Tensor& x, const Tensor& logits, const OptionalTensor& targets, const OptionalTensor& vectors,
                   const std::vector<int64_t>& offsets, bool ones) {
  HeadCall call;
  HeadArgs& a = call.args;
  STD_TORCH_CHECK(x.dim() == 2 && logits.dim() == 2, "x and logits must have two axes");
  const DType dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, "x must be float32 or float64");
  a.f64 = dtype == DType::f64;
  a.samples = x.size(0), a.columns = x.size(1), a.classes = logits.size(1);
  a.domains = (int64_t)offsets.size() - 1;
  STD_TORCH_CHECK(a.domains >= 1 && a.classes >= 1, "there must be at least one domain and one class");
  STD_TORCH_CHECK(offsets.front() == 0 && offsets.back() == a.samples, "offsets must go from 0 to ", a.samples);
  for (size_t e = 0; e + 1 < offsets.size(); ++e)
    STD_TORCH_CHECK(offsets[e] < offsets[e + 1], "offsets must ascend, domain ", e, " is empty");
  a.offsets = offsets.data();
  a.ones = ones;
  a.x = head_input(x, x, {a.samples, a.columns}, "x");
  a.logits = head_input(logits, x, {a.samples, a.classes}, "logits");
  call.width = a.columns + (ones ? 1 : 0);
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

// The result, and u (empty where there are no vectors).
std::tuple<Tensor, Tensor> head_forward(const Tensor& x, const Tensor& logits, const OptionalTensor& targets,
                                        const OptionalTensor& vectors, const std::vector<int64_t>& offsets, bool ones) {
  HeadCall call = head_call(x, logits, targets, vectors, offsets, ones);
  HeadArgs& a = call.args;
  Tensor out = new_empty(x, {a.domains, a.classes, call.width}, x.scalar_type());
  Tensor u = new_empty(x, {a.kind == HeadKind::product ? a.samples : 0, a.classes}, x.scalar_type());
  a.out = out.mutable_data_ptr();
  a.u = u.mutable_data_ptr();
  head_kernels().forward(a, torch_parallel());
  return {out, u};
}

// Gradients of x, logits and vectors; one that is not wanted, or not there, is an empty tensor. That of the logits
// comes with the others.
std::tuple<Tensor, Tensor, Tensor> head_backward(const Tensor& grad, const Tensor& u, const Tensor& x,
                                                 const Tensor& logits, const OptionalTensor& targets,
                                                 const OptionalTensor& vectors, const std::vector<int64_t>& offsets,
                                                 bool ones, bool x_grad, bool vectors_grad) {
  HeadCall call = head_call(x, logits, targets, vectors, offsets, ones);
  HeadArgs& a = call.args;
  const bool product = a.kind == HeadKind::product;
  a.grad = head_input(grad, x, {a.domains, a.classes, call.width}, "grad");
  a.u = const_cast<void*>(head_input(u, x, {product ? a.samples : 0, a.classes}, "u"));
  const auto result = [&](bool wanted, const Tensor& like) {
    return wanted ? torch::stable::empty_like(like) : new_empty(x, {0}, x.scalar_type());
  };
  Tensor to_x = result(x_grad, x), to_logits = torch::stable::empty_like(logits);
  Tensor to_vectors = result(vectors_grad && product, product ? *vectors : x);
  a.logits_grad = to_logits.mutable_data_ptr();
  if (x_grad) a.x_grad = to_x.mutable_data_ptr();
  if (vectors_grad && product) a.vectors_grad = to_vectors.mutable_data_ptr();
  head_kernels().backward(a, torch_parallel());
  return {to_x, to_logits, to_vectors};
}

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def(
      "head_forward(Tensor x, Tensor logits, Tensor? targets, Tensor? vectors, int[] offsets, bool ones) -> (Tensor, "
      "Tensor)");
  m.def(
      "head_backward(Tensor grad, Tensor u, Tensor x, Tensor logits, Tensor? targets, Tensor? vectors, int[] offsets, "
      "bool ones, bool x_grad, bool vectors_grad) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("head_forward", TORCH_BOX(&transfuse::head_forward));
  m.impl("head_backward", TORCH_BOX(&transfuse::head_backward));
}
