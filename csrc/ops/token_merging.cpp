// Registration of the token merging ops: schemas, checks, and the CPU kernels.
#include "transfuse/token_merging.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "torch_glue.h"

namespace transfuse {
namespace {

ScalarType accumulate_type(const Tensor& t, const char* name) { return statistics_type(dtype_of(t, name)); }

// Checks a (batch, token, channel) tensor and returns its view.
View tokens_view(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3, name, " must have 3 axes (batch, tokens, channels), got ", t.dim());
  return view_of(t, name);
}

void check_integers(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long, name, " must be an int64 CPU tensor");
}

// A (batch or 1, n) integer tensor of a plan; the stride between batch entries.
const int64_t* plan_array(const Tensor& t, int64_t batch, const char* name, int64_t* stride) {
  check_integers(t, name);
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(0) == batch || t.size(0) == 1), name, " must have 2 axes, the first of ",
                  batch, " or 1");
  STD_TORCH_CHECK(t.size(1) < 2 || t.stride(1) == 1, name, " must be contiguous along its second axis");
  *stride = t.size(0) == 1 ? 0 : t.stride(0);
  return static_cast<const int64_t*>(t.const_data_ptr());
}

PlanView plan_view(const Tensor& rows, const Tensor& order, const Tensor& start, int64_t batch) {
  PlanView p;
  p.batch = batch;
  p.row = plan_array(rows, batch, "rows", &p.row_stride);
  p.order = plan_array(order, batch, "order", &p.order_stride);
  p.start = plan_array(start, batch, "start", &p.start_stride);
  p.tokens = rows.size(1);
  p.rows = start.size(1) - 1;
  STD_TORCH_CHECK(order.size(1) == p.tokens, "order must have as many entries as rows");
  STD_TORCH_CHECK(p.rows >= 0, "start must have at least one entry");
  return p;
}

void set_scale(const OptionalTensor& scale, const Tensor& x, const PlanView& plan, MergeArgs* args) {
  if (!scale.has_value()) return;
  check_shape(*scale, {plan.batch, plan.tokens}, "scale");
  STD_TORCH_CHECK(scale->is_cpu() && scale->scalar_type() == accumulate_type(x, "x"),
                  "scale must be a CPU tensor of float32 (float64 for float64)");
  STD_TORCH_CHECK(plan.tokens < 2 || scale->stride(1) == 1, "scale must be contiguous along its second axis");
  args->scale = scale->const_data_ptr();
  args->scale_stride = scale->stride(0);
}

Weighting weighting_of(int64_t code, int64_t most) {
  STD_TORCH_CHECK(0 <= code && code <= most, "weighting must be in [0, ", most, "], got ", code);
  return (Weighting)code;
}

void check_indices(bool good) { STD_TORCH_CHECK(good, "the plan names a token or row that does not exist"); }

