// Where the launchers meet torch: the current device and stream, and working memory of torch's own allocator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../ops/torch_glue.h"

namespace transfuse {

inline void check_cuda(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be a CUDA tensor");
}

// The device of a tensor, current while this lives, and its current stream.
class __attribute__((visibility("hidden"))) OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Working memory is a tensor: torch's caching allocator keeps it until the kernels on this stream are done.
inline Tensor working_doubles(const Tensor& like, int64_t count) {
  return new_empty(like, {count}, ScalarType::Double);
}

inline void check_launched(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": the CUDA kernels could not be launched: ", error);
}

}  // namespace transfuse
