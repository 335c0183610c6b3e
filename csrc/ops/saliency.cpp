// Registration of the saliency ops: schemas, and the CPU kernels.
#include "saliency_args.h"

namespace transfuse {
namespace {

struct RunOnCpu {
  static void check(const Tensor& act) { STD_TORCH_CHECK(act.is_cpu(), "act must be a CPU tensor"); }
  static void grad_map(const GradMapArgs& a, const Tensor&) { saliency_kernels().grad_map(a, torch_parallel()); }
  static void normgrad(const NormGradArgs& a, const Tensor&) { saliency_kernels().normgrad(a, torch_parallel()); }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("grad_weighted_map(Tensor act, Tensor grad, int method) -> Tensor");
  m.def(
      "normgrad_map(Tensor act, Tensor grad, int[] grid, int phase1, int phase2, int[] kernel, int[] stride, "
      "int[] padding, int[] dilation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  using Ops = transfuse::SaliencyOps<transfuse::RunOnCpu>;
  m.impl("grad_weighted_map", TORCH_BOX(&Ops::grad_weighted_map));
  m.impl("normgrad_map", TORCH_BOX(&Ops::normgrad_map));
}
