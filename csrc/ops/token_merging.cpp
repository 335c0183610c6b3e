// Registration of the token merging ops: schemas, planning, and the CPU kernels.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "token_merging_args.h"

namespace transfuse {
namespace {

void check_indices(bool good) { STD_TORCH_CHECK(good, "the plan names a token or row that does not exist"); }

struct RunOnCpu {
  static void check(const Tensor& tokens) { STD_TORCH_CHECK(tokens.is_cpu(), "the tokens must be a CPU tensor"); }
  static void nearest(const NearestArgs& a, const Tensor&) { token_merging_kernels().nearest(a, torch_parallel()); }
  static void segments(const MergeArgs& a, const Tensor&) {
    check_indices(token_merging_kernels().segments(a, torch_parallel()));
  }
  static void amax(const MergeArgs& a, const Tensor&) {
    check_indices(token_merging_kernels().amax(a, torch_parallel()));
  }
  static void gather(const MergeArgs& a, const Tensor&) {
    check_indices(token_merging_kernels().gather(a, torch_parallel()));
  }
  static void push(const PushArgs& a, const Tensor&) {
    check_indices(token_merging_kernels().push(a, torch_parallel()));
  }
};

// Checks different token numbers below `tokens` and returns them in ascending order.
std::vector<int64_t> token_set(std::vector<int64_t> given, int64_t tokens, const char* name) {
  std::sort(given.begin(), given.end());
  STD_TORCH_CHECK(given.empty() || (given.front() >= 0 && given.back() < tokens), name,
                  " must hold token numbers in [0, ", tokens, ")");
  STD_TORCH_CHECK(std::adjacent_find(given.begin(), given.end()) == given.end(), name, " must hold different tokens");
  return given;
}

std::tuple<Tensor, Tensor, Tensor> match(const Tensor& metric, const OptionalTensor& destination,
                                         const std::vector<int64_t>& protect, int64_t merged) {
  MatchArgs a;
  RunOnCpu::check(metric);
  a.metric = tokens_view(metric, "metric");
  a.dtype = a.metric.dtype;
  a.batch = metric.size(0);
  a.tokens = metric.size(1);
  a.depth = metric.size(2);
  std::vector<int64_t> chosen;
  if (destination.has_value()) {
    check_integers(*destination, metric, "destination");
    STD_TORCH_CHECK(destination->dim() == 1, "destination must have 1 axis");
    const int64_t* p = static_cast<const int64_t*>(destination->const_data_ptr());
    for (int64_t i = 0; i < destination->size(0); ++i) chosen.push_back(p[i * destination->stride(0)]);
  } else {
    for (int64_t i = 1; i < a.tokens; i += 2) chosen.push_back(i);
  }
  const std::vector<int64_t> destinations = token_set(std::move(chosen), a.tokens, "destination");
  const std::vector<int64_t> protects = token_set(protect, a.tokens, "protect");
  std::vector<int64_t> fixed;  // tokens that cannot be merged away
  std::set_union(destinations.begin(), destinations.end(), protects.begin(), protects.end(), std::back_inserter(fixed));
  const int64_t open = (int64_t)(fixed.size() - protects.size());  // destinations that are not protected
  const int64_t most = open == 0 ? 0 : a.tokens - (int64_t)fixed.size();
  STD_TORCH_CHECK(0 <= merged && merged <= most, "merged must be in [0, ", most, "], got ", merged);
  a.destination = destinations.data();
  a.destinations = (int64_t)destinations.size();
  a.protect = protects.data();
  a.protects = (int64_t)protects.size();
  a.merged = merged;
  Tensor rows = new_empty(metric, {a.batch, a.tokens}, ScalarType::Long);
  Tensor order = new_empty(metric, {a.batch, a.tokens}, ScalarType::Long);
  Tensor start = new_empty(metric, {a.batch, a.tokens - merged + 1}, ScalarType::Long);
  a.rows = static_cast<int64_t*>(rows.mutable_data_ptr());
  a.order = static_cast<int64_t*>(order.mutable_data_ptr());
  a.start = static_cast<int64_t*>(start.mutable_data_ptr());
  token_merging_kernels().match(a, torch_parallel());
  return {rows, order, start};
}

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("nearest_tokens(Tensor x, Tensor reference, Tensor? mask, bool exclude_self) -> (Tensor, Tensor)");
  m.def("match_tokens(Tensor metric, Tensor? destination, int[] protect, int merged) -> (Tensor, Tensor, Tensor)");
  m.def("merge_segments(Tensor x, Tensor? scale, Tensor rows, Tensor order, Tensor start, int weighting) -> Tensor");
  m.def("merge_gather(Tensor y, Tensor? scale, Tensor rows, Tensor order, Tensor start, int weighting) -> Tensor");
  m.def("merge_amax(Tensor x, Tensor rows, Tensor order, Tensor start, bool winners) -> (Tensor, Tensor)");
  m.def(
      "push_tokens(Tensor x, Tensor reference, Tensor similarity, Tensor index, float alpha, float threshold) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  using Ops = transfuse::TokenMergingOps<transfuse::RunOnCpu>;
  m.impl("nearest_tokens", TORCH_BOX(&Ops::nearest));
  m.impl("match_tokens", TORCH_BOX(&transfuse::match));
  m.impl("merge_segments", TORCH_BOX(&Ops::segments));
  m.impl("merge_gather", TORCH_BOX(&Ops::gather));
  m.impl("merge_amax", TORCH_BOX(&Ops::amax));
  m.impl("push_tokens", TORCH_BOX(&Ops::push));
}
