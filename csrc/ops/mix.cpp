// Registration of mix: the schema, and the CPU kernel.
#include "mix_args.h"

namespace transfuse {
namespace {

struct RunOnCpu {
  static void check(const Tensor& t) { STD_TORCH_CHECK(t.is_cpu(), "inputs must be CPU tensors"); }
  static void run(const MixArgs& args, bool, const Tensor&) { mix_kernels().run(args, torch_parallel()); }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("mix(Tensor[] inputs, Tensor? coefficients, float[] numbers, int outputs, int[] pairs) -> (Tensor[], Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) { m.impl("mix", TORCH_BOX(&transfuse::mix<transfuse::RunOnCpu>)); }
