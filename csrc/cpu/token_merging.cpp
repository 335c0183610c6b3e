// Token merging on the CPU, at one ISA level: plans, segment sums, gathers (see token_merging.h).
#include <algorithm>
#include <atomic>
#include <vector>

#include "token_nearest.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kTaskBytes = 1 << 16;  // of output, per task
constexpr int64_t kSerial = 32768;       // elements below which waking other threads does not pay
constexpr int64_t kStreaming = 8 << 20;  // bytes of output above which it bypasses the cache

// Runs body(batch, first, last) over `items` of each batch entry, with `row` elements of work per item.
template <class F>
void for_each_run(const Parallel& parallel, int64_t batch, int64_t items, int64_t row, int64_t item_bytes,
                  const F& body) {
  if (batch == 0 || items == 0) return;
  const int64_t bytes = std::max<int64_t>(1, row * item_bytes);
  const int64_t run = std::max<int64_t>(1, std::min(items, kTaskBytes / bytes));
  const int64_t runs = (items + run - 1) / run;
  const Parallel used = batch * items * row < kSerial ? serial_parallel() : parallel;
  for_each_task(used, batch * runs, [&](int64_t task) {
    const int64_t first = task % runs * run;
    body(task / runs, first, std::min(items, first + run));
  });
}

// ---- plans -----------------------------------------------------------------------------------------------------

template <class A>
struct Candidate {
  A similarity;
  int64_t source;
};

// The tokens of a call by role, the same in every batch entry.
struct Roles {
  std::vector<int64_t> sources, kept_sources, destinations, protects;  // kept_sources: those that may be merged
  std::vector<uint8_t> column_allowed;

  explicit Roles(const MatchArgs& a) : destinations(a.destination, a.destination + a.destinations) {
    enum : uint8_t { plain = 0, destination = 1, kept = 2 };
    std::vector<uint8_t> role((size_t)a.tokens, plain);
    for (const int64_t d : destinations) role[(size_t)d] |= destination;
    for (int64_t i = 0; i < a.protects; ++i) role[(size_t)a.protect[i]] |= kept;
    protects.assign(a.protect, a.protect + a.protects);
    for (int64_t t = 0; t < a.tokens; ++t)
      if (role[(size_t)t] == plain) sources.push_back(t);
    for (const int64_t d : destinations) column_allowed.push_back((role[(size_t)d] & kept) == 0);
  }
};

// Rows in this order: protected tokens, sources that stay, destinations; each ascending.
template <class A>
void build_plan(const MatchArgs& a, const Roles& roles, const A* similarity, const int64_t* nearest, int64_t* row,
                int64_t* order, int64_t* start) {
  const int64_t count = (int64_t)roles.sources.size(), rows = a.tokens - a.merged;
  std::vector<Candidate<A>> candidates((size_t)count);
  for (int64_t s = 0; s < count; ++s) {
    // A NaN is merged last.
    const A value = similarity[s] == similarity[s] ? similarity[s] : negative_infinity<A>();
    candidates[(size_t)s] = {value, s};
  }
  if (a.merged < count)
    std::nth_element(candidates.begin(), candidates.begin() + a.merged, candidates.end(),
                     [](const Candidate<A>& x, const Candidate<A>& y) {
                       return x.similarity > y.similarity || (x.similarity == y.similarity && x.source < y.source);
                     });
  std::vector<uint8_t> merged((size_t)count, 0);
  for (int64_t i = 0; i < a.merged; ++i) merged[(size_t)candidates[(size_t)i].source] = 1;

  std::vector<int64_t> size((size_t)rows, 1), first((size_t)rows);
  int64_t next = 0;
  const auto place = [&](int64_t token) {
    row[token] = next;
    first[(size_t)next++] = token;
  };
  for (const int64_t t : roles.protects) place(t);
  for (int64_t s = 0; s < count; ++s)
    if (!merged[(size_t)s]) place(roles.sources[(size_t)s]);
  for (size_t d = 0; d < roles.destinations.size(); ++d)
    if (roles.column_allowed[d]) place(roles.destinations[d]);
  for (int64_t s = 0; s < count; ++s) {
    if (!merged[(size_t)s]) continue;
    const int64_t r = row[roles.destinations[(size_t)nearest[s]]];
    row[roles.sources[(size_t)s]] = r;
    ++size[(size_t)r];
  }
  start[0] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    start[r + 1] = start[r] + size[(size_t)r];
    order[start[r]] = first[(size_t)r];
    size[(size_t)r] = start[r] + 1;  // from here on: where the next token of the row goes
  }
  for (int64_t s = 0; s < count; ++s)
    if (merged[(size_t)s]) order[size[(size_t)row[roles.sources[(size_t)s]]]++] = roles.sources[(size_t)s];
}

