// Registration of the head curvature ops: schemas, and the CPU kernels.
#include "head_curvature_args.h"

namespace transfuse {
namespace {

struct RunOnCpu {
  static void check(const Tensor& x) { STD_TORCH_CHECK(x.is_cpu(), "x must be a CPU tensor"); }
  static void forward(const HeadArgs& a, const Tensor&) { head_kernels().forward(a, torch_parallel()); }
  static void backward(const HeadArgs& a, const Tensor&) { head_kernels().backward(a, torch_parallel()); }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def(
      "head_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? targets, Tensor? vectors, int[] offsets) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "head_backward(Tensor grad, Tensor p, Tensor rest, Tensor u, Tensor x, Tensor weight, Tensor? bias, Tensor? "
      "targets, Tensor? vectors, int[] offsets, bool x_grad, bool head_grad, bool vectors_grad) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  using Ops = transfuse::HeadOps<transfuse::RunOnCpu>;
  m.impl("head_forward", TORCH_BOX(&Ops::forward));
  m.impl("head_backward", TORCH_BOX(&Ops::backward));
}
