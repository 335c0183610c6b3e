// Registration of the head curvature ops for CUDA tensors; the schemas are in csrc/ops/head_curvature.cpp.
#include "../ops/head_curvature_args.h"
#include "torch_stream.h"

namespace transfuse {
namespace {

struct RunOnCuda {
  static void check(const Tensor& x) { check_cuda(x, "x"); }
  static void forward(const HeadArgs& a, const Tensor& x) {
    const OnDeviceOf device(x);
    Tensor memory = working_doubles(x, head_cuda_memory(a, false));
    check_launched(head_forward_cuda(a, memory.mutable_data_ptr(), device.stream()), "head_forward");
  }
  static void backward(const HeadArgs& a, const Tensor& x) {
    const OnDeviceOf device(x);
    Tensor memory = working_doubles(x, head_cuda_memory(a, true));
    check_launched(head_backward_cuda(a, memory.mutable_data_ptr(), device.stream()), "head_backward");
  }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  using Ops = transfuse::HeadOps<transfuse::RunOnCuda>;
  m.impl("head_forward", TORCH_BOX(&Ops::forward));
  m.impl("head_backward", TORCH_BOX(&Ops::backward));
}
