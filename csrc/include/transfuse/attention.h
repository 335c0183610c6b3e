// Fused attention over several key/value sources: argument blocks of the four kernels and the table that selects them.
//
// One softmax group:  L_s = scale_s * q k_s^T + bias_s,  P = softmax over the union of the sources,  out = P V,
// lse = logsumexp L.  A row with nothing to attend to gives out = 0 and lse = -inf.
//
// With windows, the tokens are split into sets, and a windowed source's keys are seen by the queries of their own set
// only. Kernels walk POSITIONS: a permutation of the tokens in which every window is a contiguous run. Without windows
// a position is its token.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

enum class Causal : int { none = 0, upper_left = 1, lower_right = 2 };

// (1 - w) * x + w * other[index]; w = 0 and w = 1 return the source bit for bit.
struct BlendView {
  View other;  // (batch, head, token, channel); absent = no blend
  Weight weight;
  const int64_t* index = nullptr;  // batch of x -> batch of other; nullptr = same batch
  int64_t batch = 0;               // batches of other: 1 broadcasts
};

// Windows over the query's tokens. All tables are in order of positions.
struct Windows {
  const int32_t* tokens = nullptr;   // position -> token; nullptr = no windows
  const int64_t* offsets = nullptr;  // window w is positions [offsets[w], offsets[w + 1])
  int64_t count = 0;
  // The bias of query position i and key position j is element query_code[i] + key_code[j] of the bias's last axis.
  const int32_t* query_code = nullptr;
  const int32_t* key_code = nullptr;
  int64_t codes = 0;  // size of that axis
  bool present() const { return offsets != nullptr; }
};

struct SourceView {
  View key, value;    // (batch, kv head, token, channel)
  int64_t batch = 0;  // 1 broadcasts when index is absent
  int64_t length = 0;
  const int64_t* index = nullptr;  // query batch -> source batch
  View bias, mask;  // (batch, head, query, key) of the QUERY's batch and heads; mask is bytes, non-zero = attend
  double scale = 1.0;
  Causal causal = Causal::none;
  int group = 0;
  BlendView key_blend;    // indexed by the SOURCE's batch
  bool windowed = false;  // keys are the query's tokens, seen within their window; bias is (batch, head, 1, code)
};

struct AttentionShape {
  int64_t batch, heads, kv_heads, queries, key_dim, value_dim;
  DType dtype;  // storage of query, keys, values and of all outputs
  Windows windows;
};

struct AttentionForward {
  AttentionShape shape;
  View query;
  BlendView query_blend;
  const SourceView* sources;
  int source_count;
  int group_count;
  const Weight* gates;  // one per group
  MutableView out;      // (batch, head, token, channel)
  void* lse;            // contiguous (batch, head, token), float (double for f64); nullptr = not wanted
};

// Tangents mirror a source's key, value and bias.
struct SourceTangent {
  View key, value, bias;
};
struct SourceGradient {
  MutableView key, value;  // (source batch, kv head, token, channel), every element is written
  MutableView bias;        // ptr nullptr = not wanted; stride 0 on reduced axes; float or double, zero-filled
};

// Backward of the forward (tangents == nullptr), or of the Jacobian-vector product (tangents given).
struct AttentionBackward {
  AttentionShape shape;
  View query;
  const SourceView* sources;
  int source_count;
  View out, grad_out;
  const void* lse;       // contiguous (batch, head, token)
  const void* grad_lse;  // contiguous, or nullptr
  View query_tangent;
  const SourceTangent* tangents;
  View out_tangent;
  const void* lse_tangent;
  MutableView grad_query;
  const SourceGradient* gradients;
};

struct AttentionTangent {
  AttentionShape shape;
  View query, query_tangent;
  const SourceView* sources;
  const SourceTangent* tangents;
  int source_count;
  View out;
  const void* lse;
  MutableView out_tangent;
  void* lse_tangent;
};

struct AttentionKernels {
  void (*forward)(const AttentionForward&, const Parallel&);
  void (*backward)(const AttentionBackward&, const Parallel&);
  void (*tangent)(const AttentionTangent&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const AttentionKernels& attention_kernels();

// The forward kernel for compute capability 9.0 on the current device, on `stream` (a cudaStream_t); nullptr, or why it
// was not started. Half precisions; head dims that are multiples of 8 up to 128; query, keys and values that lie as
// tiles_can_be_copied wants, and so the output; neither blends nor windows. Pointers are the device's, those of indices
// as well.
constexpr int kMaxTiledSources = 8;
const char* attention_forward_cuda(const AttentionForward&, void* stream);

// Whether tiles of a (batch, head, token, channel) tensor can be copied by hardware: channels side by side, every row
// in whole 16-byte pieces of its own.
inline bool tiles_can_be_copied(const View& v, int64_t batch, int64_t heads, int64_t tokens, int64_t channels) {
  const int64_t piece = 16 / item_size(v.dtype);
  const auto whole = [&](int64_t stride) { return stride >= 0 && stride % piece == 0; };
  return reinterpret_cast<uintptr_t>(v.ptr) % 16 == 0 && v.stride[3] == 1 && (batch < 2 || whole(v.stride[0])) &&
         (heads < 2 || whole(v.stride[1])) && (tokens < 2 || (whole(v.stride[2]) && v.stride[2] >= channels));
}

}  // namespace transfuse
