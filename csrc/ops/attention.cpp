// Registration of the attention ops: the differentiable core (one softmax group) in its four directions, and the fused
// inference op with groups, gates and blends.
#include "attention_args.h"

namespace transfuse {
namespace {

struct RunOnCpu {
  static const Tensor& prepared(const Tensor& t) { return t; }
  static const TensorList& prepared(const TensorList& list) { return list; }
  static void forward(const AttentionForward& args, const Tensor& query) {
    STD_TORCH_CHECK(query.is_cpu(), "query must be a CPU tensor");
    attention_kernels().forward(args, torch_parallel());
  }
};

const void* statistics(const Tensor& t, const Call& call, const char* name) {
  const AttentionShape& s = call.shape;
  check_shape(t, {s.batch, s.heads, s.queries}, name);
  STD_TORCH_CHECK(t.scalar_type() == statistics_type(s.dtype) && t.is_contiguous() && t.is_cpu(), name,
                  " must be a contiguous CPU tensor of the statistics dtype");
  return t.const_data_ptr();
}

View output_like(const Tensor& t, const Call& call, int64_t width, const char* name) {
  check_shape(t, {call.shape.batch, call.shape.heads, call.shape.queries, width}, name);
  return view_of(t, name);
}

std::vector<SourceTangent> tangents_of(const Call& call, const TensorList& keys, const TensorList& values,
                                       const OptionalTensorList& biases) {
  const AttentionShape& s = call.shape;
  const size_t n = call.sources.size();
  STD_TORCH_CHECK(keys.size() == n && values.size() == n && biases.size() == n,
                  "keys_t, values_t and biases_t must have one entry per source");
  std::vector<SourceTangent> tangents(n);
  for (size_t i = 0; i < n; ++i) {
    const SourceView& v = call.sources[i];
    check_shape(keys[i], {v.batch, s.kv_heads, v.length, s.key_dim}, "keys_t");
    check_shape(values[i], {v.batch, s.kv_heads, v.length, s.value_dim}, "values_t");
    tangents[i].key = view_of(keys[i], "keys_t");
    tangents[i].value = view_of(values[i], "values_t");
    if (biases[i].has_value()) {
      tangents[i].bias = broadcast_view(keys[i], *biases[i], bias_shape(s, v), "biases_t");
    }
  }
  return tangents;
}

using Gradients = std::tuple<Tensor, TensorList, TensorList, TensorList>;

// Runs the backward kernel. Keys and values get their gradients in their own dtype; the query's and the biases' are
// summed over key blocks and batches, so they are returned in the statistics dtype for one rounding at the end.
Gradients run_backward(const Call& call, AttentionBackward args, const Tensor& query, const TensorList& keys,
                       const TensorList& values, const TensorList& biases, const std::vector<int64_t>& bias_at,
                       const std::vector<bool>& bias_grads) {
  const AttentionShape& s = call.shape;
  const size_t n = keys.size();
  STD_TORCH_CHECK(bias_grads.size() == n, "bias_grads must have one entry per source");
  const ScalarType wide = statistics_type(s.dtype);
  Tensor grad_query = new_zeros(query, {s.batch, s.heads, s.queries, s.key_dim}, wide);
  TensorList grad_keys, grad_values, grad_biases;
  std::vector<SourceGradient> gradients(n);
  for (size_t i = 0; i < n; ++i) {
    const SourceView& v = call.sources[i];
    grad_keys.push_back(new_empty(query, {v.batch, s.kv_heads, v.length, s.key_dim}, keys[i].scalar_type()));
    grad_values.push_back(new_empty(query, {v.batch, s.kv_heads, v.length, s.value_dim}, values[i].scalar_type()));
    gradients[i].key = mutable_view_of(grad_keys[i]);
    gradients[i].value = mutable_view_of(grad_values[i]);
    if (!bias_grads[i]) continue;
    STD_TORCH_CHECK(bias_at[i] >= 0, "bias_grads[", i, "] is set but source ", i, " has no bias");
    std::vector<int64_t> shape;
    for (int64_t d = 0; d < 4; ++d) shape.push_back(biases[(size_t)bias_at[i]].size(d));
    grad_biases.push_back(new_zeros(query, shape, wide));
    gradients[i].bias = mutable_view_of(grad_biases.back());
    for (int64_t d = 0; d < 4; ++d)
      if (shape[(size_t)d] == 1) gradients[i].bias.stride[d] = 0;
  }
  args.grad_query = mutable_view_of(grad_query);
  args.gradients = gradients.data();
  attention_kernels().backward(args, torch_parallel());
  return {grad_query, grad_keys, grad_values, grad_biases};
}

Gradients attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                             const TensorList& keys, const TensorList& values, const TensorList& biases,
                             const std::vector<int64_t>& bias_at, const OptionalTensorList& masks,
                             const OptionalTensorList& indices, const std::vector<double>& scales,
                             const std::vector<int64_t>& causal, const std::vector<int64_t>& windows, const Tensor& out,
                             const Tensor& lse, const std::vector<bool>& bias_grads) {
  const Call call = describe(query, keys, values, biases, bias_at, masks, indices, scales, causal, windows);
  AttentionBackward args{};
  args.shape = call.shape;
  args.query = view_of(query, "query");
  args.sources = call.sources.data();
  args.source_count = (int)call.sources.size();
  args.out = output_like(out, call, call.shape.value_dim, "out");
  args.grad_out = output_like(grad_out, call, call.shape.value_dim, "grad_out");
  args.lse = statistics(lse, call, "lse");
  args.grad_lse = grad_lse.has_value() ? statistics(*grad_lse, call, "grad_lse") : nullptr;
  return run_backward(call, args, query, keys, values, biases, bias_at, bias_grads);
}

std::tuple<Tensor, Tensor> attention_jvp(const Tensor& query, const TensorList& keys, const TensorList& values,
                                         const TensorList& biases, const std::vector<int64_t>& bias_at,
                                         const OptionalTensorList& masks, const OptionalTensorList& indices,
                                         const std::vector<double>& scales, const std::vector<int64_t>& causal,
                                         const std::vector<int64_t>& windows, const Tensor& out, const Tensor& lse,
                                         const Tensor& query_t, const TensorList& keys_t, const TensorList& values_t,
                                         const OptionalTensorList& biases_t) {
  const Call call = describe(query, keys, values, biases, bias_at, masks, indices, scales, causal, windows);
  const AttentionShape& s = call.shape;
  const std::vector<SourceTangent> tangents = tangents_of(call, keys_t, values_t, biases_t);
  Tensor out_t = new_output(query, s.value_dim);
  Tensor lse_t = new_empty(query, {s.batch, s.heads, s.queries}, statistics_type(s.dtype));
  AttentionTangent args{s,
                        view_of(query, "query"),
                        output_like(query_t, call, s.key_dim, "query_t"),
                        call.sources.data(),
                        tangents.data(),
                        (int)call.sources.size(),
                        output_like(out, call, s.value_dim, "out"),
                        statistics(lse, call, "lse"),
                        mutable_view_of(out_t),
                        lse_t.mutable_data_ptr()};
  attention_kernels().tangent(args, torch_parallel());
  return {out_t, lse_t};
}

Gradients attention_jvp_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                                 const TensorList& keys, const TensorList& values, const TensorList& biases,
                                 const std::vector<int64_t>& bias_at, const OptionalTensorList& masks,
                                 const OptionalTensorList& indices, const std::vector<double>& scales,
                                 const std::vector<int64_t>& causal, const std::vector<int64_t>& windows,
                                 const Tensor& out, const Tensor& lse, const Tensor& query_t, const TensorList& keys_t,
                                 const TensorList& values_t, const OptionalTensorList& biases_t, const Tensor& out_t,
                                 const Tensor& lse_t, const std::vector<bool>& bias_grads) {
  const Call call = describe(query, keys, values, biases, bias_at, masks, indices, scales, causal, windows);
  const std::vector<SourceTangent> tangents = tangents_of(call, keys_t, values_t, biases_t);
  AttentionBackward args{};
  args.shape = call.shape;
  args.query = view_of(query, "query");
  args.sources = call.sources.data();
  args.source_count = (int)call.sources.size();
  args.out = output_like(out, call, call.shape.value_dim, "out");
  args.grad_out = output_like(grad_out, call, call.shape.value_dim, "grad_out");
  args.lse = statistics(lse, call, "lse");
  args.grad_lse = grad_lse.has_value() ? statistics(*grad_lse, call, "grad_lse") : nullptr;
  args.query_tangent = output_like(query_t, call, call.shape.key_dim, "query_t");
  args.tangents = tangents.data();
  args.out_tangent = output_like(out_t, call, call.shape.value_dim, "out_t");
  args.lse_tangent = statistics(lse_t, call, "lse_t");
  return run_backward(call, args, query, keys, values, biases, bias_at, bias_grads);
}

}  // namespace
}  // namespace transfuse

