// Registration of the adain ops for CUDA tensors; the schemas are in csrc/ops/adain.cpp.
#include "../ops/adain_args.h"
#include "torch_stream.h"

namespace transfuse {
namespace {

struct RunOnCuda {
  static void run(AdainDirection direction, const AdainArgs& args, const Tensor& content) {
    check_cuda(content, "content");
    const OnDeviceOf device(content);
    int64_t style_planes = 1, content_planes = 1;
    for (int d = 0; d < args.rank; ++d) {
      if (args.reduced[d]) continue;
      style_planes *= args.style_size[d];
      content_planes *= args.content_size[d];
    }
    const bool wants_style = args.style_out.ptr != nullptr;
    const auto doubles = [](size_t bytes) { return (int64_t)(bytes / sizeof(double)); };
    Tensor moments = working_doubles(content, style_planes * doubles(sizeof(AdainMoments)));
    Tensor shares = working_doubles(content, wants_style ? content_planes * doubles(sizeof(AdainShare)) : 0);
    const char* error = adain_cuda(direction, args, moments.mutable_data_ptr(),
                                   wants_style ? shares.mutable_data_ptr() : nullptr, device.stream());
    check_launched(error, "adain");
  }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  using Ops = transfuse::AdainOps<transfuse::RunOnCuda>;
  m.impl("adain_forward", TORCH_BOX(&Ops::forward));
  m.impl("adain_backward", TORCH_BOX(&Ops::backward));
  m.impl("adain_jvp", TORCH_BOX(&Ops::jvp));
  m.impl("adain_jvp_backward", TORCH_BOX(&Ops::jvp_backward));
}
