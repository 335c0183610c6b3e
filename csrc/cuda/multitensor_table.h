// What the CUDA kernels on lists of tensors share: the table that finds elements, its way to the device, and elements
// of any type as numbers to compute with.
//
// Sizes, addresses and types of any number of tensors are one table in device memory (words.h says how it gets there);
// the kernels proper are one launch each.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "transfuse/multitensor.h"
#include "words.h"

namespace transfuse {
namespace lists {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kFill = kMaxBlocks < 2048 ? kMaxBlocks : 2048;  // thread blocks that keep any GPU busy
constexpr int64_t kMostRounds = 8;  // rounds of a thread block per chunk, where nothing else asks for more
constexpr int64_t kMostSums = kMaxBlocks < 2048 ? 32 : (int64_t)1 << 23;  // of all chunks, where chunks can be longer
constexpr int64_t kPiece = 2048;        // elements of a round; chunks are whole pieces
constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp

// ---- the table ------------------------------------------------------------------------------------------------------

// One tensor on the device.
struct Place {
  uint64_t address;
  DType dtype;
};

// Block j has chunks start[j] .. start[j + 1], of `length` elements but the last. The tensors of a call have numbers.
struct Table {
  int64_t blocks, length;
  const int64_t* size;
  const int64_t* start;
  const int64_t* keys;      // by block, or nullptr
  const uint64_t* address;  // by tensor
  const uint8_t* dtype;     // by tensor
  const uint8_t* wide;      // by block: whether to compute in double

  __device__ Place tensor(int64_t number) const { return {address[number], (DType)dtype[number]}; }
};

struct Chunk {
  int64_t block, begin, count;
};

// The chunk of a number, for whole warps.
__device__ inline Chunk find_chunk(const Table& t, int64_t number) {
  const int64_t block = find_segment(t.start, t.blocks, number);
  const int64_t begin = (number - t.start[block]) * t.length, left = t.size[block] - begin;
  return {block, begin, left < t.length ? left : t.length};
}

// Chunks of a call whose kernels write `sums` numbers for each: not so many that those become large.
inline int64_t chunk_length(int64_t blocks, const int64_t* size, int64_t sums) {
  int64_t total = 0;
  for (int64_t j = 0; j < blocks; ++j) total += size[j];
  int64_t rounds = std::min(std::max<int64_t>(total / (kPiece * kFill), 1), kMostRounds);
  while (kPiece * rounds < total && total / (kPiece * rounds) * sums > kMostSums) rounds *= 2;
  return kPiece * rounds;
}

// The table on the host, on its way into device memory.
class TableBuilder {
 public:
  TableBuilder(int64_t blocks, const int64_t* size, int64_t sums) : blocks_(blocks), size_(size) {
    length_ = chunk_length(blocks, size, sums);
    wide_.resize((size_t)blocks);
    for (int64_t j = 0; j < blocks; ++j) chunks_ += (size[j] + length_ - 1) / length_;
  }

  int64_t chunks() const { return chunks_; }
  // Words of device memory for a table of `tensors`.
  static int64_t words(int64_t blocks, int64_t tensors) {
    return 3 * blocks + 1 + tensors + (tensors + 7) / 8 + (blocks + 7) / 8;
  }

  // Numbers of tensors are given in the order of these calls: `lists` tensors for every block, list after list. Returns
  // that of the first.
  int64_t add(const Flat* tensors, int64_t lists, bool counts = true) {
    const int64_t first = (int64_t)address_.size();
    for (int64_t i = 0; i < lists * blocks_; ++i) {
      address_.push_back(reinterpret_cast<uintptr_t>(tensors[i].ptr));
      dtype_.push_back((uint8_t)tensors[i].dtype);
      const bool is_wide = tensors[i].dtype == DType::f64 && tensors[i].ptr != nullptr;
      if (counts && is_wide) wide_[(size_t)(i % blocks_)] = 1;
    }
    return first;
  }
  // Ids of elements: a further tensor for each block, whose type does not matter.
  int64_t add(const void* const* ids) {
    const int64_t first = (int64_t)address_.size();
    for (int64_t j = 0; j < blocks_; ++j) {
      address_.push_back(reinterpret_cast<uintptr_t>(ids[j]));
      dtype_.push_back(0);
    }
    return first;
  }
  bool any_wide() const { return std::find(wide_.begin(), wide_.end(), 1) != wide_.end(); }
  bool any_narrow() const { return std::find(wide_.begin(), wide_.end(), 0) != wide_.end(); }