template <class A>
void match_with(const MatchArgs& a, const Parallel& parallel) {
  const Roles roles(a);
  const int64_t count = (int64_t)roles.sources.size();
  std::vector<A> similarity((size_t)(a.batch * count));
  std::vector<int64_t> nearest((size_t)(a.batch * count));
  NearestArgs n;
  n.dtype = a.dtype;
  n.batch = a.batch;
  n.rows = count;
  n.columns = a.destinations;
  n.depth = a.depth;
  n.x = n.reference = a.metric;
  n.row_token = roles.sources.data();
  n.column_token = roles.destinations.data();
  if (std::find(roles.column_allowed.begin(), roles.column_allowed.end(), 0) != roles.column_allowed.end()) {
    n.mask = roles.column_allowed.data();
    n.mask_stride[1] = 1;
  }
  n.similarity = similarity.data();
  n.index = nearest.data();
  nearest_tokens(n, parallel);
  const int64_t rows = a.tokens - a.merged;
  for_each_task(parallel, a.batch, [&](int64_t b) {
    build_plan(a, roles, similarity.data() + b * count, nearest.data() + b * count, a.rows + b * a.tokens,
               a.order + b * a.tokens, a.start + b * (rows + 1));
  });
}

void match_tokens(const MatchArgs& args, const Parallel& parallel) {
  if (args.dtype == DType::f64) return match_with<double>(args, parallel);
  match_with<float>(args, parallel);
}

// ---- merging ---------------------------------------------------------------------------------------------------

// sum[0..n) (+)= factor * row `token` of x.
template <class A>
void add_row(const View& x, int64_t b, int64_t token, int64_t n, A factor, bool first, A* buffer, A* sum) {
  const int64_t offset = b * x.stride[0] + token * x.stride[1];
  const A* row = buffer;
  if (x.dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32) && x.stride[2] == 1)
    row = static_cast<const A*>(x.ptr) + offset;
  else
    load_row(x.ptr, x.dtype, offset, x.stride[2], n, buffer);
  if (first) {
    for (int64_t i = 0; i < n; ++i) sum[i] = row[i] * factor;
  } else {
    for (int64_t i = 0; i < n; ++i) sum[i] += row[i] * factor;
  }
}

// Copies bytes, past the cache if asked to (finish_streaming afterwards).
void copy_bytes(const char* from, int64_t bytes, bool stream, char* to) {
  if (!stream) {
    std::memcpy(to, from, (size_t)bytes);
    return;
  }
  int64_t i = (int64_t)(-(uintptr_t)to % kVectorBytes);
  if (i > bytes) i = bytes;
  std::memcpy(to, from, (size_t)i);
  for (; i + 4 * kVectorBytes <= bytes; i += 4 * kVectorBytes)
    for (int k = 0; k < 4; ++k) store_past_cache(to + i + k * kVectorBytes, load<VecF>(from + i + k * kVectorBytes));
  for (; i + kVectorBytes <= bytes; i += kVectorBytes) store_past_cache(to + i, load<VecF>(from + i));
  std::memcpy(to + i, from + i, (size_t)(bytes - i));
}

// A row as it is: the bytes of x where they lie together.
void copy_row(const View& x, int64_t b, int64_t token, int64_t n, bool stream, char* out) {
  const int64_t size = item_size(x.dtype), stride = x.stride[2];
  const char* from = static_cast<const char*>(x.ptr) + (b * x.stride[0] + token * x.stride[1]) * size;
  if (stride == 1) {
    copy_bytes(from, n * size, stream, out);
    return;
  }
  for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * size, from + i * stride * size, (size_t)size);
}

