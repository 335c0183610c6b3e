// Linear combinations of lists of tensors, their coefficient gradients, and weighted means, at one ISA level (see
// multitensor.h).
//
// A piece of every list is brought into the first-level cache and added there; the last addition writes the result,
// past the cache where it is large. Sums of products are float over a piece (in vector lanes), double beyond.
#include "transfuse/multitensor.h"

#include "multitensor_chunks.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

// ---- partitions ------------------------------------------------------------------------------------------------

TRANSFUSE_INLINE uint32_t mix_bits(uint32_t x) {  // the finaliser of MurmurHash3
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Numbers of the coefficients of elements [begin, begin + n) of a block, at most partition.count. Element i under a key
// has the high half of mix(i_low ^ mix(key_low ^ mix(i_high + mix(key_high)))), times count, shifted down. A piece
// never crosses a multiple of 2^32.
void read_ids(const Partition& partition, int64_t block, int64_t begin, int64_t n, int32_t* ids) {
  const uint32_t count = (uint32_t)partition.count;
  if (partition.keys != nullptr) {
    const uint64_t key = (uint64_t)partition.keys[block];
    const uint32_t high = mix_bits((uint32_t)((uint64_t)begin >> 32) + mix_bits((uint32_t)(key >> 32)));
    const uint32_t inner = mix_bits((uint32_t)key ^ high), low = (uint32_t)begin;
    for (int64_t i = 0; i < n; ++i) ids[i] = (int32_t)(((mix_bits((low + (uint32_t)i) ^ inner) >> 16) * count) >> 16);
  } else if (partition.wide) {
    const uint16_t* p = static_cast<const uint16_t*>(partition.ids[block]) + begin;
    for (int64_t i = 0; i < n; ++i) ids[i] = (int32_t)std::min<uint32_t>(p[i], count);
  } else {
    const uint8_t* p = static_cast<const uint8_t*>(partition.ids[block]) + begin;
    for (int64_t i = 0; i < n; ++i) ids[i] = (int32_t)std::min<uint32_t>(p[i], count);
  }
}

// ---- lincomb ---------------------------------------------------------------------------------------------------

// dst = in (0 where absent) + sum_k factor[k] p[k]
template <class T, class S, int N>
void add_lists(const T* in, const S* const* p, const T* factor, int64_t n, T* dst, bool stream) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  V f[N];
  for (int k = 0; k < N; ++k) f[k] = splat<T>(factor[k]);
  const auto single = [&](int64_t i) {
    T v = in != nullptr ? in[i] : T(0);
    for (int k = 0; k < N; ++k) v += factor[k] * read_one(p[k] + i);
    dst[i] = v;
  };
  const auto vector = [&](int64_t i) {
    V v = in != nullptr ? load<V>(in + i) : V{};
    for (int k = 0; k < N; ++k) v += f[k] * read(p[k] + i);
    return v;
  };
  int64_t i = 0;
  if (stream) {
    for (; i < n && reinterpret_cast<uintptr_t>(dst + i) % sizeof(V) != 0; ++i) single(i);
    for (; i + W <= n; i += W) store_past_cache<V>(dst + i, vector(i));
  }
  for (; i + W <= n; i += W) store(dst + i, vector(i));
  for (; i < n; ++i) single(i);
}

// The same for one list, whose factor is that of the element's partition.
template <class T, class S>
void add_partition(const T* in, const S* p, const T* table, const int32_t* ids, int64_t n, T* dst) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    T f[W];
    for (int l = 0; l < W; ++l) f[l] = table[ids[i + l]];
    const V v = in != nullptr ? load<V>(in + i) : V{};
    store(dst + i, v + load<V>(f) * read(p + i));
  }
  for (; i < n; ++i) dst[i] = (in != nullptr ? in[i] : T(0)) + table[ids[i]] * read_one(p + i);
}

template <class T, class S>
int add_some(const T* in, const Flat* lists, int64_t stride, const T* factor, int count, int64_t begin, int64_t n,
             T* dst, bool stream) {
  const S* p[8];
  const int taken = count >= 8 ? 8 : count >= 4 ? 4 : count >= 2 ? 2 : 1;
  for (int k = 0; k < taken; ++k) p[k] = static_cast<const S*>(at_element(lists[k * stride], begin));
  switch (taken) {
    case 8: add_lists<T, S, 8>(in, p, factor, n, dst, stream); break;
    case 4: add_lists<T, S, 4>(in, p, factor, n, dst, stream); break;
    case 2: add_lists<T, S, 2>(in, p, factor, n, dst, stream); break;
    default: add_lists<T, S, 1>(in, p, factor, n, dst, stream); break;
  }
  return taken;
}