  // Puts the table into `memory` and past its end.
  cudaError_t upload(const int64_t* keys, uint64_t*& memory, Table& table, cudaStream_t stream) const {
    std::vector<uint64_t> words((size_t)words_needed());
    size_t at = 0;
    const auto put = [&](const void* from, size_t bytes) {
      const uint64_t* there = memory + at;
      if (bytes > 0) std::memcpy(words.data() + at, from, bytes);
      at += (bytes + 7) / 8;
      return there;
    };
    std::vector<int64_t> start((size_t)blocks_ + 1);
    for (int64_t j = 0; j < blocks_; ++j) start[(size_t)j + 1] = start[(size_t)j] + (size_[j] + length_ - 1) / length_;
    table.blocks = blocks_;
    table.length = length_;
    table.size = reinterpret_cast<const int64_t*>(put(size_, (size_t)blocks_ * 8));
    table.start = reinterpret_cast<const int64_t*>(put(start.data(), start.size() * 8));
    table.keys = keys == nullptr ? nullptr : reinterpret_cast<const int64_t*>(put(keys, (size_t)blocks_ * 8));
    table.address = put(address_.data(), address_.size() * 8);
    table.dtype = reinterpret_cast<const uint8_t*>(put(dtype_.data(), dtype_.size()));
    table.wide = reinterpret_cast<const uint8_t*>(put(wide_.data(), wide_.size()));
    uint64_t* const to = memory;
    memory += words_needed();
    return upload_words(to, words.data(), at, stream);
  }

 private:
  int64_t words_needed() const { return words(blocks_, (int64_t)address_.size()); }

  int64_t blocks_, length_ = 0, chunks_ = 0;
  const int64_t* size_;
  std::vector<uint64_t> address_;
  std::vector<uint8_t> dtype_, wide_;
};

// Calls one(number of type A) and then the other, for the blocks that are computed in float and in double.
template <class F>
cudaError_t for_both_types(const TableBuilder& table, const F& body) {
  cudaError_t error = cudaSuccess;
  if (table.chunks() == 0) return error;
  if (table.any_narrow()) error = body(float());
  if (error == cudaSuccess && table.any_wide()) error = body(double());
  return error;
}

// ---- elements -------------------------------------------------------------------------------------------------------

template <class A>
constexpr bool kIsWide = std::is_same_v<A, double>;
// Elements that a thread takes at a time: 32 bytes of A.
template <class A>
constexpr int kPer = 32 / (int)sizeof(A);

// N elements of a tensor as they are stored, in packs of at most 16 bytes.
template <class M, int N>
struct Stored {
  using P = Pack<M, (kPackBytes / (int)sizeof(M) < N ? kPackBytes / (int)sizeof(M) : N)>;
  P packs[N / P::kSize];
};

template <int N, class P, int K>
__device__ inline void load_packs(Place t, int64_t at, int64_t n, P (&packs)[K]) {
  using M = std::remove_reference_t<decltype(packs[0].v[0])>;
  const M* from = reinterpret_cast<const M*>(t.address) + at;
  if (n >= N && reinterpret_cast<uintptr_t>(from) % sizeof(P) == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) packs[k] = load_pack<P>(from + k * P::kSize);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    M x = {};
    if (i < n) x = from[i];
    packs[i / P::kSize].v[i % P::kSize] = x;
  }
}

template <int N, class P, int K>
__device__ inline void store_packs(Place t, int64_t at, int64_t n, const P (&packs)[K]) {
  using M = std::remove_const_t<std::remove_reference_t<decltype(packs[0].v[0])>>;
  M* to = reinterpret_cast<M*>(t.address) + at;
  if (n >= N && reinterpret_cast<uintptr_t>(to) % sizeof(P) == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) *reinterpret_cast<P*>(to + k * P::kSize) = packs[k];
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < n) to[i] = packs[i / P::kSize].v[i % P::kSize];
}

