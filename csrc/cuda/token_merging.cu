// Merging, unmerging and pushing of tokens on CUDA (see token_merging.h); token_merging.cpp beside it registers the
// ops.
//
// Neighbouring threads take neighbouring channels, 16 bytes each where rows allow it, and every thread adds the tokens
// of its row in the order of the plan: no atomics, so the same bits come out every time.
#include <type_traits>

#include "device.h"
#include "transfuse/token_merging.h"

namespace transfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // per multiprocessor at least: enough to keep memory busy, and nothing spills

// A block takes kThreads >> shift neighbouring items (rows or tokens) of one batch entry, 2^shift threads each.
struct Tiling {
  int shift;
  int64_t items, tiles;  // per batch entry
};

// The widest group of threads along `packs` that leaves few of them without work.
Tiling tiling_of(int64_t items, int64_t packs) {
  int shift = 0;
  for (int next = 1; (kThreads >> next) > 0; ++next) {
    const int64_t lanes = (int64_t)1 << next, rounds = (packs + lanes - 1) / lanes;
    if (packs * 5 >= rounds * lanes * 4 || lanes <= 4) shift = next;
  }
  const int64_t each = kThreads >> shift;
  return {shift, items, (items + each - 1) / each};
}

// Calls body(batch entry, item, first channel, channels from one to the next) for what this thread does.
template <int P, class F>
__device__ inline void for_items(const Tiling& t, int64_t batch, const F& body) {
  const int lanes = 1 << t.shift, lane = (int)threadIdx.x & (lanes - 1), own = (int)threadIdx.x >> t.shift;
  for (int64_t block = blockIdx.x; block < batch * t.tiles; block += gridDim.x) {
    const int64_t b = block / t.tiles, item = block % t.tiles * (kThreads >> t.shift) + own;
    if (item < t.items) body(b, item, (int64_t)lane * P, (int64_t)lanes * P);
  }
}

template <class M>
__device__ inline const M* element(const View& v, int64_t b, int64_t token, int64_t channel) {
  return static_cast<const M*>(v.ptr) + b * v.stride[0] + token * v.stride[1] + channel * v.stride[2];
}

// The rows of a plan and one batch entry.
struct Segment {
  int64_t from, end;
  bool good;  // within the tokens, and so is every entry
};
__device__ inline Segment segment_of(const PlanView& p, int64_t b, int64_t r, bool first_only) {
  const int64_t* start = p.start + b * p.start_stride;
  const int64_t* order = p.order + b * p.order_stride;
  Segment s{start[r], start[r + 1], true};
  if (first_only && s.end > s.from + 1) s.end = s.from + 1;
  s.good = 0 <= s.from && s.from <= s.end && s.end <= p.tokens;
  for (int64_t k = s.from; s.good && k < s.end; ++k) s.good = 0 <= order[k] && order[k] < p.tokens;
  return s;
}

template <class M, int P>
__global__ void __launch_bounds__(kThreads, kBlocks) segments_kernel(const MergeArgs a, const Tiling t) {
  using A = typename Arithmetic<M>::A;
  using Q = Pack<M, P>;
  const PlanView& p = a.plan;
  for_items<P>(t, p.batch, [&](int64_t b, int64_t r, int64_t first, int64_t step) {
    const Segment s = segment_of(p, b, r, a.weighting == Weighting::first);
    const int64_t* order = p.order + b * p.order_stride;
    const A* scale = a.scale == nullptr ? nullptr : static_cast<const A*>(a.scale) + b * a.scale_stride;
    A total = A(0);
    for (int64_t k = s.from; scale != nullptr && s.good && k < s.end; ++k) total += scale[order[k]];
    A share = A(1);
    if (a.weighting == Weighting::mean && s.end > s.from) share = A(1) / (A)(s.end - s.from);
    if (a.weighting == Weighting::average) share = total == A(0) ? A(0) : A(1) / total;
    // A token alone keeps its bits.
    const bool whole =
        s.good && s.end - s.from == 1 && (scale == nullptr || (a.weighting == Weighting::average && total != A(0)));
    for (int64_t c = first; c < a.depth; c += step) {
      Q out;
      if (whole) {
        out = load_pack<Q>(element<M>(a.in, b, order[s.from], c));
      } else {
        A sum[P] = {};
        for (int64_t k = s.from; s.good && k < s.end; ++k) {
          const int64_t token = order[k];
          const Q x = load_pack<Q>(element<M>(a.in, b, token, c));
          const A factor = scale == nullptr ? A(1) : scale[token];
#pragma unroll
          for (int i = 0; i < P; ++i) sum[i] += factor * widen(x.v[i]);
        }
#pragma unroll
        for (int i = 0; i < P; ++i) narrow(sum[i] * share, &out.v[i]);
      }
      *reinterpret_cast<Q*>(static_cast<M*>(a.out) + (b * p.rows + r) * a.depth + c) = out;
    }
  });
}

