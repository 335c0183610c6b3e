// Registration of the adain ops for CUDA tensors; the schemas are in csrc/ops/adain.cpp.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../ops/adain_args.h"

namespace transfuse {
namespace {

struct RunOnCuda {
  static void run(AdainDirection direction, const AdainArgs& args, const Tensor& content) {
    STD_TORCH_CHECK(content.is_cuda(), "content must be a CUDA tensor");
    const int32_t device = content.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    int64_t style_planes = 1, content_planes = 1;
    for (int d = 0; d < args.rank; ++d) {
      if (args.reduced[d]) continue;
      style_planes *= args.style_size[d];
      content_planes *= args.content_size[d];
    }
    // Working memory is a tensor: torch's caching allocator keeps it until the kernels on this stream are done.
    const auto memory = [&](int64_t count, size_t bytes) {
      return new_empty(content, {count * (int64_t)(bytes / sizeof(double))}, ScalarType::Double);
    };
    const bool wants_style = args.style_out.ptr != nullptr;
    Tensor moments = memory(style_planes, sizeof(AdainMoments));
    Tensor shares = memory(wants_style ? content_planes : 0, sizeof(AdainShare));
    const char* error = adain_cuda(direction, args, moments.mutable_data_ptr(),
                                   wants_style ? shares.mutable_data_ptr() : nullptr, stream);
    STD_TORCH_CHECK(error == nullptr, "adain: the CUDA kernels could not be launched: ", error);
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
