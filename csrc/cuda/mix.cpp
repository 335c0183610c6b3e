// Registration of mix for CUDA tensors; the schema is in csrc/ops/mix.cpp.
#include "../ops/mix_args.h"
#include "torch_stream.h"

namespace transfuse {
namespace {

struct RunOnCuda {
  static void check(const Tensor& t) { check_cuda(t, "inputs"); }
  static void run(const MixArgs& args, bool numbers, const Tensor& like) {
    const OnDeviceOf device(like);
    Tensor partials = working_doubles(like, mix_cuda_partials(args));
    double* memory = static_cast<double*>(partials.mutable_data_ptr());
    check_launched(mix_cuda(args, numbers, memory, device.stream()), "mix");
  }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) { m.impl("mix", TORCH_BOX(&transfuse::mix<transfuse::RunOnCuda>)); }
