// Registration of the saliency ops for CUDA tensors; the schemas are in csrc/ops/saliency.cpp.
#include "../ops/saliency_args.h"
#include "torch_stream.h"

namespace transfuse {
namespace {

struct RunOnCuda {
  static void check(const Tensor& act) { check_cuda(act, "act"); }
  static void grad_map(const GradMapArgs& a, const Tensor& act) {
    const OnDeviceOf device(act);
    Tensor memory = new_empty(act, {grad_map_cuda_memory(a)}, statistics_type(a.dtype));
    check_launched(grad_map_cuda(a, memory.mutable_data_ptr(), device.stream()), "grad_weighted_map");
  }
  static void normgrad(const NormGradArgs& a, const Tensor& act) {
    const OnDeviceOf device(act);
    Tensor memory = new_empty(act, {normgrad_cuda_memory(a)}, statistics_type(a.dtype));
    check_launched(normgrad_cuda(a, memory.mutable_data_ptr(), device.stream()), "normgrad_map");
  }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  using Ops = transfuse::SaliencyOps<transfuse::RunOnCuda>;
  m.impl("grad_weighted_map", TORCH_BOX(&Ops::grad_weighted_map));
  m.impl("normgrad_map", TORCH_BOX(&Ops::normgrad_map));
}
