// What the CPU and the CUDA registration of attention share: checks, a call as the kernels take it, and the ops of the
// forward pass over a launcher: `Run::prepared` gives a tensor (or a list) as its kernels can read it, and
// `Run::forward(args, query)` computes.
#pragma once

#include <memory>

#include "torch_glue.h"
#include "transfuse/attention.h"
#include "transfuse/windows.h"

namespace transfuse {

// "[i]". (Appended: gcc 12 warns of "[" + std::to_string(i) in some builds.)
inline std::string place(size_t i) {
  std::string text = "[";
  text += std::to_string(i);
  return text += "]";
}

struct Call {
  AttentionShape shape;
  std::vector<SourceView> sources;
  std::unique_ptr<WindowMap> map;  // what shape.windows points into
};

// windows: empty, or axes, size, window and shift per axis, wrap, pad, bias kind (see WindowGrid).
inline WindowGrid grid_of(const std::vector<int64_t>& windows) {
  WindowGrid grid;
  const int64_t axes = windows[0];
  STD_TORCH_CHECK(axes >= 1 && axes <= kMaxWindowAxes && windows.size() == (size_t)(1 + 3 * axes + 3),
                  "windows must hold the number of axes (1 to 3), size, window and shift of each, wrap, pad and bias");
  grid.axes = (int)axes;
  int64_t slots = 1;
  for (int64_t a = 0; a < axes; ++a) {
    grid.size[a] = windows[(size_t)(1 + a)];
    grid.window[a] = windows[(size_t)(1 + axes + a)];
    grid.shift[a] = windows[(size_t)(1 + 2 * axes + a)];
    STD_TORCH_CHECK(grid.size[a] >= 0 && grid.size[a] < INT32_MAX && grid.window[a] >= 1 &&
                        grid.window[a] < INT32_MAX && grid.shift[a] > -INT32_MAX && grid.shift[a] < INT32_MAX,
                    "windows: sizes must be >= 0, window sides >= 1, and all below 2^31");
    slots *= grid.window[a];
    STD_TORCH_CHECK(slots < INT32_MAX, "windows: a window must have fewer than 2^31 slots");
  }
  const int64_t wrap = windows[(size_t)(1 + 3 * axes)], pad = windows[(size_t)(2 + 3 * axes)];
  const int64_t bias = windows[(size_t)(3 + 3 * axes)];
  STD_TORCH_CHECK(wrap >= 0 && wrap <= 2 && pad >= 0 && pad <= 1 && bias >= 0 && bias <= 2,
                  "windows: wrap and bias must be in 0..2, pad 0 or 1");
  grid.wrap = static_cast<WindowGrid::Wrap>(wrap);
  grid.pad = pad != 0;
  grid.bias = static_cast<WindowGrid::Bias>(bias);
  STD_TORCH_CHECK(grid.bias != WindowGrid::Bias::full || slots * slots < INT32_MAX,
                  "windows: a full bias must have fewer than 2^31 entries per head");
  STD_TORCH_CHECK(grid.bias != WindowGrid::Bias::relative || grid.bias_codes() < INT32_MAX,
                  "windows: a relative bias must have fewer than 2^31 entries per head");
  return grid;
}

// What a bias of the source broadcasts to.
inline std::vector<int64_t> bias_shape(const AttentionShape& s, const SourceView& v) {
  if (v.windowed) return {s.batch, s.heads, 1, s.windows.codes};
  return {s.batch, s.heads, s.queries, v.length};
}

// A map from batch entries to those of another tensor. Its values are checked where the host can read them; kernels of
// other devices read zeros or another entry for what is outside, and nothing beyond the tensor.
inline const int64_t* index_of(const Tensor& query, const Tensor& index, int64_t batch, int64_t others,
                               const std::string& name) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.is_contiguous() && index.device() == query.device(),
                  name, " must be a contiguous int64 tensor on the device of query");
  check_shape(index, {batch}, name);
  const int64_t* values = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t b = 0; index.is_cpu() && b < batch; ++b)
    STD_TORCH_CHECK(values[b] >= 0 && values[b] < others, name, " holds ", values[b], ", which is outside 0..",
                    others - 1);
  return values;
}

