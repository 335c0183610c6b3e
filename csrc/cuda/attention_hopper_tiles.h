// What the attention kernel for compute capability 9.0 is told, its sizes, and the order of its tiles, which the
// copying warpgroup and the computing ones walk alike.
#pragma once

#include "hopper.h"
#include "transfuse/attention.h"

namespace transfuse::tiled {

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

}  // namespace transfuse::tiled