template <class M, int P>
__global__ void __launch_bounds__(kThreads, kBlocks) amax_kernel(const MergeArgs a, const Tiling t) {
  using A = typename Arithmetic<M>::A;
  using Q = Pack<M, P>;
  const PlanView& p = a.plan;
  for_items<P>(t, p.batch, [&](int64_t b, int64_t r, int64_t first, int64_t step) {
    const Segment s = segment_of(p, b, r, false);
    const int64_t* order = p.order + b * p.order_stride;
    for (int64_t c = first; c < a.depth; c += step) {
      A top[P] = {};
      int64_t holder[P] = {};
      // Ties go to the lowest token, and the first token of a row is not always that; a NaN is the largest.
      for (int64_t k = s.from; s.good && k < s.end; ++k) {
        const int64_t token = order[k];
        const Q x = load_pack<Q>(element<M>(a.in, b, token, c));
#pragma unroll
        for (int i = 0; i < P; ++i) {
          const A v = widen(x.v[i]);
          const bool nan = v != v, had = top[i] != top[i], same = v == top[i] || (nan && had);
          if (k == s.from || v > top[i] || (nan && !had) || (same && token < holder[i])) {
            top[i] = v;
            holder[i] = token;
          }
        }
      }
      const int64_t at = (b * p.rows + r) * a.depth + c;
      Q out;
#pragma unroll
      for (int i = 0; i < P; ++i) {
        narrow(top[i], &out.v[i]);
        if (a.winner != nullptr) a.winner[at + i] = holder[i];
      }
      *reinterpret_cast<Q*>(static_cast<M*>(a.out) + at) = out;
    }
  });
}

template <class M, int P>
__global__ void __launch_bounds__(kThreads, kBlocks) gather_kernel(const MergeArgs a, const Tiling t) {
  using A = typename Arithmetic<M>::A;
  using Q = Pack<M, P>;
  const PlanView& p = a.plan;
  for_items<P>(t, p.batch, [&](int64_t b, int64_t token, int64_t first, int64_t step) {
    const int64_t r = p.row[b * p.row_stride + token];
    bool wanted = 0 <= r && r < p.rows;
    A factor = a.scale == nullptr ? A(1) : static_cast<const A*>(a.scale)[b * a.scale_stride + token];
    if (wanted && a.weighting != Weighting::sum) {
      const int64_t* start = p.start + b * p.start_stride;
      const int64_t from = start[r], end = start[r + 1];
      wanted = 0 <= from && from < end && end <= p.tokens;
      if (wanted && a.weighting == Weighting::mean) factor *= A(1) / (A)(end - from);
      if (wanted && a.weighting == Weighting::first) wanted = p.order[b * p.order_stride + from] == token;
    }
    for (int64_t c = first; c < a.depth; c += step) {
      Q out = {};
      if (wanted) {
        out = load_pack<Q>(element<M>(a.in, b, r, c));
        if (factor != A(1)) {
#pragma unroll
          for (int i = 0; i < P; ++i) narrow(factor * widen(out.v[i]), &out.v[i]);
        }
      }
      *reinterpret_cast<Q*>(static_cast<M*>(a.out) + (b * p.tokens + token) * a.depth + c) = out;
    }
  });
}

