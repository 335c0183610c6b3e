// What the CUDA kernels of the head curvature share: samples as stretches that do not cross domains, the tables of
// these on their way to the device, and the working memory of a call.
#pragma once

#include <algorithm>
#include <vector>

#include "transfuse/head_curvature.h"
#include "words.h"

namespace transfuse {
namespace head {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kFill = kMaxBlocks < 512 ? kMaxBlocks : 512;  // thread blocks that are enough to keep a GPU busy
constexpr int kDotSamples = 4;                                  // samples and
constexpr int kClasses = 8;        // classes whose products a thread block holds in registers
constexpr int kMoveSamples = 8;    // samples of a thread block where the gradient by x is made
constexpr int64_t kLeastSum = 32;  // samples of a stretch, where sums over samples are cut

// Domains as stretches of at most `length` samples.
struct Stretches {
  int64_t domains, length, count;
  const int64_t* offset;  // domains + 1: where each begins
  const int64_t* start;   // domains + 1: stretches before it
};

struct Rows {
  int64_t domain, first, last;
};

__device__ inline Rows find_rows(const Stretches& s, int64_t number) {
  const int64_t domain = find_segment(s.start, s.domains, number);
  const int64_t first = s.offset[domain] + (number - s.start[domain]) * s.length;
  const int64_t end = s.offset[domain + 1], last = first + s.length;
  return {domain, first, last < end ? last : end};
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Samples of a stretch of sums over samples: as many thread blocks as keep the GPU busy, if there are samples enough.
inline int64_t sum_length(const HeadArgs& a) {
  const int64_t width = a.columns + (a.bias != nullptr), tiles = (a.classes + kClasses - 1) / kClasses;
  // As if packs of 16 bytes were taken, so that the length does not depend on where tensors lie.
  const int64_t blocks = std::max<int64_t>((width + kWarp * 4 - 1) / (kWarp * 4), 1) * tiles;
  return std::max((a.samples * blocks + kFill - 1) / kFill, kLeastSum);
}

inline int64_t count_of(const HeadArgs& a, int64_t length, bool together) {
  if (together) return (a.samples + length - 1) / length;
  int64_t count = 0;
  for (int64_t e = 0; e < a.domains; ++e) count += (a.offsets[e + 1] - a.offsets[e] + length - 1) / length;
  return count;
}

// Working memory of a call, 8-byte words at a time.
class Memory {
 public:
  explicit Memory(void* memory) : at_(static_cast<uint64_t*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* found = reinterpret_cast<T*>(at_);
    at_ += words(count, sizeof(T));
    return found;
  }
  static int64_t words(int64_t count, size_t size) { return (count * (int64_t)size + 7) / 8; }

 private:
  uint64_t* at_;
};

// The tables of stretches of a call: by samples of products over columns, of sums, of the gradient by x; and sums of
// all domains together.
struct Tables {
  Stretches dots, sums, moves, all;
};

inline int64_t table_words(const HeadArgs& a) { return 4 * (a.domains + 1) + 4; }

inline cudaError_t upload_tables(const HeadArgs& a, Memory& memory, Tables& t, cudaStream_t stream) {
  std::vector<uint64_t> words;
  for (int64_t e = 0; e <= a.domains; ++e) words.push_back((uint64_t)a.offsets[e]);
  auto* to = memory.take<uint64_t>(table_words(a));
  const auto* offset = reinterpret_cast<const int64_t*>(to);
  const auto add = [&](int64_t length) {
    Stretches s{a.domains, length, 0, offset, reinterpret_cast<const int64_t*>(to + words.size())};
    words.push_back(0);
    for (int64_t e = 0; e < a.domains; ++e) {
      s.count += (a.offsets[e + 1] - a.offsets[e] + length - 1) / length;
      words.push_back((uint64_t)s.count);
    }
    return s;
  };
  const int64_t length = sum_length(a);
  t.dots = add(kDotSamples);
  t.sums = add(length);
  t.moves = add(kMoveSamples);
  t.all = {1, length, count_of(a, length, true), reinterpret_cast<const int64_t*>(to + words.size()), nullptr};
  for (const uint64_t word : {(uint64_t)0, (uint64_t)a.samples, (uint64_t)0, (uint64_t)t.all.count})
    words.push_back(word);
  t.all.start = t.all.offset + 2;
  return upload_words(to, words.data(), words.size(), stream);
}

}  // namespace head
}  // namespace transfuse
