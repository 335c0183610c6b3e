// What the CPU and the CUDA registration of the saliency ops share: checks, and calls as the kernels take them.
#pragma once

#include "torch_glue.h"
#include "transfuse/saliency.h"

namespace transfuse {

inline SaliencyTensor saliency_tensor(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3, name, " must have 3 axes (batch, channels, locations)");
  STD_TORCH_CHECK(t.size(1) > 0, name, " must have at least one channel");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline void set_triple(const std::vector<int64_t>& given, int64_t least, const char* name, int64_t* to) {
  STD_TORCH_CHECK(given.size() == 3, name, " must have 3 entries");
  for (int d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(given[(size_t)d] >= least && given[(size_t)d] < (int64_t(1) << 31), name, " must be in [", least,
                    ", 2^31), got ", given[(size_t)d]);
    to[d] = given[(size_t)d];
  }
}

// The ops over a launcher: `Run::check(act)` refuses other devices, `Run::grad_map(args, act)` and `normgrad` compute.
template <class Run>
struct SaliencyOps {
  static Tensor grad_weighted_map(const Tensor& act, const Tensor& grad, int64_t method) {
    GradMapArgs args;
    Run::check(act);
    args.act = saliency_tensor(act, "act");
    args.grad = saliency_tensor(grad, "grad");
    args.dtype = dtype_of(act, "act");
    STD_TORCH_CHECK(dtype_of(grad, "grad") == args.dtype && grad.device() == act.device(),
                    "grad must have the dtype and device of act");
    check_shape(grad, {act.size(0), act.size(1), act.size(2)}, "grad");
    STD_TORCH_CHECK(method >= 0 && method <= (int64_t)MapMethod::elementwise, "method must be in [0, 5], got ", method);
    args.method = (MapMethod)method;
    args.batch = act.size(0);
    args.channels = act.size(1);
    args.locations = act.size(2);
    Tensor out = new_empty(act, {args.batch, args.locations}, statistics_type(args.dtype));
    args.out = out.mutable_data_ptr();
    if (out.numel() > 0) Run::grad_map(args, act);
    return out;
  }

  static Tensor normgrad_map(const Tensor& act, const Tensor& grad, const std::vector<int64_t>& grid, int64_t phase1,
                             int64_t phase2, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
    NormGradArgs args;
    Run::check(act);
    args.act = saliency_tensor(act, "act");
    args.grad = saliency_tensor(grad, "grad");
    args.dtype = dtype_of(act, "act");
    STD_TORCH_CHECK(dtype_of(grad, "grad") == args.dtype && grad.device() == act.device(),
                    "grad must have the dtype and device of act");
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
    if (out.numel() > 0) Run::normgrad(args, act);
    return out;
  }
};

}  // namespace transfuse
