// Registration of the NES ops: schemas, and the CPU kernels.
#include "transfuse/nes.h"

#include "torch_glue.h"

namespace transfuse {
namespace {

NesArgs nes_args(const Tensor& x, const OptionalTensor& mask, int64_t seed, int64_t start) {
  NesArgs args;
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "x must be a contiguous CPU tensor");
  STD_TORCH_CHECK(start >= 0, "start must not be negative, got ", start);
  args.dtype = dtype_of(x, "x");
  args.count = x.numel();
  args.x = x.const_data_ptr();
  args.seed = (uint64_t)seed;
  args.start = start;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->is_cpu() && mask->is_contiguous() && mask->scalar_type() == ScalarType::Bool &&
                        mask->numel() == x.numel(),
                    "mask must be a contiguous bool CPU tensor of the size of x");
    args.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  return args;
}

Tensor nes_perturb(const Tensor& x, const OptionalTensor& mask, int64_t seed, int64_t start, int64_t samples,
                   double sigma) {
  NesArgs args = nes_args(x, mask, seed, start);
  STD_TORCH_CHECK(samples >= 0, "samples must not be negative, got ", samples);
  args.samples = samples;
  args.sigma = sigma;
  std::vector<int64_t> shape{2 * samples};
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(x.size(d));
  Tensor out = new_empty(x, shape, x.scalar_type());
  args.out = out.mutable_data_ptr();
  if (args.count > 0 && samples > 0) nes_kernels().perturb(args, torch_parallel());
  return out;
}

Tensor nes_gradient(const Tensor& weights, const Tensor& x, const OptionalTensor& mask, int64_t seed, int64_t start) {
  NesArgs args = nes_args(x, mask, seed, start);
  STD_TORCH_CHECK(
      weights.is_cpu() && weights.is_contiguous() && weights.dim() == 1 && weights.scalar_type() == ScalarType::Double,
      "weights must be a contiguous float64 CPU vector");
  args.samples = weights.size(0);
  args.weights = static_cast<const double*>(weights.const_data_ptr());
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(x.size(d));
  Tensor sum = new_empty(x, shape, statistics_type(args.dtype));
  args.sum = sum.mutable_data_ptr();
  if (args.count > 0) nes_kernels().gradient(args, torch_parallel());
  return sum;
}

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("nes_perturb(Tensor x, Tensor? mask, int seed, int start, int samples, float sigma) -> Tensor");
  m.def("nes_gradient(Tensor weights, Tensor x, Tensor? mask, int seed, int start) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("nes_perturb", TORCH_BOX(&transfuse::nes_perturb));
  m.impl("nes_gradient", TORCH_BOX(&transfuse::nes_gradient));
}
