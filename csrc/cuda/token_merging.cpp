// Registration of the token merging ops for CUDA tensors; the schemas are in csrc/ops/token_merging.cpp.
#include "../ops/token_merging_args.h"
#include "torch_stream.h"

namespace transfuse {
namespace {

struct RunOnCuda {
  static void check(const Tensor& tokens) { check_cuda(tokens, "the tokens"); }
  static void nearest(const NearestArgs& a, const Tensor& like) {
    const OnDeviceOf device(like);
    Tensor working = working_doubles(like, nearest_tokens_cuda_working(a));
    check_launched(nearest_tokens_cuda(a, working.mutable_data_ptr(), device.stream()), "nearest_tokens");
  }
  static void segments(const MergeArgs& a, const Tensor& like) {
    check_launched(merge_segments_cuda(a, OnDeviceOf(like).stream()), "merge_segments");
  }
  static void amax(const MergeArgs& a, const Tensor& like) {
    check_launched(merge_amax_cuda(a, OnDeviceOf(like).stream()), "merge_amax");
  }
  static void gather(const MergeArgs& a, const Tensor& like) {
    check_launched(merge_gather_cuda(a, OnDeviceOf(like).stream()), "merge_gather");
  }
  static void push(const PushArgs& a, const Tensor& like) {
    check_launched(push_tokens_cuda(a, OnDeviceOf(like).stream()), "push_tokens");
  }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  using Ops = transfuse::TokenMergingOps<transfuse::RunOnCuda>;
  m.impl("nearest_tokens", TORCH_BOX(&Ops::nearest));
  m.impl("merge_segments", TORCH_BOX(&Ops::segments));
  m.impl("merge_gather", TORCH_BOX(&Ops::gather));
  m.impl("merge_amax", TORCH_BOX(&Ops::amax));
  m.impl("push_tokens", TORCH_BOX(&Ops::push));
}
