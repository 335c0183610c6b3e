// The table of chunks that every kernel on lists of tensors walks, and its loads and stores.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "storage.h"
#include "transfuse/multitensor.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kPiece = 2048;         // elements worked on in the first-level cache
constexpr int64_t kSegment = 32768;      // elements of a task
constexpr int64_t kStreaming = 4 << 20;  // bytes of an output above which it bypasses the cache

// Elements [begin, begin + count) of a block.
struct Chunk {
  int64_t block, begin, count;
};

// Chunks of at most `segment` elements in the order of the blocks, and runs of them as tasks: small tensors share one.
class ChunkTable {
 public:
  ChunkTable(int64_t blocks, const int64_t* size, int64_t segment) {
    int64_t held = 0;
    for (int64_t j = 0; j < blocks; ++j)
      for (int64_t begin = 0; begin < size[j]; begin += segment) {
        const int64_t count = std::min(segment, size[j] - begin);
        if (chunks_.empty() || held + count > segment) {
          starts_.push_back((int64_t)chunks_.size());
          held = 0;
        }
        chunks_.push_back({j, begin, count});
        held += count;
        elements_ += count;
      }
    tasks_ = (int64_t)starts_.size();
    starts_.push_back((int64_t)chunks_.size());
  }

  int64_t size() const { return (int64_t)chunks_.size(); }
  int64_t elements() const { return elements_; }
  const Chunk& operator[](int64_t i) const { return chunks_[(size_t)i]; }

  // body(number of the chunk, chunk), chunks of a task in order
  template <class F>
  void each(const Parallel& parallel, const F& body) const {
    const Parallel used = tasks_ > 1 ? parallel : serial_parallel();
    for_each_task(used, tasks_, [&](int64_t task) {
      for (int64_t i = starts_[(size_t)task]; i < starts_[(size_t)task + 1]; ++i) body(i, chunks_[(size_t)i]);
    });
  }

 private:
  std::vector<Chunk> chunks_;
  std::vector<int64_t> starts_;
  int64_t tasks_ = 0, elements_ = 0;
};

// body(begin, count) for the pieces of a chunk
template <class F>
TRANSFUSE_INLINE void each_piece(const Chunk& chunk, int64_t piece, const F& body) {
  for (int64_t at = 0; at < chunk.count; at += piece) body(chunk.begin + at, std::min(piece, chunk.count - at));
}

inline const void* at_element(const Flat& t, int64_t i) {
  return static_cast<const char*>(t.ptr) + i * item_size(t.dtype);
}
inline void* to_element(const Flat& t, int64_t i) { return const_cast<void*>(at_element(t, i)); }

// Elements of a tensor as numbers to compute with: where they lie, if they are of that type, else widened into `room`.
template <class T>
TRANSFUSE_INLINE const T* fetch(const Flat& t, int64_t begin, int64_t n, T* room) {
  if (t.dtype == (std::is_same_v<T, double> ? DType::f64 : DType::f32))
    return static_cast<const T*>(at_element(t, begin));
  load_row(t.ptr, t.dtype, begin, 1, n, room);
  return room;
}

// Rounds once, to the type of the tensor.
template <class T>
TRANSFUSE_INLINE void put(const Flat& t, int64_t begin, int64_t n, const T* values) {
  if constexpr (std::is_same_v<T, float>) {
    store_row(const_cast<void*>(t.ptr), t.dtype, begin, 1, n, values);
  } else {
    void* p = const_cast<void*>(t.ptr);
    for (int64_t i = 0; i < n; ++i) {
      switch (t.dtype) {
        case DType::f64: static_cast<double*>(p)[begin + i] = values[i]; break;
        case DType::f32: static_cast<float*>(p)[begin + i] = (float)values[i]; break;
        case DType::bf16: static_cast<uint16_t*>(p)[begin + i] = float_to_bf16((float)values[i]); break;
        case DType::f16: static_cast<uint16_t*>(p)[begin + i] = float_to_f16((float)values[i]); break;
      }
    }
  }
}

inline bool any_double(const Flat* lists, int64_t count, int64_t blocks, int64_t block) {
  for (int64_t i = 0; lists != nullptr && i < count; ++i)
    if (lists[i * blocks + block].ptr != nullptr && lists[i * blocks + block].dtype == DType::f64) return true;
  return false;
}

}  // namespace
}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