#define TRANSFUSE_CORE_ARGS                                                                                   \
  "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] biases, int[] bias_at, Tensor?[] masks, Tensor?[] " \
  "indices, float[] scales, int[] causal, int[] windows"
#define TRANSFUSE_TANGENT_ARGS "Tensor query_t, Tensor[] keys_t, Tensor[] values_t, Tensor?[] biases_t"

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("attention_forward(" TRANSFUSE_CORE_ARGS ") -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor grad_out, Tensor? grad_lse, " TRANSFUSE_CORE_ARGS
        ", Tensor out, Tensor lse, bool[] bias_grads) -> (Tensor, Tensor[], Tensor[], Tensor[])");
  m.def("attention_jvp(" TRANSFUSE_CORE_ARGS ", Tensor out, Tensor lse, " TRANSFUSE_TANGENT_ARGS
        ") -> (Tensor, Tensor)");
  m.def("attention_jvp_backward(Tensor grad_out, Tensor? grad_lse, " TRANSFUSE_CORE_ARGS
        ", Tensor out, Tensor lse, " TRANSFUSE_TANGENT_ARGS
        ", Tensor out_t, Tensor lse_t, bool[] bias_grads) -> (Tensor, Tensor[], Tensor[], Tensor[])");
  m.def(
      "attention_fused(Tensor query, Tensor? query_other, float query_weight, Tensor? query_weights, Tensor? "
      "query_index, Tensor[] keys, Tensor[] values, Tensor?[] key_others, float[] key_weight, Tensor?[] key_weights, "
      "Tensor?[] key_indices, Tensor[] biases, int[] bias_at, Tensor?[] masks, Tensor?[] indices, float[] scales, "
      "int[] causal, "
      "int[] groups, float[] gate, Tensor?[] gates) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&transfuse::attention_forward<transfuse::RunOnCpu>));
  m.impl("attention_backward", TORCH_BOX(&transfuse::attention_backward));
  m.impl("attention_jvp", TORCH_BOX(&transfuse::attention_jvp));
  m.impl("attention_jvp_backward", TORCH_BOX(&transfuse::attention_jvp_backward));
  m.impl("attention_fused", TORCH_BOX(&transfuse::attention_fused<transfuse::RunOnCpu>));
}