template <class A, int N, class P, int K>
__device__ inline void widen_packs(const P (&packs)[K], A (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = (A)widen(packs[i / P::kSize].v[i % P::kSize]);
}

template <class A, int N, class P, int K>
__device__ inline void narrow_packs(const A (&x)[N], P (&packs)[K]) {
  using M = std::remove_reference_t<decltype(packs[0].v[0])>;
  using B = std::conditional_t<std::is_same_v<M, double>, double, float>;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow((B)x[i], &packs[i / P::kSize].v[i % P::kSize]);
}

// Calls body with room for N elements of a type; double only where A is. Every thread of a block has the same tensor,
// so its type is no matter of diverging.
template <class A, int N, class F>
__device__ inline void with_stored(DType dtype, const F& body) {
  switch (dtype) {
    case DType::f32: return body(Stored<float, N>());
    case DType::bf16: return body(Stored<__nv_bfloat16, N>());
    case DType::f16: return body(Stored<__half, N>());
    case DType::f64:
      if constexpr (kIsWide<A>) body(Stored<double, N>());
  }
}

// Elements [at, at + N) of a tensor, of which n are there; zeros beyond.
template <class A, int N>
__device__ inline void load_numbers(Place t, int64_t at, int64_t n, A (&x)[N]) {
  with_stored<A, N>(t.dtype, [&](auto room) {
    load_packs<N>(t, at, n, room.packs);
    widen_packs(room.packs, x);
  });
}

// Rounds once, to the type of the tensor.
template <class A, int N>
__device__ inline void store_numbers(Place t, int64_t at, int64_t n, const A (&x)[N]) {
  with_stored<A, N>(t.dtype, [&](auto room) {
    narrow_packs(x, room.packs);
    store_packs<N>(t, at, n, room.packs);
  });
}

// Elements on their way from memory: kept as they are stored until they are asked for, so that several tensors can be
// waited for at once.
template <class A, int N>
class Awaited {
 public:
  __device__ void load(Place t, int64_t at, int64_t n) {
    dtype_ = t.dtype;
    switch (t.dtype) {
      case DType::bf16: return load_packs<N>(t, at, n, bf16_.packs);
      case DType::f16: return load_packs<N>(t, at, n, f16_.packs);
      default: return load_packs<N>(t, at, n, f32_.packs);
    }
  }
  __device__ void get(A (&x)[N]) const {
    switch (dtype_) {
      case DType::bf16: return widen_packs(bf16_.packs, x);
      case DType::f16: return widen_packs(f16_.packs, x);
      default: return widen_packs(f32_.packs, x);
    }
  }

 private:
  union {
    Stored<float, N> f32_;
    Stored<__nv_bfloat16, N> bf16_;
    Stored<__half, N> f16_;
  };
  DType dtype_;
};

template <int N>
class Awaited<double, N> {
 public:
  __device__ void load(Place t, int64_t at, int64_t n) { load_numbers(t, at, n, numbers_); }
  __device__ void get(double (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = numbers_[i];
  }

 private:
  double numbers_[N];
};

// ---- partitions -----------------------------------------------------------------------------------------------------

enum class Parts : int { one = 0, bytes, words, hashed };

struct PartsOf {
  Parts kind = Parts::one;
  int count = 1;
  int64_t ids = 0;  // number of the first tensor of ids
};

inline PartsOf parts_of(const Partition& partition, TableBuilder& table) {
  PartsOf parts;
  parts.count = partition.count;
  if (partition.ids != nullptr) {
    parts.kind = partition.wide ? Parts::words : Parts::bytes;
    parts.ids = table.add(partition.ids);
  } else if (partition.keys != nullptr) {
    parts.kind = Parts::hashed;
  }
  return parts;
}

__device__ inline uint32_t mix_bits(uint32_t x) {  // the finaliser of MurmurHash3
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

template <class I, int N>
__device__ inline void read_ids(uint64_t address, int64_t at, int64_t n, int none, int (&part)[N]) {
  using P = Pack<I, N>;
  const I* from = reinterpret_cast<const I*>(address) + at;
  P ids = {};
  if (n >= N && reinterpret_cast<uintptr_t>(from) % sizeof(P) == 0) {
    ids = load_pack<P>(from);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < n) ids.v[i] = from[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) part[i] = i < n ? (int)ids.v[i] : none;
}

// Numbers of the coefficients of elements [at, at + N) of a block, of which n are there; `count` or more: none. The N
// elements do not cross a multiple of 2^32.
template <int N>
__device__ inline void read_parts(const Table& t, const PartsOf& parts, int64_t block, int64_t at, int64_t n,
                                  int (&part)[N]) {
  if (parts.kind == Parts::hashed) {
    const uint64_t key = (uint64_t)t.keys[block];
    const uint32_t high = mix_bits((uint32_t)((uint64_t)at >> 32) + mix_bits((uint32_t)(key >> 32)));
    const uint32_t inner = mix_bits((uint32_t)key ^ high);
#pragma unroll
    for (int i = 0; i < N; ++i)
      part[i] = (int)(((mix_bits((uint32_t)(at + i) ^ inner) >> 16) * (uint32_t)parts.count) >> 16);
    return;
  }
  const uint64_t address = t.address[parts.ids + block];
  if (parts.kind == Parts::bytes)
    read_ids<uint8_t>(address, at, n, parts.count, part);
  else
    read_ids<uint16_t>(address, at, n, parts.count, part);
}

// Calls body(chunk, its number) for the chunks of this thread block that are computed in A.
template <class A, class F>
__device__ inline void each_chunk(const Table& table, int64_t chunks, const F& body) {
  for (int64_t item = blockIdx.x; item < chunks; item += gridDim.x) {
    const Chunk chunk = find_chunk(table, item);
    if ((table.wide[chunk.block] != 0) == kIsWide<A>) body(chunk, item);
  }
}

// ---- sums -----------------------------------------------------------------------------------------------------------

__device__ inline double warp_sum(double x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// NaN stays.
__device__ inline double larger(double a, double b) { return b > a || b != b ? b : a; }

__device__ inline double warp_largest(double x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

}  // namespace lists
}  // namespace transfuse
