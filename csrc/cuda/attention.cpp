// Registration of attention's forward pass for CUDA tensors; the schemas are in csrc/ops/attention.cpp. Derivatives are
// Triton's (see python/transfuse/ops/_attention_core.py).
#include "../ops/attention_args.h"
#include "torch_stream.h"

namespace transfuse {
namespace {

struct RunOnCuda {
  // As copies of tiles can read it: copied if it lies otherwise.
  static Tensor prepared(const Tensor& t) {
    if (t.dim() != 4 || t.numel() == 0) return t;
    const auto fits = [](const Tensor& x) {
      return tiles_can_be_copied(strided_view(x, "query, keys and values"), x.size(0), x.size(1), x.size(2), x.size(3));
    };
    if (fits(t)) return t;
    const Tensor dense = torch::stable::contiguous(t);
    return fits(dense) ? dense : torch::stable::clone(dense);  // memory of its own is aligned
  }
  static TensorList prepared(const TensorList& list) {
    TensorList all;
    for (const Tensor& t : list) all.push_back(prepared(t));
    return all;
  }
  static void forward(const AttentionForward& args, const Tensor& query) {
    check_cuda(query, "query");
    check_launched(attention_forward_cuda(args, OnDeviceOf(query).stream()), "attend");
  }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&transfuse::attention_forward<transfuse::RunOnCuda>));
  m.impl("attention_fused", TORCH_BOX(&transfuse::attention_fused<transfuse::RunOnCuda>));
}
