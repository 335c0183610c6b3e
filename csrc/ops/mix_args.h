// What the CPU and the CUDA registration of mix share: checks, and a call as the kernels take it.
#pragma once

#include <utility>

#include "torch_glue.h"
#include "transfuse/mix.h"

namespace transfuse {

// Whether samples of `t` lie as those of `like` do (its batch is the outermost axis); from sample to sample any stride.
inline bool same_layout(const Tensor& t, const Tensor& like) {
  for (int64_t d = 1; d < like.dim(); ++d)
    if (like.size(d) != 1 && t.stride(d) != like.stride(d)) return false;
  return true;
}

// A result: in the layout of `like` if its batch is outermost in memory, contiguous otherwise.
inline Tensor new_result(const Tensor& like, const std::vector<int64_t>& shape, int64_t count) {
  Tensor out = torch::stable::empty_like(like);
  if (shape[0] <= 1 || out.stride(0) == count) return out;
  return new_empty(like, shape, like.scalar_type());
}

// The op over a launcher: `Run::check(tensor)` refuses other devices, `Run::run(args, numbers, like)` computes;
// `numbers` says that the coefficients are the host's.
template <class Run>
std::tuple<TensorList, Tensor> mix(const TensorList& inputs, const OptionalTensor& coefficients,
                                   const std::vector<double>& numbers, int64_t outputs,
                                   const std::vector<int64_t>& pairs) {
  STD_TORCH_CHECK(!inputs.empty() && (int64_t)inputs.size() <= kMixMaxInputs, "inputs must be 1 to ", kMixMaxInputs,
                  " tensors, got ", inputs.size());
  STD_TORCH_CHECK(outputs >= 0 && outputs <= kMixMaxOutputs, "outputs must be in 0..", kMixMaxOutputs);
  STD_TORCH_CHECK(pairs.size() % 2 == 0 && (int64_t)pairs.size() / 2 <= kMixMaxPairs, "pairs must be at most ",
                  kMixMaxPairs, " pairs");
  const Tensor& first = inputs[0];
  STD_TORCH_CHECK(first.dim() >= 1, "inputs must have a batch axis");
  Run::check(first);
  MixArgs args;
  args.dtype = dtype_of(first, "inputs");
  args.batch = first.size(0);
  args.count = 1;
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < first.dim(); ++d) {
    shape.push_back(first.size(d));
    if (d > 0) args.count *= first.size(d);
  }
  args.inputs = (int)inputs.size();
  args.outputs = (int)outputs;
  args.pairs = (int)pairs.size() / 2;

  TensorList results;
  for (int j = 0; j < args.outputs; ++j) results.push_back(new_result(first, shape, args.count));
  const std::vector<int64_t> table = {args.batch, args.pairs};
  const bool empty = args.batch == 0 || args.count == 0;
  Tensor products = empty ? new_zeros(first, table, ScalarType::Double) : new_empty(first, table, ScalarType::Double);

  const Tensor layout = results.empty() ? new_result(first, shape, args.count) : results[0];
  TensorList copies;  // of inputs that lie otherwise
  for (int k = 0; k < args.inputs; ++k) {
    Tensor t = inputs[(size_t)k];
    check_shape(t, shape, "inputs[" + std::to_string(k) + "]");
    STD_TORCH_CHECK(t.device() == first.device() && t.scalar_type() == first.scalar_type(),
                    "inputs must be tensors of one dtype on one device, inputs[", k, "] is not");
    if (!same_layout(t, layout)) {
      Tensor copy = torch::stable::empty_like(layout);
      torch::stable::copy_(copy, t);
      copies.push_back(copy);
      t = copy;
    }
    args.in[k] = t.const_data_ptr();
    args.in_stride[k] = args.batch > 1 ? t.stride(0) : 0;
  }
  for (int j = 0; j < args.outputs; ++j) args.out[j] = results[(size_t)j].mutable_data_ptr();
  for (int p = 0; p < args.pairs; ++p)
    for (int side = 0; side < 2; ++side) {
      const int64_t at = pairs[(size_t)(2 * p + side)];
      STD_TORCH_CHECK(at >= 0 && at <= args.inputs, "pairs must hold numbers in 0..", args.inputs, ", got ", at);
      args.pair[p][side] = (int)at;
    }
  if (coefficients.has_value()) {
    const Tensor& c = *coefficients;
    const bool shared = c.dim() > 0 && c.size(0) == 1;
    check_shape(c, {shared ? 1 : args.batch, outputs, args.inputs + 1}, "coefficients");
    STD_TORCH_CHECK(c.device() == first.device() && c.scalar_type() == ScalarType::Double && c.is_contiguous(),
                    "coefficients must be a contiguous float64 tensor on the device of the inputs");
    args.coefficients = static_cast<const double*>(c.const_data_ptr());
    args.coefficient_stride = shared ? 0 : outputs * (args.inputs + 1);
  } else {
    // One row of numbers for all samples, or one for each.
    const int64_t row = outputs * (args.inputs + 1), given = (int64_t)numbers.size();
    STD_TORCH_CHECK(given == row || given == row * args.batch, "numbers must hold ", row,
                    " coefficients, or as many for each sample, got ", given);
    args.coefficient_stride = given == row ? 0 : row;
    args.coefficients = numbers.data();
  }
  args.products = static_cast<double*>(products.mutable_data_ptr());
  if (!empty) Run::run(args, !coefficients.has_value(), first);
  return {std::move(results), std::move(products)};
}

}  // namespace transfuse