template <class M, int P>
__global__ void __launch_bounds__(kThreads, kBlocks) push_kernel(const PushArgs a, const Tiling t) {
  using A = typename Arithmetic<M>::A;
  using Q = Pack<M, P>;
  const A alpha = (A)a.alpha, threshold = (A)a.threshold;
  for_items<P>(t, a.batch, [&](int64_t b, int64_t token, int64_t first, int64_t step) {
    const int64_t at = b * a.tokens + token, index = a.index[at];
    const bool moves = static_cast<const A*>(a.similarity)[at] > threshold && 0 <= index && index < a.references;
    for (int64_t c = first; c < a.depth; c += step) {
      Q x = load_pack<Q>(element<M>(a.x, b, token, c));
      if (moves) {
        const Q y = load_pack<Q>(element<M>(a.reference, b, index, c));
#pragma unroll
        for (int i = 0; i < P; ++i) {
          const A v = widen(x.v[i]);
          narrow(v + alpha * (v - widen(y.v[i])), &x.v[i]);
        }
      }
      *reinterpret_cast<Q*>(static_cast<M*>(a.out) + at * a.depth + c) = x;
    }
  });
}

// ---- host ---------------------------------------------------------------------------------------------------------

// Whether rows of `depth` channels begin and end with whole packs, wherever they are.
bool packs(const View& v, int64_t depth) {
  const int64_t size = kPackBytes / item_size(v.dtype);
  return v.stride[2] == 1 && depth % size == 0 && v.stride[0] % size == 0 && v.stride[1] % size == 0 &&
         pack_aligned(static_cast<const char*>(v.ptr));
}

// Calls start(number of the storage type, size of a pack, tiling) where there is something to do.
template <class F>
const char* start_items(DType dtype, bool whole, int64_t batch, int64_t items, int64_t depth, const F& start) {
  if (batch == 0 || items == 0 || depth == 0) return nullptr;
  return message_of(with_storage(dtype, [&](auto number) {
    constexpr int P = Pack<decltype(number)>::kSize;
    if (whole) return start(number, std::integral_constant<int, P>(), tiling_of(items, depth / P));
    return start(number, std::integral_constant<int, 1>(), tiling_of(items, depth));
  }));
}

bool merge_packs(const MergeArgs& a) { return packs(a.in, a.depth) && pack_aligned(static_cast<char*>(a.out)); }

}  // namespace

const char* merge_segments_cuda(const MergeArgs& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return start_items(
      a.dtype, merge_packs(a), a.plan.batch, a.plan.rows, a.depth, [&](auto number, auto size, const Tiling& t) {
        return launch(segments_kernel<decltype(number), size.value>, a.plan.batch * t.tiles, kThreads, on, a, t);
      });
}

const char* merge_amax_cuda(const MergeArgs& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return start_items(
      a.dtype, merge_packs(a), a.plan.batch, a.plan.rows, a.depth, [&](auto number, auto size, const Tiling& t) {
        return launch(amax_kernel<decltype(number), size.value>, a.plan.batch * t.tiles, kThreads, on, a, t);
      });
}

const char* merge_gather_cuda(const MergeArgs& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return start_items(
      a.dtype, merge_packs(a), a.plan.batch, a.plan.tokens, a.depth, [&](auto number, auto size, const Tiling& t) {
        return launch(gather_kernel<decltype(number), size.value>, a.plan.batch * t.tiles, kThreads, on, a, t);
      });
}

const char* push_tokens_cuda(const PushArgs& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const bool whole = packs(a.x, a.depth) && packs(a.reference, a.depth) && pack_aligned(static_cast<char*>(a.out));
  return start_items(a.dtype, whole, a.batch, a.tokens, a.depth, [&](auto number, auto size, const Tiling& t) {
    return launch(push_kernel<decltype(number), size.value>, a.batch * t.tiles, kThreads, on, a, t);
  });
}

}  // namespace transfuse