template <class T>
constexpr DType kOwn = std::is_same_v<T, double> ? DType::f64 : DType::f32;

template <class T>
struct LincombPiece {
  alignas(64) T sum[kPiece];
  alignas(64) T room[kPiece];
  int32_t ids[kPiece];
};

// One piece of a block; `factors` are (lists), or (lists, partitions + 1) with a last one of 0.
template <class T>
void lincomb_piece(const LincombArgs& args, int64_t block, int64_t begin, int64_t n, const T* factors,
                   LincombPiece<T>& room) {
  const Flat& out = args.out[block];
  const bool direct = out.dtype == kOwn<T>;
  T* const last = direct ? static_cast<T*>(to_element(out, begin)) : room.sum;
  const bool stream = direct && args.size[block] * (int64_t)sizeof(T) >= kStreaming;
  const bool parted = args.partition.ids != nullptr || args.partition.keys != nullptr;
  if (parted) read_ids(args.partition, block, begin, n, room.ids);
  const T* in = nullptr;
  if (args.base != nullptr) in = fetch<T>(args.base[block], begin, n, room.sum);
  const Flat* lists = args.deltas + block;
  const int64_t stride = args.blocks;
  for (int k = 0; k < args.lists;) {
    const Flat& first = lists[k * stride];
    int run = 1;
    if (!parted && (first.dtype == kOwn<T> || !std::is_same_v<T, double>))
      while (k + run < args.lists && run < 8 && lists[(k + run) * stride].dtype == first.dtype) ++run;
    // Partitions write to the cache: they are not bound by memory.
    T* dst = k + run >= args.lists && (parted || run == 8 || run == 4 || run <= 2) ? last : room.sum;
    int taken = 1;
    if (parted) {
      const T* table = factors + (int64_t)k * (args.partition.count + 1);
      if constexpr (std::is_same_v<T, float>) {
        const void* p = at_element(first, begin);
        if (first.dtype == DType::f32)
          add_partition<T>(in, static_cast<const float*>(p), table, room.ids, n, dst);
        else if (first.dtype == DType::bf16)
          add_partition<T>(in, static_cast<const Bf16*>(p), table, room.ids, n, dst);
        else
          add_partition<T>(in, static_cast<const F16*>(p), table, room.ids, n, dst);
      } else {
        add_partition<T>(in, fetch<T>(first, begin, n, room.room), table, room.ids, n, dst);
      }
    } else if constexpr (std::is_same_v<T, float>) {
      const Flat* some = lists + k * stride;
      const bool past = stream && dst == last;
      if (first.dtype == DType::f32)
        taken = add_some<T, float>(in, some, stride, factors + k, run, begin, n, dst, past);
      else if (first.dtype == DType::bf16)
        taken = add_some<T, Bf16>(in, some, stride, factors + k, run, begin, n, dst, past);
      else
        taken = add_some<T, F16>(in, some, stride, factors + k, run, begin, n, dst, past);
    } else if (first.dtype == kOwn<T>) {
      taken = add_some<T, T>(in, lists + k * stride, stride, factors + k, run, begin, n, dst, stream && dst == last);
    } else {
      const T* p[1] = {fetch<T>(first, begin, n, room.room)};
      add_lists<T, T, 1>(in, p, factors + k, n, dst, stream && dst == last);
    }
    in = dst;
    k += taken;
  }
  if (!direct) put(out, begin, n, room.sum);
}

template <class T>
void lincomb_chunk(const LincombArgs& args, const Chunk& chunk) {
  const int64_t partitions = args.partition.count;
  const bool parted = args.partition.ids != nullptr || args.partition.keys != nullptr;
  const int64_t width = parted ? partitions + 1 : 1;
  char* scratch =
      static_cast<char*>(thread_scratch(sizeof(LincombPiece<T>) + (size_t)(args.lists * width) * sizeof(T)));
  auto& room = *reinterpret_cast<LincombPiece<T>*>(scratch);
  T* factors = reinterpret_cast<T*>(scratch + sizeof(LincombPiece<T>));
  for (int k = 0; k < args.lists; ++k) {
    const double* own = args.coefficients + ((int64_t)k * args.blocks + chunk.block) * partitions;
    for (int64_t q = 0; q < width; ++q) factors[k * width + q] = q < partitions ? (T)own[q] : T(0);
  }
  each_piece(chunk, kPiece,
             [&](int64_t begin, int64_t n) { lincomb_piece(args, chunk.block, begin, n, factors, room); });
}

