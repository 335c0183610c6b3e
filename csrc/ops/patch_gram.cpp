// Registration of patch_gram: schema, checks, and the CPU kernel.
#include "transfuse/patch_gram.h"

#include "torch_glue.h"

namespace transfuse {
namespace {

void set_pair(const std::vector<int64_t>& given, int64_t least, const char* name, int64_t* to) {
  STD_TORCH_CHECK(given.size() == 2, name, " must have 2 entries");
  for (int d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(given[(size_t)d] >= least && given[(size_t)d] < (int64_t(1) << 31), name, " must be in [", least,
                    ", 2^31), got ", given[(size_t)d]);
    to[d] = given[(size_t)d];
  }
}

Tensor patch_gram(const Tensor& x, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  PatchGramArgs args;
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 5,
                  "x must be a CPU tensor of 5 axes (groups, batch, channels, height, width)");
  args.dtype = dtype_of(x, "x");
  for (int64_t d = 0; d < 5; ++d) {
    args.size[d] = x.size(d);
    args.stride[d] = x.stride(d);
  }
  set_pair(kernel, 1, "kernel", args.kernel);
  set_pair(stride, 1, "stride", args.step);
  set_pair(padding, 0, "padding", args.padding);
  set_pair(dilation, 1, "dilation", args.dilation);
  for (int d = 0; d < 2; ++d) {
    const int64_t left = args.size[3 + d] + 2 * args.padding[d] - args.dilation[d] * (args.kernel[d] - 1) - 1;
    STD_TORCH_CHECK(left >= 0, "kernel must fit into the padded image");
    args.count[d] = left / args.step[d] + 1;
  }
  const int64_t n = args.size[2] * args.kernel[0] * args.kernel[1];
  if (x.numel() == 0) return new_zeros(x, {args.size[0], n, n}, statistics_type(args.dtype));
  Tensor out = new_empty(x, {args.size[0], n, n}, statistics_type(args.dtype));
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  patch_gram_kernels().run(args, torch_parallel());
  return out;
}

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("patch_gram(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) { m.impl("patch_gram", TORCH_BOX(&transfuse::patch_gram)); }