template <class A>
bool segments_with(const MergeArgs& a, const Parallel& parallel) {
  const PlanView& p = a.plan;
  const int64_t item = item_size(a.dtype);
  const bool stream = p.batch * p.rows * a.depth * item >= kStreaming;
  std::atomic<bool> good{true};
  for_each_run(parallel, p.batch, p.rows, a.depth, item, [&](int64_t b, int64_t first, int64_t last) {
    A* sum = static_cast<A*>(thread_scratch((size_t)(2 * a.depth) * sizeof(A)));
    A* buffer = sum + a.depth;
    const int64_t* order = p.order + b * p.order_stride;
    const int64_t* start = p.start + b * p.start_stride;
    const A* scale = a.scale == nullptr ? nullptr : static_cast<const A*>(a.scale) + b * a.scale_stride;
    for (int64_t r = first; r < last; ++r) {
      char* out = static_cast<char*>(a.out) + (b * p.rows + r) * a.depth * item;
      const int64_t from = start[r],
                    end = a.weighting == Weighting::first ? std::min(from + 1, start[r + 1]) : start[r + 1];
      bool inside = 0 <= from && from <= end && end <= p.tokens;
      for (int64_t k = from; inside && k < end; ++k) inside = 0 <= order[k] && order[k] < p.tokens;
      if (!inside || from == end) {
        if (!inside) good = false;
        std::memset(out, 0, (size_t)(a.depth * item));
        continue;
      }
      const bool whole = scale == nullptr || (a.weighting == Weighting::average && scale[order[from]] != A(0));
      if (end - from == 1 && whole) {
        copy_row(a.in, b, order[from], a.depth, stream, out);
        continue;
      }
      A total = A(0);
      for (int64_t k = from; k < end; ++k) {
        const A factor = scale == nullptr ? A(1) : scale[order[k]];
        total += factor;
        add_row(a.in, b, order[k], a.depth, factor, k == from, buffer, sum);
      }
      if (a.weighting == Weighting::mean || a.weighting == Weighting::average) {
        if (a.weighting == Weighting::mean) total = (A)(end - from);
        const A share = total == A(0) ? A(0) : A(1) / total;
        for (int64_t i = 0; i < a.depth; ++i) sum[i] *= share;
      }
      store_row(out, a.dtype, 0, 1, a.depth, sum);
    }
    if (stream) finish_streaming();
  });
  return good;
}

template <class A>
bool amax_with(const MergeArgs& a, const Parallel& parallel) {
  const PlanView& p = a.plan;
  const int64_t item = item_size(a.dtype);
  std::atomic<bool> good{true};
  for_each_run(parallel, p.batch, p.rows, a.depth, item, [&](int64_t b, int64_t first, int64_t last) {
    A* top = static_cast<A*>(thread_scratch((size_t)(2 * a.depth) * sizeof(A)));
    A* row = top + a.depth;
    const int64_t* order = p.order + b * p.order_stride;
    const int64_t* start = p.start + b * p.start_stride;
    for (int64_t r = first; r < last; ++r) {
      char* out = static_cast<char*>(a.out) + (b * p.rows + r) * a.depth * item;
      int64_t* winner = a.winner == nullptr ? nullptr : a.winner + (b * p.rows + r) * a.depth;
      const int64_t from = start[r], end = start[r + 1];
      bool inside = 0 <= from && from < end && end <= p.tokens;  // a maximum of nothing does not exist
      for (int64_t k = from; inside && k < end; ++k) inside = 0 <= order[k] && order[k] < p.tokens;
      if (!inside) {
        good = false;
        std::memset(out, 0, (size_t)(a.depth * item));
        if (winner != nullptr) std::memset(winner, 0, (size_t)a.depth * sizeof(int64_t));
        continue;
      }
      // Ties go to the lowest token, and the first token of a row is not always that: hence the tokens' comparison.
      for (int64_t k = from; k < end; ++k) {
        const int64_t token = order[k];
        load_row(a.in.ptr, a.in.dtype, b * a.in.stride[0] + token * a.in.stride[1], a.in.stride[2], a.depth, row);
        for (int64_t i = 0; i < a.depth; ++i) {
          const bool nan = row[i] != row[i], had = k > from && top[i] != top[i];
          bool wins = k == from || row[i] > top[i] || (nan && !had);
          if (winner != nullptr) {
            if (k > from && (row[i] == top[i] || (nan && had))) wins = token < winner[i];
            if (wins) winner[i] = token;
          }
          if (wins) top[i] = row[i];
        }
      }
      store_row(out, a.dtype, 0, 1, a.depth, top);
    }
  });
  return good;
}