bool is_double(const LincombArgs& args, int64_t block) {
  return any_double(args.base, 1, args.blocks, block) || any_double(args.deltas, args.lists, args.blocks, block) ||
         any_double(args.out, 1, args.blocks, block);
}

void run_lincomb(const LincombArgs& args, const Parallel& parallel) {
  const ChunkTable table(args.blocks, args.size, kSegment);
  table.each(parallel, [&](int64_t, const Chunk& chunk) {
    if (is_double(args, chunk.block))
      lincomb_chunk<double>(args, chunk);
    else
      lincomb_chunk<float>(args, chunk);
    finish_streaming();
  });
}

// ---- block dots ------------------------------------------------------------------------------------------------

template <class T, class S>
T dot(const T* a, const S* b, int64_t n) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W, U = 4;
  V sum[U] = {};
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W)
    for (int u = 0; u < U; ++u) sum[u] += load<V>(a + i + u * W) * read(b + i + u * W);
  for (; i + W <= n; i += W) sum[0] += load<V>(a + i) * read(b + i);
  T rest = T(0);
  for (; i < n; ++i) rest += a[i] * read_one(b + i);
  return horizontal_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

template <class T>
T dot_with(const T* a, const Flat& b, int64_t begin, int64_t n, T* room) {
  if constexpr (std::is_same_v<T, float>) {
    if (b.dtype == DType::bf16) return dot(a, static_cast<const Bf16*>(at_element(b, begin)), n);
    if (b.dtype == DType::f16) return dot(a, static_cast<const F16*>(at_element(b, begin)), n);
  }
  return dot(a, fetch<T>(b, begin, n, room), n);
}

// Sums of a chunk: `sums` are (lists), or (lists, partitions + 1), zero.
template <class T>
void dots_chunk(const BlockDotsArgs& args, const Chunk& chunk, double* sums) {
  auto& room = *static_cast<LincombPiece<T>*>(thread_scratch(sizeof(LincombPiece<T>)));
  const bool parted = args.partition.ids != nullptr || args.partition.keys != nullptr;
  const int64_t width = parted ? args.partition.count + 1 : 1;
  const Flat* lists = args.deltas + chunk.block;
  each_piece(chunk, kPiece, [&](int64_t begin, int64_t n) {
    const T* g = fetch<T>(args.grads[chunk.block], begin, n, room.sum);
    if (parted) read_ids(args.partition, chunk.block, begin, n, room.ids);
    for (int k = 0; k < args.lists; ++k) {
      const Flat& list = lists[k * args.blocks];
      if (!parted) {
        sums[k] += (double)dot_with(g, list, begin, n, room.room);
        continue;
      }
      const T* x = fetch<T>(list, begin, n, room.room);
      double* own = sums + k * width;
      for (int64_t i = 0; i < n; ++i) own[room.ids[i]] += (double)(g[i] * x[i]);
    }
  });
}

void run_block_dots(const BlockDotsArgs& args, const Parallel& parallel) {
  const bool parted = args.partition.ids != nullptr || args.partition.keys != nullptr;
  const int64_t partitions = args.partition.count, width = parted ? partitions + 1 : 1;
  const int64_t per_chunk = args.lists * width;
  int64_t total = 0;
  for (int64_t j = 0; j < args.blocks; ++j) total += args.size[j];
  // Partial sums of all chunks stay below 2^23 numbers, or one chunk per block.
  int64_t segment = kSegment;
  while (segment < total && total / segment * per_chunk > (int64_t)1 << 23) segment *= 2;
  const ChunkTable table(args.blocks, args.size, segment);
  std::vector<double> partial((size_t)(table.size() * per_chunk));
  table.each(parallel, [&](int64_t i, const Chunk& chunk) {
    double* sums = partial.data() + i * per_chunk;
    if (any_double(args.grads, 1, args.blocks, chunk.block) ||
        any_double(args.deltas, args.lists, args.blocks, chunk.block))
      dots_chunk<double>(args, chunk, sums);
    else
      dots_chunk<float>(args, chunk, sums);
  });
  std::fill(args.sums, args.sums + (int64_t)args.lists * args.blocks * partitions, 0.0);
  for (int64_t i = 0; i < table.size(); ++i)
    for (int k = 0; k < args.lists; ++k)
      for (int64_t q = 0; q < partitions; ++q)
        args.sums[((int64_t)k * args.blocks + table[i].block) * partitions + q] +=
            partial[(size_t)(i * per_chunk + k * width + q)];
}

