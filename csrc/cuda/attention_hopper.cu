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

#include "tensor_map.h"
#include "transfuse/attention.h"

namespace transfuse {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kWorkers = 2;                 // computing warpgroups of a block
constexpr int kOwnRows = 64;                // queries of one
constexpr int kRows = kOwnRows * kWorkers;  // queries of a block
constexpr int kThreads = kWarpgroup * (kWorkers + 1);
constexpr int kPanelChannels = kPanelBytes / 2;
constexpr int kDeep = 16;  // of a product
// Keys of a tile. The sum over groups takes as many registers as the accumulator: half the keys make room for it.
constexpr int kPlainKeys = 128, kGroupedKeys = 64;
// Registers of a thread: 65536 a multiprocessor, 168 each at the start.
constexpr int kCopierRegisters = 24, kWorkerRegisters = 240;
constexpr int kNoLimit = 0x3fffffff;
// Named barriers: turns of the two workers, and a worker's own threads.
constexpr int kTurn = 1, kOwn = 1 + kWorkers;

// ---- what a launch is told -----------------------------------------------------------------------------------------

struct TileSource {
  const int64_t* index;                              // query batch -> source batch
  View bias, mask;                                   // of the query's batch and heads
  Weight gate;                                       // of its group
  float scale;                                       // to units of log 2
  int length, repeat;                                // keys; query heads of a key head
  int causal_offset;                                 // query i sees keys j <= i + offset; kNoLimit: all
  int key_head, key_batch, value_head, value_batch;  // steps of a map's coordinates
  bool shared, ends;                                 // one batch for all; the last of its group
};

struct TileWork {
  CUtensorMap query, key[kMaxTiledSources], value[kMaxTiledSources];
  TileSource source[kMaxTiledSources];
  MutableView out;
  float* lse;
  int blocks, sources, heads, queries, value_dim, query_head, query_batch;
};
static_assert(sizeof(TileWork) <= 4096, "arguments of a kernel are at most 4 KiB");

// Sizes by head dim: kSteps x 16 channels of queries and keys are multiplied, kWidth of the values.
template <class Storage, int kSteps_, int kWidth_, bool kGrouped_>
struct Plan {
  using T = Storage;
  static constexpr int kSteps = kSteps_, kWidth = kWidth_;
  static constexpr bool kGrouped = kGrouped_;
  static constexpr int kKeys = kGrouped ? kGroupedKeys : kPlainKeys;
  static constexpr int kPanels = (kSteps * kDeep + kPanelChannels - 1) / kPanelChannels;
  static_assert(kPanels == (kWidth + kPanelChannels - 1) / kPanelChannels, "queries' memory serves for the output");
  static constexpr int kStages = kKeys * kPanels > 128 ? 2 : 4;
  static constexpr int kQueryPanel = kRows * kPanelBytes, kKeyPanel = kKeys * kPanelBytes;
  static constexpr int kQueryBytes = kPanels * kQueryPanel, kKeyBytes = kPanels * kKeyPanel;
  static constexpr int kBytes = kQueryBytes + 2 * kStages * kKeyBytes;
};

struct Ring {
  Barrier full, empty;
};
template <int kStages>
struct Barriers {
  Ring query, key[kStages], value[kStages];
};

// ---- tiles of a block, in order: what the copier and the workers walk ----------------------------------------------

template <int kKeys>
struct Tiles {
  const TileWork& work;
  int first_row, source = -1, tile = 0, count = 0;

  __device__ Tiles(const TileWork& w, int row) : work(w), first_row(row) { next_source(); }
  __device__ bool valid() const { return source < work.sources; }
  __device__ int start() const { return tile * kKeys; }
  // Moves on; whether the tile left was the last of its group.
  __device__ bool next() {
    if (++tile < count) return false;
    return next_source();
  }
  // Goes to the next source with a tile for these rows; whether a group ended on the way.
  __device__ bool next_source() {
    bool ended = false;
    do {
      if (source >= 0) ended = ended || work.source[source].ends;
      if (++source == work.sources) return ended;
      const TileSource& s = work.source[source];
      const int last = (first_row + kRows < work.queries ? first_row + kRows : work.queries) - 1;
      int seen = s.length;
      if (s.causal_offset != kNoLimit) seen = min(seen, max(0, last + s.causal_offset + 1));
      count = (seen + kKeys - 1) / kKeys;
      tile = 0;
    } while (count == 0);
    return ended;
  }
};

// Where one is in a ring: stage, and the parity of its phase.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Unit {  // of work: a block of queries of one head
  int64_t batch;
  int head, row;
  __device__ Unit(const TileWork& w, int block) {
    const int rows = (w.queries + kRows - 1) / kRows, line = block / rows;
    row = (block - line * rows) * kRows;
    head = line % w.heads;
    batch = line / w.heads;
  }
};

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

