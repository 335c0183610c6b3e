// Registration of the ops on lists of tensors for CUDA tensors; the schemas are in csrc/ops/multitensor.cpp.
#include "../ops/multitensor_args.h"
#include "torch_stream.h"

namespace transfuse {
namespace {

struct RunOnCuda {
  static void check(const Tensor& t) { check_cuda(t, "the tensors"); }
  template <class Args, class Start>
  static void run(const Args& args, int64_t words, const Tensor& home, const char* op, const Start& start) {
    const OnDeviceOf device(home);
    Tensor memory = working_doubles(home, words);
    check_launched(start(args, memory.mutable_data_ptr(), device.stream()), op);
  }
  static void lincomb(const LincombArgs& a, const Tensor& home) {
    run(a, lincomb_cuda_memory(a), home, "lincomb", lincomb_cuda);
  }
  static void block_dots(const BlockDotsArgs& a, const Tensor& home) {
    run(a, block_dots_cuda_memory(a), home, "block_dots", block_dots_cuda);
  }
  static void ratio(const RatioArgs& a, const Tensor& home) {
    run(a, ratio_cuda_memory(a), home, "ratio_merge", ratio_cuda);
  }
  static void gram(const GramArgs& a, const Tensor& home) {
    run(a, gram_cuda_memory(a), home, "multi_gram", gram_cuda);
  }
  static void norm(const NormArgs& a, const Tensor& home) {
    run(a, norm_cuda_memory(a), home, "block_norms", norm_cuda);
  }
  static void perturb(const PerturbArgs& a, const double* factor, const Tensor& home) {
    run(a, perturb_cuda_memory(a), home, "sam_perturb_", [&](const PerturbArgs& args, void* memory, void* stream) {
      return perturb_cuda(args, factor, memory, stream);
    });
  }
  static void copy(const CopyArgs& a, const Tensor& home) {
    run(a, copy_cuda_memory(a), home, "copy_lists_", copy_cuda);
  }
};

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  using Ops = transfuse::MultitensorOps<transfuse::RunOnCuda>;
  m.impl("lincomb", TORCH_BOX(&Ops::lincomb));
  m.impl("block_dots", TORCH_BOX(&Ops::block_dots));
  m.impl("ratio_merge", TORCH_BOX(&Ops::ratio));
  m.impl("multi_gram", TORCH_BOX(&Ops::gram));
  m.impl("block_norms", TORCH_BOX(&Ops::block_norms));
  m.impl("sam_perturb_", TORCH_BOX(&Ops::perturb));
  m.impl("copy_lists_", TORCH_BOX(&Ops::copy_lists));
}