// ---- weighted means --------------------------------------------------------------------------------------------

constexpr int64_t kRatioPiece = 512;

template <class T>
int64_t ratio_piece(const RatioArgs& args, int64_t block, int64_t begin, int64_t n, T* room, const T** x, int* used) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  int64_t refused = 0;
  const int models = args.models;
  T* weights = room + (int64_t)models * kRatioPiece;
  T* result = weights + (int64_t)models * kRatioPiece;
  for (int k = 0; k < models; ++k) {
    x[k] = fetch<T>(args.thetas[k * args.blocks + block], begin, n, room + k * kRatioPiece);
    T* own = weights + k * kRatioPiece;
    const T floor = (T)args.floors[k];
    const T* given = fetch<T>(args.weights[k * args.blocks + block], begin, n, own);
    for (int64_t i = 0; i < n; ++i) {
      const T f = given[i];
      refused += !(f >= T(0) && f <= std::numeric_limits<T>::max());
      own[i] = f < floor ? floor : f;
    }
  }
  for (int s = 0; s < args.settings; ++s) {
    const double* w = args.coefficients + (int64_t)s * models;
    int count = 0;
    for (int k = 0; k < models; ++k)
      if (w[k] != 0.0) used[count++] = k;
    const Flat& out = args.out[(int64_t)s * args.blocks + block];
    T* dst = out.dtype == kOwn<T> ? static_cast<T*>(to_element(out, begin)) : result;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      V above = {}, below = {};
      for (int c = 0; c < count; ++c) {
        const int k = used[c];
        const V f = splat<T>((T)w[k]) * load<V>(weights + k * kRatioPiece + i);
        below += f;
        above += f * load<V>(x[k] + i);
      }
      const V target = load<V>(x[0] + i);
      store(dst + i, below > 0 ? above / below : target);
    }
    for (; i < n; ++i) {
      T above = 0, below = 0;
      for (int c = 0; c < count; ++c) {
        const int k = used[c];
        const T f = (T)w[k] * weights[k * kRatioPiece + i];
        below += f;
        above += f * x[k][i];
      }
      dst[i] = below > 0 ? above / below : x[0][i];
    }
    if (dst == result) put(out, begin, n, result);
  }
  return refused;
}

template <class T>
int64_t ratio_chunk(const RatioArgs& args, const Chunk& chunk) {
  const size_t numbers = (size_t)(2 * args.models + 1) * kRatioPiece * sizeof(T);
  char* scratch = static_cast<char*>(thread_scratch(numbers + (size_t)args.models * (sizeof(T*) + sizeof(int))));
  T* room = reinterpret_cast<T*>(scratch);
  const T** x = reinterpret_cast<const T**>(scratch + numbers);
  int* used = reinterpret_cast<int*>(scratch + numbers + (size_t)args.models * sizeof(T*));
  int64_t refused = 0;
  each_piece(chunk, kRatioPiece,
             [&](int64_t begin, int64_t n) { refused += ratio_piece<T>(args, chunk.block, begin, n, room, x, used); });
  return refused;
}

void run_ratio(const RatioArgs& args, const Parallel& parallel) {
  const ChunkTable table(args.blocks, args.size, kSegment);
  std::vector<int64_t> refused((size_t)table.size());
  table.each(parallel, [&](int64_t i, const Chunk& chunk) {
    const bool wide = any_double(args.thetas, args.models, args.blocks, chunk.block) ||
                      any_double(args.weights, args.models, args.blocks, chunk.block);
    refused[(size_t)i] = wide ? ratio_chunk<double>(args, chunk) : ratio_chunk<float>(args, chunk);
  });
  *args.refused = 0;
  for (const int64_t count : refused) *args.refused += count;
}

}  // namespace

extern const MultitensorKernels kMultitensor;
const MultitensorKernels kMultitensor = {run_lincomb, run_block_dots, run_ratio};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