// ---- a computing warpgroup -----------------------------------------------------------------------------------------

// A gate, of the storage type or float32.
template <class T>
__device__ inline float gate_of(const Weight& w, int64_t batch, int head, int row) {
  if (w.view.ptr == nullptr) return (float)w.value;
  const int64_t at = batch * w.view.stride[0] + head * w.view.stride[1] + row * w.view.stride[2];
  return w.view.dtype == DType::f32 ? static_cast<const float*>(w.view.ptr)[at]
                                    : widen(static_cast<const T*>(w.view.ptr)[at]);
}

// Over the four threads that hold a row of a product's result.
template <class F>
__device__ inline float over_row(float x, const F& f) {
  x = f(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return f(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Of a result's registers, 4 i + c: row 0 or 8 of the thread by c / 2, column 8 i + c % 2.
__device__ constexpr int row_of(int i) { return i % 4 / 2; }
__device__ constexpr int column_of(int i) { return i / 4 * 8 + i % 2; }

template <class P>
struct Worker {
  using T = typename P::T;
  static constexpr int kLogits = P::kKeys / 2, kResults = P::kWidth / 2, kProducts = P::kKeys / kDeep;

  const TileWork& work;
  unsigned char *query, *keys, *values;
  Barriers<P::kStages>* barriers;
  int number, row0, column0;  // of the worker; row in its 64 and first column of this thread
  bool first_lane;
  Place<P::kStages> at, before;  // the tile whose logits are computed, and that whose values are added

  float logits[kLogits], sum[kResults];
  uint32_t weights[kProducts][4];
  float top[2], norm[2];  // of both rows: largest logit in units of log 2, sum of weights (of this thread's columns)

  __device__ Worker(const TileWork& w, unsigned char* q, unsigned char* k, unsigned char* v, Barriers<P::kStages>* b,
                    int n)
      : work(w), query(q), keys(k), values(v), barriers(b), number(n) {
    const int thread = (int)threadIdx.x % kWarpgroup, lane = thread % kWarp;
    row0 = thread / kWarp * 16 + lane / 4;
    column0 = lane % 4 * 2;
    first_lane = lane == 0;
  }

  __device__ void begin_group() {
#pragma unroll
    for (int i = 0; i < kResults; ++i) sum[i] = 0.0f;
    top[0] = top[1] = -INFINITY;
    norm[0] = norm[1] = 0.0f;
  }

  __device__ void start_logits() {
    const uint32_t q = shared_address(query) + (uint32_t)(number * kOwnRows * kPanelBytes);
    const uint32_t k = shared_address(keys) + (uint32_t)(at.stage * P::kKeyBytes);
#pragma unroll
    for (int s = 0; s < P::kSteps; ++s) {
      const int panel = s * kDeep / kPanelChannels, inside = s * kDeep % kPanelChannels * 2;
      ProductOfShared<T, P::kKeys>::start(logits, panel_descriptor(q + panel * P::kQueryPanel + inside, kPackBytes),
                                          panel_descriptor(k + panel * P::kKeyPanel + inside, kPackBytes), s != 0);
    }
    product_commit();
  }
  __device__ void start_values() {
    const uint32_t v = shared_address(values) + (uint32_t)(before.stage * P::kKeyBytes);
#pragma unroll
    for (int k = 0; k < kProducts; ++k)
      ProductOfRegisters<T, P::kWidth>::start(sum, weights[k],
                                              panel_descriptor(v + k * kDeep * kPanelBytes, P::kKeyPanel));
    product_commit();
  }
  __device__ void pin_weights() {
#pragma unroll
    for (int k = 0; k < kProducts; ++k) pin(weights[k]);
  }
  // Workers start products in turn; all have the same number of tiles.
  __device__ void wait_for_turn() const { named_barrier_wait(kTurn + number, kWorkers * kWarpgroup); }
  __device__ void pass_turn() const { named_barrier_arrive(kTurn + (number + 1) % kWorkers, kWorkers * kWarpgroup); }
  // A warp has read a tile: only when all have may it be overwritten.
  __device__ void release(Barrier* empty) const {
    if (first_lane) barrier_arrive(empty);
  }

  // The logits of a tile, and beside them the weighted values of the one before, if there is one in this group.
  template <bool kFirst>
  __device__ void absorb(const Tiles<P::kKeys>& tiles, const Unit& unit) {
    barrier_wait(&barriers->key[at.stage].full, at.parity);
    if (!kFirst) barrier_wait(&barriers->value[before.stage].full, before.parity);
    wait_for_turn();
    pin(logits);
    pin(sum);
    if (!kFirst) pin_weights();
    product_fence();
    start_logits();
    if (!kFirst) start_values();
    pass_turn();
    product_wait<kFirst ? 0 : 1>();
    pin(logits);
    release(&barriers->key[at.stage].empty);

    const TileSource& s = work.source[tiles.source];
    float factor = s.scale;
    if (s.bias.ptr != nullptr || s.mask.ptr != nullptr) {
      add_pairs(s, unit, tiles.start());
      factor = 1.0f;
    }
    hide(s, unit, tiles.start(), factor < 0.0f ? INFINITY : -INFINITY);
    float decay[2], anchor[2];
    // The factor is applied after the maximum: of logits by a negative one, the smallest is the largest.
    if (factor < 0.0f)
      take_top(factor, decay, anchor, [](float x, float y) { return fminf(x, y); });
    else
      take_top(factor, decay, anchor, [](float x, float y) { return fmaxf(x, y); });
    norm[0] *= decay[0];
    norm[1] *= decay[1];
#pragma unroll
    for (int i = 0; i < kLogits; ++i) {
      logits[i] = exp2_fast(fmaf(logits[i], factor, -anchor[row_of(i)]));
      norm[row_of(i)] += logits[i];
    }
    if (!kFirst) {
      product_wait<0>();
      pin(sum);
      release(&barriers->value[before.stage].empty);
#pragma unroll
      for (int i = 0; i < kResults; ++i) sum[i] *= decay[row_of(i)];
    }
#pragma unroll
    for (int k = 0; k < kProducts; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[k][i] = pack_pair(logits[k * 8 + i * 2], logits[k * 8 + i * 2 + 1], T());
    before = at;
    at.next();
  }

  __device__ void end_group() {
    barrier_wait(&barriers->value[before.stage].full, before.parity);
    pin(sum);
    pin_weights();
    product_fence();
    start_values();
    product_wait<0>();
    pin(sum);
    release(&barriers->value[before.stage].empty);
#pragma unroll
    for (int r = 0; r < 2; ++r) norm[r] = over_row(norm[r], [](float x, float y) { return x + y; });
  }

  template <class F>
  __device__ void take_top(float factor, float (&decay)[2], float (&anchor)[2], const F& larger) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = logits[2 * r];
#pragma unroll
      for (int i = 0; i < kLogits; ++i)
        if (row_of(i) == r) most = larger(most, logits[i]);
      const float now = fmaxf(top[r], over_row(most, larger) * factor);
      anchor[r] = now == -INFINITY ? 0.0f : now;  // nothing seen yet: weights of 0, not of NaN
      decay[r] = exp2_fast(top[r] - anchor[r]);
      top[r] = now;
    }
  }

  // Hides what lies behind the last key, or is later than the query.
  __device__ void hide(const TileSource& s, const Unit& unit, int start, float hidden) {
    const int row = unit.row + number * kOwnRows;
    const bool causal = s.causal_offset != kNoLimit && start + P::kKeys - 1 > row + s.causal_offset;
    if (start + P::kKeys <= s.length && !causal) return;
    int limit[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      limit[r] = s.length - start;
      if (causal) limit[r] = min(limit[r], row + row0 + 8 * r + s.causal_offset + 1 - start);
    }
#pragma unroll
    for (int i = 0; i < kLogits; ++i)
      if (column0 + column_of(i) >= limit[row_of(i)]) logits[i] = hidden;
  }

  // Logits in units of log 2, with bias and mask.
  __device__ void add_pairs(const TileSource& s, const Unit& unit, int start) {
#pragma unroll
    for (int i = 0; i < kLogits; ++i) logits[i] *= s.scale;
    if (s.bias.ptr != nullptr) {
      const auto add = [](float x, auto bias) { return fmaf(widen(bias), kLog2e, x); };
      if (s.bias.dtype == DType::f32)
        for_pairs<float>(s.bias, s, unit, start, add);
      else
        for_pairs<T>(s.bias, s, unit, start, add);
    }
    if (s.mask.ptr != nullptr)
      for_pairs<uint8_t>(s.mask, s, unit, start, [](float x, uint8_t allowed) { return allowed ? x : -INFINITY; });
  }
  // Calls f with every logit and what `v` holds for its query and key; what is outside is left alone.
  template <class M, class F>
  __device__ void for_pairs(const View& v, const TileSource& s, const Unit& unit, int start, const F& f) {
    const int row = unit.row + number * kOwnRows + row0, column = start + column0;
    const M* p = static_cast<const M*>(v.ptr) + unit.batch * v.stride[0] + unit.head * v.stride[1] + row * v.stride[2] +
                 column * v.stride[3];
    const int columns = s.length - column;
#pragma unroll
    for (int r = 0; r < 2; ++r, p += 8 * v.stride[2]) {
      if (row + 8 * r >= work.queries) continue;
      const M* q = p;
#pragma unroll
      for (int i = 2 * r; i < kLogits; i += 4, q += 8 * v.stride[3]) {
        if (column_of(i) < columns) logits[i] = f(logits[i], q[0]);
        if (column_of(i) + 1 < columns) logits[i + 1] = f(logits[i + 1], q[v.stride[3]]);
      }
    }
  }

  // Factors that make the accumulator this group's share of the output; 0 takes it away, whatever it holds.
  __device__ void share(const Weight& weight, const Unit& unit, float (&factor)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = unit.row + number * kOwnRows + row0 + 8 * r;
      const float gate = row < work.queries ? gate_of<T>(weight, unit.batch, unit.head, row) : 0.0f;
      factor[r] = norm[r] == 0.0f || gate == 0.0f ? 0.0f : __fdividef(gate, norm[r]);
    }
  }

  // Writes the rows of the worker. They pass through its part of the queries' memory, so that they leave in whole
  // packs.
  __device__ void store(const float (&result)[kResults], const Unit& unit) {
    unsigned char* const own = query + number * kOwnRows * kPanelBytes;
    const int first = computed_here(row0);
    named_barrier_wait(kOwn + number, kWarpgroup);  // all its warps are done with the queries
#pragma unroll
    for (int i = 0; i < kResults; i += 2) {
      const int row = first + 8 * row_of(i), column = column0 + column_of(i);
      const int panel = column / kPanelChannels, piece = column % kPanelChannels / 8;
      *reinterpret_cast<uint32_t*>(own + panel * P::kQueryPanel + row * kPanelBytes +
                                   (piece ^ row % kSwizzleRows) * kPackBytes + column % 8 * 2) =
          pack_pair(result[i], result[i + 1], T());
    }
    named_barrier_wait(kOwn + number, kWarpgroup);
    constexpr int kPieces = P::kWidth / 8;
    for (int i = (int)threadIdx.x % kWarpgroup; i < kOwnRows * kPieces; i += kWarpgroup) {
      const int row = i / kPieces, piece = i % kPieces, token = unit.row + number * kOwnRows + row;
      if (token >= work.queries || piece * 8 >= work.value_dim) continue;
      const unsigned char* from =
          own + piece / 8 * P::kQueryPanel + row * kPanelBytes + (piece % 8 ^ row % kSwizzleRows) * kPackBytes;
      T* const to = static_cast<T*>(work.out.ptr) + unit.batch * work.out.stride[0] + unit.head * work.out.stride[1] +
                    token * work.out.stride[2] + piece * 8;
      *reinterpret_cast<Pack<uint32_t>*>(to) = *reinterpret_cast<const Pack<uint32_t>*>(from);
    }
    // The next queries are copied there, when every thread of the warp is done.
    fence_async_proxy();
    __syncwarp();
    release(&barriers->query.empty);
  }

  __device__ void store_lse(const Unit& unit) const {
    if (work.lse == nullptr || column0 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = unit.row + number * kOwnRows + row0 + 8 * r;
      if (row < work.queries)
        work.lse[(unit.batch * work.heads + unit.head) * (int64_t)work.queries + row] =
            norm[r] == 0.0f ? -INFINITY : top[r] * kLn2 + logf(norm[r]);
    }
  }

  __device__ void compute(const Unit& unit, uint32_t query_parity) {
    float total[P::kGrouped ? kResults : 1] = {}, factor[2] = {0.0f, 0.0f};
    barrier_wait(&barriers->query.full, query_parity);
    begin_group();
    for (Tiles<P::kKeys> tiles(work, unit.row); tiles.valid();) {
      absorb<true>(tiles, unit);
      int source = tiles.source;
      while (!tiles.next()) {
        absorb<false>(tiles, unit);
        source = tiles.source;
      }
      end_group();
      share(work.source[source].gate, unit, factor);
      if constexpr (P::kGrouped) {
#pragma unroll
        for (int i = 0; i < kResults; ++i) total[i] += factor[row_of(i)] == 0.0f ? 0.0f : sum[i] * factor[row_of(i)];
        begin_group();
      }
    }
    if constexpr (P::kGrouped) {
      store(total, unit);
    } else {
#pragma unroll
      for (int i = 0; i < kResults; ++i) sum[i] = factor[row_of(i)] == 0.0f ? 0.0f : sum[i] * factor[row_of(i)];
      store_lse(unit);
      store(sum, unit);
    }
  }
};

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