template <class A>
bool gather_with(const MergeArgs& a, const Parallel& parallel) {
  const PlanView& p = a.plan;
  const int64_t item = item_size(a.dtype);
  const bool stream = p.batch * p.tokens * a.depth * item >= kStreaming;
  std::atomic<bool> good{true};
  for_each_run(parallel, p.batch, p.tokens, a.depth, item, [&](int64_t b, int64_t begin, int64_t last) {
    A* row = static_cast<A*>(thread_scratch((size_t)(2 * a.depth) * sizeof(A)));
    A* buffer = row + a.depth;
    const int64_t* rows = p.row + b * p.row_stride;
    const int64_t* order = p.order + b * p.order_stride;
    const int64_t* start = p.start + b * p.start_stride;
    const A* scale = a.scale == nullptr ? nullptr : static_cast<const A*>(a.scale) + b * a.scale_stride;
    for (int64_t i = begin; i < last; ++i) {
      char* out = static_cast<char*>(a.out) + (b * p.tokens + i) * a.depth * item;
      const int64_t r = rows[i];
      bool inside = 0 <= r && r < p.rows, wanted = true;
      A factor = scale == nullptr ? A(1) : scale[i];
      if (inside && a.weighting != Weighting::sum) {
        inside = 0 <= start[r] && start[r] < start[r + 1] && start[r + 1] <= p.tokens;
        if (inside && a.weighting == Weighting::mean) factor *= A(1) / (A)(start[r + 1] - start[r]);
        if (inside && a.weighting == Weighting::first) wanted = order[start[r]] == i;
      }
      if (!inside) good = false;
      if (!inside || !wanted) {
        std::memset(out, 0, (size_t)(a.depth * item));
      } else if (factor == A(1)) {
        copy_row(a.in, b, r, a.depth, stream, out);
      } else {
        add_row(a.in, b, r, a.depth, factor, true, buffer, row);
        store_row(out, a.dtype, 0, 1, a.depth, row);
      }
    }
    if (stream) finish_streaming();
  });
  return good;
}

template <class A>
bool push_with(const PushArgs& a, const Parallel& parallel) {
  const int64_t item = item_size(a.dtype);
  const A alpha = (A)a.alpha, threshold = (A)a.threshold;
  std::atomic<bool> good{true};
  for_each_run(parallel, a.batch, a.tokens, a.depth, item, [&](int64_t b, int64_t first, int64_t last) {
    A* row = static_cast<A*>(thread_scratch((size_t)(2 * a.depth) * sizeof(A)));
    A* other = row + a.depth;
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = b * a.tokens + i, index = a.index[at];
      char* out = static_cast<char*>(a.out) + at * a.depth * item;
      const bool moves = static_cast<const A*>(a.similarity)[at] > threshold;
      if (moves && (index < 0 || index >= a.references)) good = false;
      if (!moves || index < 0 || index >= a.references) {
        copy_row(a.x, b, i, a.depth, false, out);
        continue;
      }
      const View& x = a.x;
      const View& y = a.reference;
      load_row(x.ptr, x.dtype, b * x.stride[0] + i * x.stride[1], x.stride[2], a.depth, row);
      load_row(y.ptr, y.dtype, b * y.stride[0] + index * y.stride[1], y.stride[2], a.depth, other);
      for (int64_t c = 0; c < a.depth; ++c) row[c] += alpha * (row[c] - other[c]);
      store_row(out, a.dtype, 0, 1, a.depth, row);
    }
  });
  return good;
}

bool segments(const MergeArgs& a, const Parallel& p) {
  return a.dtype == DType::f64 ? segments_with<double>(a, p) : segments_with<float>(a, p);
}
bool amax(const MergeArgs& a, const Parallel& p) {
  return a.dtype == DType::f64 ? amax_with<double>(a, p) : amax_with<float>(a, p);
}
bool gather(const MergeArgs& a, const Parallel& p) {
  return a.dtype == DType::f64 ? gather_with<double>(a, p) : gather_with<float>(a, p);
}
bool push(const PushArgs& a, const Parallel& p) {
  return a.dtype == DType::f64 ? push_with<double>(a, p) : push_with<float>(a, p);
}

}  // namespace

extern const TokenMergingKernels kTokenMerging;
const TokenMergingKernels kTokenMerging = {nearest_tokens, match_tokens, segments, amax, gather, push};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
