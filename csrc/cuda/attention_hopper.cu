// Attention over several sources on compute capability 9.0 (see attention.h): copies of tiles, warpgroup matrix
// products, and warpgroups with work of their own, as in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).
//
// A block owns 128 queries of one head: one warpgroup starts the copies of key and value tiles into a ring of stages,
// two others of 64 queries each compute. A computing warpgroup starts the logits of a tile, then the weighted values of
// the tile before, and takes the softmax of the first while the second still runs; the two take turns in starting
// products, so that one's softmax runs beside the other's products. Logits and weights live in registers only.
//
// Floor: 4 B H N M D operations on tensor cores and B H N M exponentials (16 a clock and SM, so that for D = 64 they
// take as long as the products); head dims of 40 and 80 are multiplied as 48 + 40 and 80 + 80, not as 64 and 128.
//
// Sums and logits are float32, weights are rounded to the storage type for their product with the values. Every sum has
// one order: the same bits on every run. A bias or mask is read from global memory, element by element, by the thread
// that holds the logit; tiles that a mask hides are not skipped (those that the causal rule hides are).
#include <algorithm>
#include <cfloat>
#include <vector>

#include "attention_hopper_worker.h"
#include "tensor_map.h"

namespace transfuse {
namespace {

using namespace tiled;

// ---- the copying warpgroup: one thread of it -----------------------------------------------------------------------

template <class P>
__device__ inline void copy_panels(unsigned char* to, int panel, const CUtensorMap* map, Barrier* full, int token,
                                   int head, int batch) {
#pragma unroll
  for (int p = 0; p < P::kPanels; ++p) copy_tile(to + p * panel, map, full, p * kPanelChannels, token, head, batch);
}

template <class P>
__device__ inline void copy_all(const TileWork& w, unsigned char* query, unsigned char* keys, unsigned char* values,
                                Barriers<P::kStages>* barriers) {
  Place<P::kStages> at;
  uint32_t query_parity = 1;
  for (int block = (int)blockIdx.x; block < w.blocks; block += (int)gridDim.x, query_parity ^= 1) {
    const Unit unit(w, block);
    barrier_wait(&barriers->query.empty, query_parity);
    barrier_expect(&barriers->query.full, P::kQueryBytes);
    copy_panels<P>(query, P::kQueryPanel, &w.query, &barriers->query.full, unit.row, unit.head * w.query_head,
                   (int)unit.batch * w.query_batch);
    for (Tiles<P::kKeys> tiles(w, unit.row); tiles.valid(); tiles.next(), at.next()) {
      const TileSource& s = w.source[tiles.source];
      const int batch = s.index != nullptr ? (int)s.index[unit.batch] : s.shared ? 0 : (int)unit.batch;
      const int head = unit.head / s.repeat;
      Ring *key = &barriers->key[at.stage], *value = &barriers->value[at.stage];
      barrier_wait(&key->empty, at.parity ^ 1);
      barrier_expect(&key->full, P::kKeyBytes);
      copy_panels<P>(keys + at.stage * P::kKeyBytes, P::kKeyPanel, &w.key[tiles.source], &key->full, tiles.start(),
                     head * s.key_head, batch * s.key_batch);
      barrier_wait(&value->empty, at.parity ^ 1);
      barrier_expect(&value->full, P::kKeyBytes);
      copy_panels<P>(values + at.stage * P::kKeyBytes, P::kKeyPanel, &w.value[tiles.source], &value->full,
                     tiles.start(), head * s.value_head, batch * s.value_batch);
    }
  }
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

template <class P>
__global__ void __launch_bounds__(kThreads, 1) attention_kernel(const __grid_constant__ TileWork w) {
  __shared__ Barriers<P::kStages> barriers;
  // Panels are aligned to their swizzle, for which there is room.
  unsigned char* const all = dynamic_shared();
  unsigned char* const query = all + (kSwizzleBytes - shared_address(all) % kSwizzleBytes) % kSwizzleBytes;
  unsigned char *const keys = query + P::kQueryBytes, *const values = keys + P::kStages * P::kKeyBytes;
  if (threadIdx.x == 0) {
    const auto init = [](Ring* ring) {
      barrier_init(&ring->full, 1);
      barrier_init(&ring->empty, kWorkers * (kWarpgroup / kWarp));
    };
    init(&barriers.query);
    for (int s = 0; s < P::kStages; ++s) {
      init(&barriers.key[s]);
      init(&barriers.value[s]);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const int group = (int)threadIdx.x / kWarpgroup;
  if (group == 0) {
    give_registers<kCopierRegisters>();
    if (threadIdx.x == 0) copy_all<P>(w, query, keys, values, &barriers);
    return;
  }
  take_registers<kWorkerRegisters>();
  Worker<P> worker(w, query, keys, values, &barriers, group - 1);
  if (worker.number == kWorkers - 1) worker.pass_turn();  // the first is the first to have it
  uint32_t query_parity = 0;
  for (int block = (int)blockIdx.x; block < w.blocks; block += (int)gridDim.x, query_parity ^= 1)
    worker.compute(Unit(w, block), query_parity);
  if (worker.number == 0) worker.wait_for_turn();
}

// ---- the launch ----------------------------------------------------------------------------------------------------

template <class P>
cudaError_t start(const TileWork& w, cudaStream_t stream) {
  return launch_shared(attention_kernel<P>, w.blocks, kThreads, P::kBytes + kSwizzleBytes, stream, w);
}

template <class T, bool kGrouped>
cudaError_t start_by_width(const TileWork& w, int64_t width, cudaStream_t stream) {
  if (width <= 40) return start<Plan<T, 3, 40, kGrouped>>(w, stream);
  if (width <= 64) return start<Plan<T, 4, 64, kGrouped>>(w, stream);
  if (width <= 80) return start<Plan<T, 5, 80, kGrouped>>(w, stream);
  return start<Plan<T, 8, 128, kGrouped>>(w, stream);
}

// The sources that count, groups one after the other.
std::vector<const SourceView*> live_sources(const AttentionForward& a) {
  std::vector<const SourceView*> live;
  for (int g = 0; g < a.group_count; ++g) {
    // A gate of 0 takes the group's work away, unless its log-sum-exp is wanted.
    if (a.lse == nullptr && !a.gates[g].view.present() && a.gates[g].value == 0.0) continue;
    for (int s = 0; s < a.source_count; ++s)
      if (a.sources[s].group == g && a.sources[s].length > 0) live.push_back(&a.sources[s]);
  }
  return live;
}

const char* refusal(const AttentionForward& a, size_t live) {
  const AttentionShape& s = a.shape;
  if (s.dtype != DType::bf16 && s.dtype != DType::f16) return "it takes bfloat16 and float16";
  if (s.windows.present() || a.query_blend.other.present()) return "it has neither windows nor blends";
  if (s.key_dim % 8 != 0 || s.value_dim % 8 != 0 || s.key_dim > 128 || s.value_dim > 128)
    return "head dims must be multiples of 8 up to 128";
  if (live > (size_t)kMaxTiledSources) return "it takes at most 8 sources";
  const auto of_either = [&](const View& v) { return !v.present() || v.dtype == DType::f32 || v.dtype == s.dtype; };
  for (int g = 0; g < a.group_count; ++g)
    if (!of_either(a.gates[g].view)) return "gates must be float32 or of the query's dtype";
  const View out{a.out.ptr, a.out.dtype, {a.out.stride[0], a.out.stride[1], a.out.stride[2], a.out.stride[3]}};
  if (!tiles_can_be_copied(out, s.batch, s.heads, s.queries, s.value_dim))
    return "tiles of the output cannot be written";
  if (!tiles_can_be_copied(a.query, s.batch, s.heads, s.queries, s.key_dim))
    return "tiles of the query cannot be copied";
  int64_t largest = s.queries > s.batch ? s.queries : s.batch;
  for (int i = 0; i < a.source_count; ++i) {
    const SourceView& v = a.sources[i];
    if (v.key_blend.other.present()) return "it has no blends";
    if (v.length > 0 && !(tiles_can_be_copied(v.key, v.batch, s.kv_heads, v.length, s.key_dim) &&
                          tiles_can_be_copied(v.value, v.batch, s.kv_heads, v.length, s.value_dim)))
      return "tiles of keys or values cannot be copied";
    if (!of_either(v.bias)) return "biases must be float32 or of the query's dtype";
    largest = std::max({largest, v.length, v.batch});
  }
  return largest >= kNoLimit / 2 ? "an axis is too long" : nullptr;
}

const char* describe_source(const AttentionForward& a, const SourceView& v, bool ends, int keys, TileWork* w) {
  const AttentionShape& s = a.shape;
  TileSource& t = w->source[w->sources];
  TileMap key, value;
  const char* error = make_tile_map(v.key, s.key_dim, v.length, s.kv_heads, v.batch, keys, &key);
  if (error == nullptr) error = make_tile_map(v.value, s.value_dim, v.length, s.kv_heads, v.batch, keys, &value);
  if (error != nullptr) return error;
  w->key[w->sources] = key.map;
  w->value[w->sources] = value.map;
  t.index = v.index;
  t.bias = v.bias;
  t.mask = v.mask;
  t.gate = a.gates[v.group];
  // A factor of 0 would make NaN of what is hidden; this one makes less than 1e-6 of any finite logit.
  t.scale = (float)v.scale * kLog2e;
  if (t.scale == 0.0f) t.scale = FLT_TRUE_MIN;
  t.length = (int)v.length;
  t.repeat = (int)(s.heads / s.kv_heads);
  t.causal_offset = v.causal == Causal::none         ? kNoLimit
                    : v.causal == Causal::upper_left ? 0
                                                     : (int)(v.length - s.queries);
  t.key_head = key.head_step;
  t.key_batch = key.batch_step;
  t.value_head = value.head_step;
  t.value_batch = value.batch_step;
  t.shared = v.batch == 1;
  t.ends = ends;
  ++w->sources;
  return nullptr;
}

}  // namespace

const char* attention_forward_cuda(const AttentionForward& a, void* stream) {
  const AttentionShape& s = a.shape;
  const std::vector<const SourceView*> live = live_sources(a);
  if (s.batch == 0 || s.heads == 0 || s.queries == 0 || s.value_dim == 0) return nullptr;
  const char* error = refusal(a, live.size());
  if (error != nullptr) return error;
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) return message_of(status);
  if (major != 9 || minor != 0) return "it is made for compute capability 9.0";

  const int64_t blocks = (s.queries + kRows - 1) / kRows * s.heads * s.batch;
  if (blocks >= kNoLimit) return "there are too many queries";
  int groups = 0;
  for (size_t i = 0; i < live.size(); ++i) groups += i == 0 || live[i]->group != live[i - 1]->group;
  const bool grouped = groups > 1;
  TileWork w = {};
  TileMap query;
  error = make_tile_map(a.query, s.key_dim, s.queries, s.heads, s.batch, kRows, &query);
  for (size_t i = 0; error == nullptr && i < live.size(); ++i) {
    const bool ends = i + 1 == live.size() || live[i + 1]->group != live[i]->group;
    error = describe_source(a, *live[i], ends, grouped ? kGroupedKeys : kPlainKeys, &w);
  }
  if (error != nullptr) return error;
  w.query = query.map;
  w.query_head = query.head_step;
  w.query_batch = query.batch_step;
  w.out = a.out;
  w.lse = static_cast<float*>(a.lse);
  w.heads = (int)s.heads;
  w.queries = (int)s.queries;
  w.value_dim = (int)s.value_dim;
  w.blocks = (int)blocks;
  const int64_t width = std::max(s.key_dim, s.value_dim);
  const auto by_type = [&](auto number) {
    using T = decltype(number);
    const auto on = static_cast<cudaStream_t>(stream);
    return grouped ? start_by_width<T, true>(w, width, on) : start_by_width<T, false>(w, width, on);
  };
  return message_of(s.dtype == DType::bf16 ? by_type(__nv_bfloat16()) : by_type(__half()));
}

}  // namespace transfuse