// The bias of source i is biases[bias_at[i]]; -1 means none. (Autograd of raw ops follows Tensor[] but not Tensor?[].)
inline Call describe(const Tensor& query, const TensorList& keys, const TensorList& values, const TensorList& biases,
                     const std::vector<int64_t>& bias_at, const OptionalTensorList& masks,
                     const OptionalTensorList& indices, const std::vector<double>& scales,
                     const std::vector<int64_t>& causal, const std::vector<int64_t>& windows) {
  Call call;
  const size_t n = keys.size();
  STD_TORCH_CHECK(n > 0, "keys must hold at least one source");
  STD_TORCH_CHECK(values.size() == n && bias_at.size() == n && masks.size() == n && indices.size() == n &&
                      scales.size() == n && causal.size() == n,
                  "values, bias_at, masks, indices, scales and causal must have one entry per source");
  STD_TORCH_CHECK(query.dim() == 4, "query must have shape (batch, head, token, channel)");
  AttentionShape& s = call.shape;
  s.batch = query.size(0);
  s.heads = query.size(1);
  s.queries = query.size(2);
  s.key_dim = query.size(3);
  s.dtype = dtype_of(query, "query");
  STD_TORCH_CHECK(keys[0].dim() == 4 && values[0].dim() == 4, "keys and values must have 4 axes");
  s.kv_heads = keys[0].size(1);
  s.value_dim = values[0].size(3);
  STD_TORCH_CHECK(s.key_dim >= 1 && s.key_dim <= 256 && s.value_dim >= 1 && s.value_dim <= 256,
                  "head dims must be in 1..256, got ", s.key_dim, " and ", s.value_dim);
  STD_TORCH_CHECK(s.heads == 0 || (s.kv_heads > 0 && s.heads % s.kv_heads == 0), "query heads (", s.heads,
                  ") must be a multiple of key heads (", s.kv_heads, ")");
  if (!windows.empty()) {
    const WindowGrid grid = grid_of(windows);
    STD_TORCH_CHECK(grid.tokens() == s.queries && s.queries < INT32_MAX, "windows cover ", grid.tokens(),
                    " tokens, query has ", s.queries);
    call.map = std::make_unique<WindowMap>(grid);
    s.windows = call.map->view();
  }
  for (size_t i = 0; i < n; ++i) {
    const std::string at = place(i);
    SourceView v;
    STD_TORCH_CHECK(keys[i].dim() == 4, "keys", at, " must have 4 axes");
    v.batch = keys[i].size(0);
    v.length = keys[i].size(2);
    v.windowed = s.windows.present() && i == 0;
    const std::vector<int64_t> full = bias_shape(s, v);
    STD_TORCH_CHECK(!v.windowed || v.length == s.queries, "keys", at, " must have the ", s.queries, " tokens of query");
    check_shape(keys[i], {v.batch, s.kv_heads, v.length, s.key_dim}, "keys" + at);
    check_shape(values[i], {v.batch, s.kv_heads, v.length, s.value_dim}, "values" + at);
    STD_TORCH_CHECK(keys[i].scalar_type() == query.scalar_type() && values[i].scalar_type() == query.scalar_type(),
                    "keys", at, " and values", at, " must have the dtype of query");
    v.key = view_beside(query, keys[i], "keys");
    v.value = view_beside(query, values[i], "values");
    if (indices[i].has_value()) {
      v.index = index_of(query, *indices[i], s.batch, v.batch, "indices" + at);
    } else {
      STD_TORCH_CHECK(v.batch == 1 || v.batch == s.batch, "keys", at, " must have batch 1 or ", s.batch, ", got ",
                      v.batch);
    }
    if (bias_at[i] >= 0) {
      STD_TORCH_CHECK(bias_at[i] < (int64_t)biases.size(), "bias_at", at, " must be below ", biases.size());
      STD_TORCH_CHECK(!v.windowed || biases[(size_t)bias_at[i]].size(-1) == s.windows.codes, "biases", at,
                      " must have one entry per code (", s.windows.codes, ")");
      v.bias = broadcast_view(query, biases[(size_t)bias_at[i]], full, "biases" + at);
    }
    if (masks[i].has_value()) {
      STD_TORCH_CHECK(!v.windowed, "masks", at, " must be None for a windowed source");
      STD_TORCH_CHECK(masks[i]->scalar_type() == ScalarType::Bool, "masks", at, " must be bool");
      v.mask = broadcast_view(query, *masks[i], full, "masks" + at);
    }
    STD_TORCH_CHECK(causal[i] >= 0 && causal[i] <= 2, "causal", at, " must be 0, 1 or 2");
    STD_TORCH_CHECK(causal[i] == 0 || !s.windows.present(), "causal", at, " must be 0 beside windows");
    v.scale = scales[i];
    v.causal = static_cast<Causal>(causal[i]);
    call.sources.push_back(v);
  }
  return call;
}

// (batch, head, token, channel), stored token-major when the query is, so that merging the heads costs no copy.
inline Tensor new_output(const Tensor& query, int64_t width) {
  const int64_t b = query.size(0), h = query.size(1), n = query.size(2);
  if (query.stride(1) < query.stride(2)) {
    return torch::stable::transpose(new_empty(query, {b, n, h, width}, query.scalar_type()), 1, 2);
  }
  return new_empty(query, {b, h, n, width}, query.scalar_type());
}

inline Weight weight_of(const Tensor& query, double value, const OptionalTensor& tensor,
                        const std::vector<int64_t>& shape, const std::string& name) {
  Weight w;
  w.value = value;
  if (tensor.has_value()) {
    w.view = broadcast_view(query, *tensor, shape, name);
  }
  return w;
}

