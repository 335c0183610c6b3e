// A computing warpgroup of the attention kernel for compute capability 9.0: 64 queries against the tiles of all
// sources.
#pragma once

#include "attention_hopper_tiles.h"

namespace transfuse::tiled {

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

}  // namespace transfuse::tiled
