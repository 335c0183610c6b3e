// Registration of the ops on lists of tensors: schemas, and the CPU kernels.
#include "multitensor_args.h"

namespace transfuse {
namespace {

struct RunOnCpu {
  static void check(const Tensor& t) { STD_TORCH_CHECK(t.is_cpu(), "the tensors must be CPU tensors"); }
  static void lincomb(const LincombArgs& a, const Tensor&) { multitensor_kernels().lincomb(a, torch_parallel()); }
  static void block_dots(const BlockDotsArgs& a, const Tensor&) {
    multitensor_kernels().block_dots(a, torch_parallel());
  }
  static void ratio(const RatioArgs& a, const Tensor&) { multitensor_kernels().ratio(a, torch_parallel()); }
  static void gram(const GramArgs& a, const Tensor&) { multitensor_sum_kernels().gram(a, torch_parallel()); }
  static void norm(const NormArgs& a, const Tensor&) { multitensor_sum_kernels().norm(a, torch_parallel()); }
  static void perturb(PerturbArgs a, const double* factor, const Tensor&) {
    a.factor = *factor;
    multitensor_sum_kernels().perturb(a, torch_parallel());
  }
  static void copy(const CopyArgs& a, const Tensor&) { multitensor_sum_kernels().copy(a, torch_parallel()); }
};

Tensor select_magnitude(const TensorList& tensors, int64_t rank) {
  STD_TORCH_CHECK(!tensors.empty(), "tensors must not be empty");
  Lists x(tensors[0]);
  x.set_sizes(tensors, tensors.size());
  x.add(tensors, "tensors");
  int64_t total = 0;
  for (size_t j = 0; j < tensors.size(); ++j) {
    total += tensors[j].numel();
    STD_TORCH_CHECK(tensors[j].scalar_type() == tensors[0].scalar_type(), "tensors must have one dtype");
  }
  STD_TORCH_CHECK(rank >= 0 && rank < total, "rank must be in 0..", total - 1, ", got ", rank);
  Tensor value = new_empty(tensors[0], {}, ScalarType::Double);
  SelectArgs args;
  args.blocks = x.blocks();
  args.size = x.sizes();
  args.x = x.flats();
  args.rank = rank;
  args.value = static_cast<double*>(value.mutable_data_ptr());
  multitensor_sum_kernels().select(args, torch_parallel());
  return value;
}

TensorList elect(const TensorList& base, const TensorList& deltas, const Tensor& thresholds, double scale) {
  const int64_t lists = thresholds.numel();
  STD_TORCH_CHECK(lists > 0 && !deltas.empty() && (int64_t)deltas.size() % lists == 0, "deltas must be a positive ",
                  "multiple of ", lists, " tensors, got ", deltas.size());
  check_table(thresholds, deltas[0], {lists}, "thresholds");
  const size_t blocks = deltas.size() / (size_t)lists;
  STD_TORCH_CHECK(base.empty() || base.size() == blocks, "base must be ", blocks, " tensors, got ", base.size());
  Lists x(deltas[0]), first(deltas[0]), to(deltas[0]);
  x.set_sizes(deltas, blocks), first.set_sizes(deltas, blocks), to.set_sizes(deltas, blocks);
  x.add(deltas, "deltas");
  first.add(base, "base");
  TensorList results = results_like(base.empty() ? deltas : base, blocks, to);
  ElectArgs args;
  args.blocks = (int64_t)blocks;
  args.size = x.sizes();
  args.lists = (int)lists;
  args.base = base.empty() ? nullptr : first.flats();
  args.deltas = x.flats();
  args.out = to.flats();
  args.thresholds = static_cast<const double*>(thresholds.const_data_ptr());
  args.scale = scale;
  multitensor_sum_kernels().elect(args, torch_parallel());
  return results;
}

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("lincomb(Tensor[] base, Tensor[] deltas, Tensor coefficients, Tensor[] ids, int[] keys) -> Tensor[]");
  m.def("block_dots(Tensor[] grads, Tensor[] deltas, Tensor[] ids, int[] keys, int partitions) -> Tensor");
  m.def("ratio_merge(Tensor[] thetas, Tensor[] weights, Tensor coefficients, float[] floors) -> (Tensor[], Tensor)");
  m.def("multi_gram(Tensor[] tensors, int lists, int[] sizes) -> Tensor");
  m.def("block_norms(Tensor[] tensors, Tensor[] scale, int order) -> Tensor");
  m.def("sam_perturb_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] backup, Tensor factor, bool adaptive) -> ()");
  m.def("copy_lists_(Tensor(a!)[] to, Tensor[] from) -> ()");
  m.def("select_magnitude(Tensor[] tensors, int rank) -> Tensor");
  m.def("elect_signs(Tensor[] base, Tensor[] deltas, Tensor thresholds, float scale) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  using Ops = transfuse::MultitensorOps<transfuse::RunOnCpu>;
  m.impl("lincomb", TORCH_BOX(&Ops::lincomb));
  m.impl("block_dots", TORCH_BOX(&Ops::block_dots));
  m.impl("ratio_merge", TORCH_BOX(&Ops::ratio));
  m.impl("multi_gram", TORCH_BOX(&Ops::gram));
  m.impl("block_norms", TORCH_BOX(&Ops::block_norms));
  m.impl("sam_perturb_", TORCH_BOX(&Ops::perturb));
  m.impl("copy_lists_", TORCH_BOX(&Ops::copy_lists));
  m.impl("select_magnitude", TORCH_BOX(&transfuse::select_magnitude));
  m.impl("elect_signs", TORCH_BOX(&transfuse::elect));
}