inline BlendView blend_of(const Tensor& query, const OptionalTensor& other, double weight,
                          const OptionalTensor& weights, const OptionalTensor& index, const std::vector<int64_t>& shape,
                          const std::string& name) {
  BlendView v;
  if (!other.has_value()) return v;
  STD_TORCH_CHECK(other->dim() == 4, name, " must have 4 axes");
  v.batch = other->size(0);
  check_shape(*other, {v.batch, shape[1], shape[2], shape[3]}, name);
  v.other = view_beside(query, *other, "blend");
  v.weight = weight_of(query, weight, weights, {shape[0], shape[1], shape[2]}, name + " weight");
  if (index.has_value()) {
    v.index = index_of(query, *index, shape[0], v.batch, name + " index");
  } else {
    STD_TORCH_CHECK(v.batch == 1 || v.batch == shape[0], name, " must have batch 1 or ", shape[0], ", got ", v.batch);
  }
  return v;
}

template <class Run>
std::tuple<Tensor, Tensor> attention_forward(const Tensor& given, const TensorList& given_keys,
                                             const TensorList& given_values, const TensorList& biases,
                                             const std::vector<int64_t>& bias_at, const OptionalTensorList& masks,
                                             const OptionalTensorList& indices, const std::vector<double>& scales,
                                             const std::vector<int64_t>& causal, const std::vector<int64_t>& windows) {
  decltype(auto) query = Run::prepared(given);
  decltype(auto) keys = Run::prepared(given_keys);
  decltype(auto) values = Run::prepared(given_values);
  const Call call = describe(query, keys, values, biases, bias_at, masks, indices, scales, causal, windows);
  const AttentionShape& s = call.shape;
  Tensor out = new_output(given, s.value_dim);
  Tensor lse = new_empty(query, {s.batch, s.heads, s.queries}, statistics_type(s.dtype));
  const Weight gate;
  AttentionForward args{s,
                        strided_view(query, "query"),
                        {},
                        call.sources.data(),
                        (int)call.sources.size(),
                        1,
                        &gate,
                        mutable_view_of(out),
                        lse.mutable_data_ptr()};
  Run::forward(args, query);
  return {out, lse};
}

template <class Run>
std::tuple<Tensor, Tensor> attention_fused(const Tensor& given, const OptionalTensor& query_other, double query_weight,
                                           const OptionalTensor& query_weights, const OptionalTensor& query_index,
                                           const TensorList& given_keys, const TensorList& given_values,
                                           const OptionalTensorList& key_others, const std::vector<double>& key_weight,
                                           const OptionalTensorList& key_weights, const OptionalTensorList& key_indices,
                                           const TensorList& biases, const std::vector<int64_t>& bias_at,
                                           const OptionalTensorList& masks, const OptionalTensorList& indices,
                                           const std::vector<double>& scales, const std::vector<int64_t>& causal,
                                           const std::vector<int64_t>& groups, const std::vector<double>& gate,
                                           const OptionalTensorList& gates) {
  decltype(auto) query = Run::prepared(given);
  decltype(auto) keys = Run::prepared(given_keys);
  decltype(auto) values = Run::prepared(given_values);
  Call call = describe(query, keys, values, biases, bias_at, masks, indices, scales, causal, {});
  const AttentionShape& s = call.shape;
  const size_t n = keys.size();
  STD_TORCH_CHECK(key_others.size() == n && key_weight.size() == n && key_weights.size() == n &&
                      key_indices.size() == n && groups.size() == n && gate.size() == gates.size() && !gate.empty(),
                  "key blends and groups must have one entry per source, gates one per group");
  const int64_t group_count = (int64_t)gate.size();
  for (size_t i = 0; i < n; ++i) {
    SourceView& v = call.sources[i];
    STD_TORCH_CHECK(groups[i] >= 0 && groups[i] < group_count, "groups[", i, "] must be in 0..", group_count - 1);
    v.group = (int)groups[i];
    v.key_blend = blend_of(query, key_others[i], key_weight[i], key_weights[i], key_indices[i],
                           {v.batch, s.kv_heads, v.length, s.key_dim}, "key_others" + place(i));
  }
  std::vector<Weight> weights;
  for (size_t g = 0; g < gate.size(); ++g)
    weights.push_back(weight_of(query, gate[g], gates[g], {s.batch, s.heads, s.queries}, "gates" + place(g)));
  Tensor out = new_output(given, s.value_dim);
  const bool single = group_count == 1;
  Tensor lse = new_empty(query, single ? std::vector<int64_t>{s.batch, s.heads, s.queries} : std::vector<int64_t>{0},
                         statistics_type(s.dtype));
  AttentionForward args{s,
                        strided_view(query, "query"),
                        blend_of(query, query_other, query_weight, query_weights, query_index,
                                 {s.batch, s.heads, s.queries, s.key_dim}, "query_other"),
                        call.sources.data(),
                        (int)n,
                        (int)group_count,
                        weights.data(),
                        mutable_view_of(out),
                        single ? lse.mutable_data_ptr() : nullptr};
  Run::forward(args, query);
  return {out, lse};
}

}  // namespace transfuse