std::tuple<Tensor, Tensor> nearest(const Tensor& x, const Tensor& reference, const OptionalTensor& mask,
                                   bool exclude_self) {
  NearestArgs a;
  a.x = tokens_view(x, "x");
  a.reference = tokens_view(reference, "reference");
  a.dtype = a.x.dtype;
  a.batch = x.size(0);
  a.rows = x.size(1);
  a.columns = reference.size(1);
  a.depth = x.size(2);
  STD_TORCH_CHECK(a.reference.dtype == a.dtype, "reference must have the dtype of x");
  STD_TORCH_CHECK(reference.size(0) == a.batch || reference.size(0) == 1, "reference must have the batch of x or 1");
  STD_TORCH_CHECK(reference.size(2) == a.depth, "reference must have the channels of x");
  STD_TORCH_CHECK(!exclude_self || a.rows == a.columns, "exclude_self needs as many references as tokens");
  if (reference.size(0) == 1) a.reference.stride[0] = 0;
  if (mask.has_value()) {
    const Tensor& m = *mask;
    STD_TORCH_CHECK(m.is_cpu() && m.scalar_type() == ScalarType::Bool && m.dim() == 2, "mask must be a boolean matrix");
    STD_TORCH_CHECK((m.size(0) == a.batch || m.size(0) == 1) && m.size(1) == a.columns,
                    "mask must have shape (batch or 1, references)");
    a.mask = static_cast<const uint8_t*>(m.const_data_ptr());
    a.mask_stride[0] = m.size(0) == 1 ? 0 : m.stride(0);
    a.mask_stride[1] = m.stride(1);
  }
  a.exclude_self = exclude_self;
  Tensor similarity = new_empty(x, {a.batch, a.rows}, accumulate_type(x, "x"));
  Tensor index = new_empty(x, {a.batch, a.rows}, ScalarType::Long);
  a.similarity = similarity.mutable_data_ptr();
  a.index = static_cast<int64_t*>(index.mutable_data_ptr());
  token_merging_kernels().nearest(a, torch_parallel());
  return {similarity, index};
}

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
  a.metric = tokens_view(metric, "metric");
  a.dtype = a.metric.dtype;
  a.batch = metric.size(0);
  a.tokens = metric.size(1);
  a.depth = metric.size(2);
  std::vector<int64_t> chosen;
  if (destination.has_value()) {
    check_integers(*destination, "destination");
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

// What merging and giving back have in common: rows of (batch, row, channel) and a plan.
MergeArgs merge_args(const Tensor& in, const char* name, const Tensor& rows, const Tensor& order, const Tensor& start) {
  MergeArgs a;
  a.in = tokens_view(in, name);
  a.dtype = a.in.dtype;
  a.depth = in.size(2);
  a.plan = plan_view(rows, order, start, in.size(0));
  return a;
}

Tensor segments(const Tensor& x, const OptionalTensor& scale, const Tensor& rows, const Tensor& order,
                const Tensor& start, int64_t weighting) {
  MergeArgs a = merge_args(x, "x", rows, order, start);
  STD_TORCH_CHECK(x.size(1) == a.plan.tokens, "x must have the plan's ", a.plan.tokens, " tokens, got ", x.size(1));
  a.weighting = weighting_of(weighting, 3);
  set_scale(scale, x, a.plan, &a);
  Tensor out = new_empty(x, {a.plan.batch, a.plan.rows, a.depth}, x.scalar_type());
  a.out = out.mutable_data_ptr();
  check_indices(token_merging_kernels().segments(a, torch_parallel()));
  return out;
}

Tensor gather(const Tensor& y, const OptionalTensor& scale, const Tensor& rows, const Tensor& order,
              const Tensor& start, int64_t weighting) {
  MergeArgs a = merge_args(y, "y", rows, order, start);
  STD_TORCH_CHECK(y.size(1) == a.plan.rows, "y must have the plan's ", a.plan.rows, " rows, got ", y.size(1));
  a.weighting = weighting_of(weighting, 2);
  set_scale(scale, y, a.plan, &a);
  Tensor out = new_empty(y, {a.plan.batch, a.plan.tokens, a.depth}, y.scalar_type());
  a.out = out.mutable_data_ptr();
  check_indices(token_merging_kernels().gather(a, torch_parallel()));
  return out;
}

// The second result is empty unless the winners are asked for.
std::tuple<Tensor, Tensor> amax(const Tensor& x, const Tensor& rows, const Tensor& order, const Tensor& start,
                                bool winners) {
  MergeArgs a = merge_args(x, "x", rows, order, start);
  STD_TORCH_CHECK(x.size(1) == a.plan.tokens, "x must have the plan's ", a.plan.tokens, " tokens, got ", x.size(1));
  const std::vector<int64_t> shape = {a.plan.batch, a.plan.rows, a.depth};
  Tensor out = new_empty(x, shape, x.scalar_type());
  Tensor winner = new_empty(x, winners ? shape : std::vector<int64_t>{0}, ScalarType::Long);
  a.out = out.mutable_data_ptr();
  if (winners) a.winner = static_cast<int64_t*>(winner.mutable_data_ptr());
  check_indices(token_merging_kernels().amax(a, torch_parallel()));
  return {out, winner};
}

Tensor push(const Tensor& x, const Tensor& reference, const Tensor& similarity, const Tensor& index, double alpha,
            double threshold) {
  PushArgs a;
  a.x = tokens_view(x, "x");
  a.reference = tokens_view(reference, "reference");
  a.dtype = a.x.dtype;
  a.batch = x.size(0);
  a.tokens = x.size(1);
  a.references = reference.size(1);
  a.depth = x.size(2);
  STD_TORCH_CHECK(a.reference.dtype == a.dtype, "reference must have the dtype of x");
  STD_TORCH_CHECK(reference.size(0) == a.batch || reference.size(0) == 1, "reference must have the batch of x or 1");
  STD_TORCH_CHECK(reference.size(2) == a.depth, "reference must have the channels of x");
  if (reference.size(0) == 1) a.reference.stride[0] = 0;
  check_shape(similarity, {a.batch, a.tokens}, "similarity");
  check_shape(index, {a.batch, a.tokens}, "index");
  check_integers(index, "index");
  STD_TORCH_CHECK(similarity.is_cpu() && similarity.scalar_type() == accumulate_type(x, "x"),
                  "similarity must be a CPU tensor of float32 (float64 for float64)");
  STD_TORCH_CHECK(similarity.is_contiguous() && index.is_contiguous(), "similarity and index must be contiguous");
  a.similarity = similarity.const_data_ptr();
  a.index = static_cast<const int64_t*>(index.const_data_ptr());
  a.alpha = alpha;
  a.threshold = threshold;
  Tensor out = new_empty(x, {a.batch, a.tokens, a.depth}, x.scalar_type());
  a.out = out.mutable_data_ptr();
  check_indices(token_merging_kernels().push(a, torch_parallel()));
  return out;
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
  m.impl("nearest_tokens", TORCH_BOX(&transfuse::nearest));
  m.impl("match_tokens", TORCH_BOX(&transfuse::match));
  m.impl("merge_segments", TORCH_BOX(&transfuse::segments));
  m.impl("merge_gather", TORCH_BOX(&transfuse::gather));
  m.impl("merge_amax", TORCH_BOX(&transfuse::amax));
  m.impl("push_tokens", TORCH_BOX(&transfuse::push));
}
