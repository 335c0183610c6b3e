// Registration of the saliency ops: schemas, checks, and the CPU kernels.
#include "transfuse/saliency.h"

#include "torch_glue.h"

namespace transfuse {
namespace {

SaliencyTensor saliency_tensor(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 3, name, " must be a CPU tensor of 3 axes (batch, channels, locations)");
  STD_TORCH_CHECK(t.size(1) > 0, name, " must have at least one channel");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor grad_weighted_map(const Tensor& act, const Tensor& grad, int64_t method) {
  GradMapArgs args;
  args.act = saliency_tensor(act, "act");
  args.grad = saliency_tensor(grad, "grad");
  args.dtype = dtype_of(act, "act");
  STD_TORCH_CHECK(dtype_of(grad, "grad") == args.dtype, "grad must have the dtype of act");
  check_shape(grad, {act.size(0), act.size(1), act.size(2)}, "grad");
  STD_TORCH_CHECK(method >= 0 && method <= (int64_t)MapMethod::elementwise, "method must be in [0, 5], got ", method);
  args.method = (MapMethod)method;
  args.batch = act.size(0);
  args.channels = act.size(1);
  args.locations = act.size(2);
  Tensor out = new_empty(act, {args.batch, args.locations}, statistics_type(args.dtype));
  args.out = out.mutable_data_ptr();
  if (out.numel() > 0) saliency_kernels().grad_map(args, torch_parallel());
  return out;
}

void set_triple(const std::vector<int64_t>& given, int64_t least, const char* name, int64_t* to) {
  STD_TORCH_CHECK(given.size() == 3, name, " must have 3 entries");
  for (int d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(given[(size_t)d] >= least && given[(size_t)d] < (int64_t(1) << 31), name, " must be in [", least,
                    ", 2^31), got ", given[(size_t)d]);
    to[d] = given[(size_t)d];
  }
}

Tensor normgrad_map(const Tensor& act, const Tensor& grad, const std::vector<int64_t>& grid, int64_t phase1,
                    int64_t phase2, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  NormGradArgs args;
  args.act = saliency_tensor(act, "act");
  args.grad = saliency_tensor(grad, "grad");
  args.dtype = dtype_of(act, "act");
  STD_TORCH_CHECK(dtype_of(grad, "grad") == args.dtype, "grad must have the dtype of act");
  STD_TORCH_CHECK(phase1 >= 0 && phase1 <= (int64_t)Phase1::depthwise, "phase1 must be in [0, 3], got ", phase1);
  STD_TORCH_CHECK(phase2 >= 0 && phase2 <= (int64_t)Phase2::max, "phase2 must be in [0, 3], got ", phase2);
  args.phase1 = (Phase1)phase1;
  args.phase2 = (Phase2)phase2;
  args.batch = act.size(0);
  args.act_channels = act.size(1);
  args.grad_channels = grad.size(1);
  set_triple(grid, 0, "grid", args.grid);
  set_triple(kernel, 1, "kernel", args.kernel);
  set_triple(stride, 1, "stride", args.step);
  set_triple(padding, 0, "padding", args.padding);
  set_triple(dilation, 1, "dilation", args.dilation);
  const bool conv = args.phase1 == Phase1::conv;
  for (int d = 0; d < 3; ++d) {
    args.out_grid[d] = args.grid[d];
    if (args.phase1 == Phase1::depthwise)
      STD_TORCH_CHECK(args.kernel[d] == 1 + 2 * args.padding[d] && args.padding[d] <= 1 && args.step[d] == 1 &&
                          args.dilation[d] == 1,
                      "depth-wise neighbourhoods must be of 3 with padding 1, or of 1");
    if (!conv || args.grid[d] == 0) continue;
    const int64_t left = args.grid[d] + 2 * args.padding[d] - args.dilation[d] * (args.kernel[d] - 1) - 1;
    STD_TORCH_CHECK(left >= 0, "kernel must fit into the padded grid");
    args.out_grid[d] = left / args.step[d] + 1;
  }
  check_shape(act, {args.batch, args.act_channels, args.grid[0] * args.grid[1] * args.grid[2]}, "act");
  const int64_t channels = conv ? args.grad_channels : args.act_channels;
  const int64_t locations = args.out_grid[0] * args.out_grid[1] * args.out_grid[2];
  check_shape(grad, {args.batch, channels, locations}, "grad");
  Tensor out = new_empty(act, {args.batch, locations}, statistics_type(args.dtype));
  args.out = out.mutable_data_ptr();
  if (out.numel() > 0) saliency_kernels().normgrad(args, torch_parallel());
  return out;
}

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("grad_weighted_map(Tensor act, Tensor grad, int method) -> Tensor");
  m.def(
      "normgrad_map(Tensor act, Tensor grad, int[] grid, int phase1, int phase2, int[] kernel, int[] stride, "
      "int[] padding, int[] dilation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("grad_weighted_map", TORCH_BOX(&transfuse::grad_weighted_map));
  m.impl("normgrad_map", TORCH_BOX(&transfuse::normgrad_map));
}
