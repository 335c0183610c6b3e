// What the CPU and the CUDA registration of token merging share: checks, and calls as the kernels take them.
#pragma once

#include "torch_glue.h"
#include "transfuse/token_merging.h"

namespace transfuse {

inline ScalarType accumulate_type(const Tensor& t, const char* name) { return statistics_type(dtype_of(t, name)); }

// Checks a (batch, token, channel) tensor and returns its view.
inline View tokens_view(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3, name, " must have 3 axes (batch, tokens, channels), got ", t.dim());
  return strided_view(t, name);
}

// Every tensor of a call is on the device of its first.
inline void check_device(const Tensor& t, const Tensor& first, const char* name) {
  STD_TORCH_CHECK(t.device() == first.device(), name, " must be on the device of the tokens");
}

inline void check_integers(const Tensor& t, const Tensor& first, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, name, " must be an int64 tensor");
  check_device(t, first, name);
}

// Tokens and references to compare them with, (batch or 1, references, channels).
template <class Args>
inline void set_tokens(const Tensor& x, const Tensor& reference, Args* a) {
  check_device(reference, x, "reference");
  a->x = tokens_view(x, "x");
  a->reference = tokens_view(reference, "reference");
  a->dtype = a->x.dtype;
  a->batch = x.size(0);
  a->depth = x.size(2);
  STD_TORCH_CHECK(a->reference.dtype == a->dtype, "reference must have the dtype of x");
  STD_TORCH_CHECK(reference.size(0) == a->batch || reference.size(0) == 1, "reference must have the batch of x or 1");
  STD_TORCH_CHECK(reference.size(2) == a->depth, "reference must have the channels of x");
  if (reference.size(0) == 1) a->reference.stride[0] = 0;
}

// A (batch or 1, n) integer tensor of a plan; the stride between batch entries.
inline const int64_t* plan_array(const Tensor& t, const Tensor& first, const char* name, int64_t* stride) {
  check_integers(t, first, name);
  const int64_t batch = first.size(0);
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(0) == batch || t.size(0) == 1), name, " must have 2 axes, the first of ",
                  batch, " or 1");
  STD_TORCH_CHECK(t.size(1) < 2 || t.stride(1) == 1, name, " must be contiguous along its second axis");
  *stride = t.size(0) == 1 ? 0 : t.stride(0);
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline PlanView plan_view(const Tensor& rows, const Tensor& order, const Tensor& start, const Tensor& first) {
  PlanView p;
  p.batch = first.size(0);
  p.row = plan_array(rows, first, "rows", &p.row_stride);
  p.order = plan_array(order, first, "order", &p.order_stride);
  p.start = plan_array(start, first, "start", &p.start_stride);
  p.tokens = rows.size(1);
  p.rows = start.size(1) - 1;
  STD_TORCH_CHECK(order.size(1) == p.tokens, "order must have as many entries as rows");
  STD_TORCH_CHECK(p.rows >= 0, "start must have at least one entry");
  return p;
}

inline void set_scale(const OptionalTensor& scale, const Tensor& x, const PlanView& plan, MergeArgs* args) {
  if (!scale.has_value()) return;
  check_shape(*scale, {plan.batch, plan.tokens}, "scale");
  check_device(*scale, x, "scale");
  STD_TORCH_CHECK(scale->scalar_type() == accumulate_type(x, "x"), "scale must be float32 (float64 for float64)");
  STD_TORCH_CHECK(plan.tokens < 2 || scale->stride(1) == 1, "scale must be contiguous along its second axis");
  args->scale = scale->const_data_ptr();
  args->scale_stride = scale->stride(0);
}

inline Weighting weighting_of(int64_t code, int64_t most) {
  STD_TORCH_CHECK(0 <= code && code <= most, "weighting must be in [0, ", most, "], got ", code);
  return (Weighting)code;
}

// What merging and giving back have in common: rows of (batch, row, channel) and a plan.
inline MergeArgs merge_args(const Tensor& in, const char* name, const Tensor& rows, const Tensor& order,
                            const Tensor& start) {
  MergeArgs a;
  a.in = tokens_view(in, name);
  a.dtype = a.in.dtype;
  a.depth = in.size(2);
  a.plan = plan_view(rows, order, start, in);
  return a;
}

