// Registration of the adain ops: schemas, and the CPU kernels.
#include "adain_args.h"

namespace transfuse {
namespace {

struct RunOnCpu {
  static void run(AdainDirection direction, const AdainArgs& args, const Tensor& content) {
    STD_TORCH_CHECK(content.is_cpu(), "content must be a CPU tensor");
    adain_kernels().run(direction, args, torch_parallel());
  }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("adain_forward(Tensor content, Tensor style, int[] dims, float eps) -> Tensor");
  m.def(
      "adain_backward(Tensor grad, Tensor content, Tensor style, int[] dims, float eps, bool content_grad, bool "
      "style_grad) -> (Tensor, Tensor)");
  m.def("adain_jvp(Tensor content, Tensor style, Tensor content_t, Tensor style_t, int[] dims, float eps) -> Tensor");
  m.def(
      "adain_jvp_backward(Tensor grad, Tensor content, Tensor style, Tensor content_t, Tensor style_t, int[] dims, "
      "float eps, bool content_grad, bool style_grad) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  using Ops = transfuse::AdainOps<transfuse::RunOnCpu>;
  m.impl("adain_forward", TORCH_BOX(&Ops::forward));
  m.impl("adain_backward", TORCH_BOX(&Ops::backward));
  m.impl("adain_jvp", TORCH_BOX(&Ops::jvp));
  m.impl("adain_jvp_backward", TORCH_BOX(&Ops::jvp_backward));
}