// Tokens to merge, as many as the plan has.
inline MergeArgs merge_args(const Tensor& x, const Tensor& rows, const Tensor& order, const Tensor& start) {
  MergeArgs a = merge_args(x, "x", rows, order, start);
  STD_TORCH_CHECK(x.size(1) == a.plan.tokens, "x must have the plan's ", a.plan.tokens, " tokens, got ", x.size(1));
  return a;
}

// The ops over launchers: `Run::check(tokens)` refuses other devices; `Run::segments(args, tokens)` and its like
// compute.
template <class Run>
struct TokenMergingOps {
  static std::tuple<Tensor, Tensor> nearest(const Tensor& x, const Tensor& reference, const OptionalTensor& mask,
                                            bool exclude_self) {
    NearestArgs a;
    Run::check(x);
    set_tokens(x, reference, &a);
    a.rows = x.size(1);
    a.columns = reference.size(1);
    STD_TORCH_CHECK(!exclude_self || a.rows == a.columns, "exclude_self needs as many references as tokens");
    if (mask.has_value()) {
      const Tensor& m = *mask;
      check_device(m, x, "mask");
      STD_TORCH_CHECK(m.scalar_type() == ScalarType::Bool && m.dim() == 2, "mask must be a boolean matrix");
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
    Run::nearest(a, x);
    return {similarity, index};
  }

  static Tensor segments(const Tensor& x, const OptionalTensor& scale, const Tensor& rows, const Tensor& order,
                         const Tensor& start, int64_t weighting) {
    Run::check(x);
    MergeArgs a = merge_args(x, rows, order, start);
    a.weighting = weighting_of(weighting, 3);
    set_scale(scale, x, a.plan, &a);
    Tensor out = new_empty(x, {a.plan.batch, a.plan.rows, a.depth}, x.scalar_type());
    a.out = out.mutable_data_ptr();
    Run::segments(a, x);
    return out;
  }

  static Tensor gather(const Tensor& y, const OptionalTensor& scale, const Tensor& rows, const Tensor& order,
                       const Tensor& start, int64_t weighting) {
    Run::check(y);
    MergeArgs a = merge_args(y, "y", rows, order, start);
    STD_TORCH_CHECK(y.size(1) == a.plan.rows, "y must have the plan's ", a.plan.rows, " rows, got ", y.size(1));
    a.weighting = weighting_of(weighting, 2);
    set_scale(scale, y, a.plan, &a);
    Tensor out = new_empty(y, {a.plan.batch, a.plan.tokens, a.depth}, y.scalar_type());
    a.out = out.mutable_data_ptr();
    Run::gather(a, y);
    return out;
  }

  // The second result is empty unless the winners are asked for.
  static std::tuple<Tensor, Tensor> amax(const Tensor& x, const Tensor& rows, const Tensor& order, const Tensor& start,
                                         bool winners) {
    Run::check(x);
    MergeArgs a = merge_args(x, rows, order, start);
    const std::vector<int64_t> shape = {a.plan.batch, a.plan.rows, a.depth};
    Tensor out = new_empty(x, shape, x.scalar_type());
    Tensor winner = new_empty(x, winners ? shape : std::vector<int64_t>{0}, ScalarType::Long);
    a.out = out.mutable_data_ptr();
    if (winners) a.winner = static_cast<int64_t*>(winner.mutable_data_ptr());
    Run::amax(a, x);
    return {out, winner};
  }

  static Tensor push(const Tensor& x, const Tensor& reference, const Tensor& similarity, const Tensor& index,
                     double alpha, double threshold) {
    PushArgs a;
    Run::check(x);
    set_tokens(x, reference, &a);
    a.tokens = x.size(1);
    a.references = reference.size(1);
    check_device(similarity, x, "similarity");
    check_shape(similarity, {a.batch, a.tokens}, "similarity");
    check_shape(index, {a.batch, a.tokens}, "index");
    check_integers(index, x, "index");
    STD_TORCH_CHECK(similarity.scalar_type() == accumulate_type(x, "x"),
                    "similarity must be float32 (float64 for float64)");
    STD_TORCH_CHECK(similarity.is_contiguous() && index.is_contiguous(), "similarity and index must be contiguous");
    a.similarity = similarity.const_data_ptr();
    a.index = static_cast<const int64_t*>(index.const_data_ptr());
    a.alpha = alpha;
    a.threshold = threshold;
    Tensor out = new_empty(x, {a.batch, a.tokens, a.depth}, x.scalar_type());
    a.out = out.mutable_data_ptr();
    Run::push(a, x);
    return out;
  }
};

}  // namespace transfuse
