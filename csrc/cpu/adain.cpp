// adain on the CPU, at one ISA level: moments of the planes, then one pass of writing (see adain.h for the algebra).
//
// A *slab* is what one task works on: one plane, read along the reduced axes, or, where the fastest axis of memory is
// one that remains (channels_last), up to 1024 neighbouring planes at once, read row by row. Long slabs are cut in
// segments, at places that depend on the shape alone, so that results do not depend on the number of threads.
// Short slabs are written while they are hot in the cache; long ones in groups that fit the last level.
//
// Moments of a chunk that fits the first-level cache are taken about a sample of it, so that the sums hardly cancel,
// and chunks are merged in double. So a large mean or an outlier costs no digits, and a constant plane has a deviation
// of exactly 0.
#include <algorithm>
#include <vector>

#include "transfuse/adain.h"
#include "transfuse/adain_layout.h"
#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kChunk = 2048;         // elements of a plane per chunk
constexpr int64_t kRows = 32;            // rows of a multi-plane slab per chunk
constexpr int64_t kMaxWidth = 1024;      // planes of a slab
constexpr int64_t kMinWidth = 8;         // fewer neighbouring planes are gathered one by one
constexpr int64_t kSegment = 65536;      // elements of a slab per segment
constexpr int64_t kGroup = 8 << 20;      // bytes of input between its two passes
constexpr int64_t kTask = 16384;         // elements below which slabs share a task
constexpr int64_t kSerial = 32768;       // elements below which waking other threads does not pay
constexpr int64_t kStreaming = 4 << 20;  // bytes of output above which it bypasses the cache

struct Group : AdainLayout {
  int64_t segment = 0, segments = 1;  // rows per segment
  bool stream = false;
};
using Slab = AdainSlab;
using Operand = AdainOperand;

// An array of one element without a heap, or of a slab's width.
template <class X>
class PerPlane {
 public:
  explicit PerPlane(int64_t width) : many_(width > 1 ? (size_t)width : 0), at_(width > 1 ? many_.data() : &one_) {}
  PerPlane(const PerPlane&) = delete;
  operator X*() { return at_; }

 private:
  X one_;
  std::vector<X> many_;
  X* at_;
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Group describe(const AdainArgs& args, bool content, AdainDirection direction) {
  Group g;
  static_cast<AdainLayout&>(g) = adain_layout(args, content, direction, kMinWidth, kMaxWidth);
  const int64_t unit = g.columns > 1 ? kRows : kChunk;
  g.segment = std::max(unit, kSegment / g.width / unit * unit);
  g.segments = (g.rows + g.segment - 1) / g.segment;
  g.stream = g.planes * g.rows * item_size(g.dtype) >= kStreaming;
  return g;
}

template <class T>
constexpr DType kDirect = sizeof(T) == 8 ? DType::f64 : DType::f32;

// Contiguous numbers, and where the memory that will probably be read next begins. Arithmetic on a chunk that is in
// the cache would leave the memory idle, so it is asked for the next one meanwhile. An address that is not there does
// no harm: it is only ever prefetched.
template <class T>
struct Span {
  const T* p;
  const char* next;
};

TRANSFUSE_INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// Rows [r, r + n) of a plane as contiguous numbers: in place where they are that already, else in `buffer`.
template <class T>
Span<T> fetch(const Group& g, const Operand& o, int64_t base, int64_t r, int64_t n, T* buffer) {
  int64_t offset = base;
  for (int64_t done = 0; done < n;) {
    int64_t run;
    offset = base + adain_row(o, r + done, &run);
    const int64_t take = std::min(run, n - done), stride = o.axes[o.axis_count - 1].stride;
    const char* next = o.ptr + (offset + take) * item_size(g.dtype);
    if (take == n && stride == 1 && g.dtype == kDirect<T>) return {reinterpret_cast<const T*>(o.ptr) + offset, next};
    load_row(o.ptr, g.dtype, offset, stride, take, buffer + done);
    if (take == n) return {buffer, stride == 1 ? next : o.ptr};
    done += take;
  }
  return {buffer, o.ptr};
}

// ---- moments ---------------------------------------------------------------------------------------------------

template <class T>
TRANSFUSE_INLINE typename Simd<T>::V load_part(const T* p, int64_t n, T fill) {
  typename Simd<T>::V v = splat<T>(fill);
  std::memcpy(&v, p, (size_t)n * sizeof(T));
  return v;
}

// Mean of up to 16 vectors spread over p[0..n). A power of two of equal numbers is summed exactly, in pairs.
template <class T>
T sample_mean(const T* p, int64_t n) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  if (n < W) {
    T part[W];
    int64_t count = 1;
    while (2 * count <= n) count *= 2;
    for (int64_t i = 0; i < count; ++i) part[i] = p[i];
    for (int64_t half = count / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0] / (T)count;
  }
  int64_t samples = 16;
  while (samples > n / W) samples /= 2;
  const int64_t step = n / samples;
  V sum[16];
  for (int64_t i = 0; i < samples; ++i) sum[i] = load<V>(p + i * step);
  for (int64_t half = samples / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  return horizontal_sum<T>(sum[0]) / (T)(samples * W);
}

constexpr int pairs_of(int tensors) { return tensors == 1 ? 1 : tensors == 2 ? 2 : 4; }

template <class T, int N>
void chunk_moments(const Span<T>* spans, int64_t n, int64_t item, AdainMoments* m) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W, U = N == 1 ? 4 : 2, P = pairs_of(N);
  const T* p[N];
  for (int k = 0; k < N; ++k) p[k] = spans[k].p;
  double rests[N];
  T pivot[N];
  for (int k = 0; k < N; ++k) pivot[k] = sample_mean(p[k], n);
  V rest[N][U], second[P][U];
  const auto add = [&](int u, const V* d) {
    for (int k = 0; k < N; ++k) rest[k][u] += d[k];
    second[0][u] += d[0] * d[0];
    if constexpr (N > 1) second[1][u] += d[0] * d[1];
    if constexpr (N > 2) {
      second[2][u] += d[0] * d[2];
      second[3][u] += d[1] * d[2];
    }
  };
  const auto fold = [](V* v) {
    for (int u = 1; u < U; ++u) v[0] += v[u];
    return (double)horizontal_sum<T>(v[0]);
  };
  const double count = (double)n;
  double squares;
  for (int attempt = 0;; ++attempt) {
    for (int u = 0; u < U; ++u) {
      for (int k = 0; k < N; ++k) rest[k][u] = V{};
      for (int q = 0; q < P; ++q) second[q][u] = V{};
    }
    int64_t i = 0;
    for (; i + U * W <= n; i += U * W) {
      for (int k = 0; k < N; ++k)
        for (int b = 0; b < U * W * (int)sizeof(T); b += 64) prefetch(spans[k].next + i * item + b);
      for (int u = 0; u < U; ++u) {
        V d[N];
        for (int k = 0; k < N; ++k) d[k] = load<V>(p[k] + i + u * W) - splat<T>(pivot[k]);
        add(u, d);
      }
    }
    for (; i < n; i += W) {
      V d[N];
      for (int k = 0; k < N; ++k)
        d[k] = (i + W <= n ? load<V>(p[k] + i) : load_part<T>(p[k] + i, n - i, pivot[k])) - splat<T>(pivot[k]);
      add(0, d);
    }
    squares = fold(second[0]);
    for (int k = 0; k < N; ++k) rests[k] = fold(rest[k]);
    // More than half of the squares were the pivot's distance from the mean: once more, about the mean.
    if (attempt == 1 || !(rests[0] * rests[0] > 0.5 * count * squares)) break;
    for (int k = 0; k < N; ++k) pivot[k] += (T)(rests[k] / count);
  }
  for (int k = 0; k < N; ++k) m->mean[k] = (double)pivot[k] + rests[k] / count;
  m->count = count;
  m->second[0] = std::max(squares - rests[0] * rests[0] / count, 0.0);  // in this order NaN stays
  if constexpr (N > 1) m->second[1] = fold(second[1]) - rests[0] * rests[1] / count;
  if constexpr (N > 2) {
    m->second[2] = fold(second[2]) - rests[0] * rests[2] / count;
    m->second[3] = fold(second[3]) - rests[1] * rests[2] / count;
  }
}

template <class T, int N>
void plane_moments(const Group& g, const Slab& s, int64_t begin, int64_t end, AdainMoments* m) {
  T* buffer = static_cast<T*>(thread_scratch(sizeof(T) * N * kChunk));
  *m = AdainMoments{};
  for (int64_t r = begin; r < end; r += kChunk) {
    const int64_t n = std::min(kChunk, end - r);
    Span<T> spans[N];
    for (int k = 0; k < N; ++k) spans[k] = fetch(g, g.in[k], s.in[k], r, n, buffer + k * kChunk);
    AdainMoments part;
    chunk_moments<T, N>(spans, n, item_size(g.dtype), &part);
    adain_merge(N, part, m);
  }
}

// Running moments of neighbouring planes, one array per moment.
template <int N>
struct Running {
  double* mean[N];
  double* second[pairs_of(N)];
};

// U vectors of planes over up to kRows rows, merged into the running moments of `count` rows before them. `lanes` of
// the planes exist, all of them unless U is 1.
template <class T, int N, int U, bool Part>
TRANSFUSE_INLINE void column_moments(const T* const (*p)[kRows], int64_t rows, int64_t at, int64_t lanes, double count,
                                     const Running<N>& m) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W, P = pairs_of(N);
  const auto read = [&](int k, int u, int64_t r) {
    if constexpr (Part) return load_part<T>(p[k][r] + at, lanes, T(0));
    return load<V>(p[k][r] + at + u * W);
  };
  V centre[N][U], rest[N][U], second[P][U];
  const int64_t samples = rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
  for (int k = 0; k < N; ++k) {
    for (int u = 0; u < U; ++u) {
      // Mean of up to eight rows, summed in pairs: exact if all are equal.
      V sample[8];
      for (int64_t i = 0; i < samples; ++i) sample[i] = read(k, u, i * rows / samples);
      for (int64_t half = samples / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) sample[i] += sample[i + half];
      centre[k][u] = sample[0] * splat<T>(T(1) / (T)samples);
      rest[k][u] = V{};
    }
  }
  for (int q = 0; q < P; ++q)
    for (int u = 0; u < U; ++u) second[q][u] = V{};
  for (int64_t r = 0; r < rows; ++r)
    for (int u = 0; u < U; ++u) {
      V d[N];
      for (int k = 0; k < N; ++k) {
        d[k] = read(k, u, r) - centre[k][u];
        rest[k][u] += d[k];
      }
      second[0][u] += d[0] * d[0];
      if constexpr (N > 1) second[1][u] += d[0] * d[1];
      if constexpr (N > 2) {
        second[2][u] += d[0] * d[2];
        second[3][u] += d[1] * d[2];
      }
    }
  T centres[N][U * W], rests[N][U * W], seconds[P][U * W];
  for (int u = 0; u < U; ++u) {
    for (int k = 0; k < N; ++k) {
      store(centres[k] + u * W, centre[k][u]);
      store(rests[k] + u * W, rest[k][u]);
    }
    for (int q = 0; q < P; ++q) store(seconds[q] + u * W, second[q][u]);
  }
  const double n = (double)rows, inverse = 1.0 / n, part = n / (count + n), cross = count * part;
  const int64_t live = Part ? lanes : U * W;
  for (int64_t i = 0; i < live; ++i) {
    double e[N], gap[N];
    for (int k = 0; k < N; ++k) {
      e[k] = (double)rests[k][i];
      double& mean = m.mean[k][at + i];
      gap[k] = (double)centres[k][i] + e[k] * inverse - mean;
      mean += gap[k] * part;
    }
    m.second[0][at + i] += (double)seconds[0][i] - e[0] * e[0] * inverse + gap[0] * gap[0] * cross;
    if constexpr (N > 1) m.second[1][at + i] += (double)seconds[1][i] - e[0] * e[1] * inverse + gap[0] * gap[1] * cross;
    if constexpr (N > 2) {
      m.second[2][at + i] += (double)seconds[2][i] - e[0] * e[2] * inverse + gap[0] * gap[2] * cross;
      m.second[3][at + i] += (double)seconds[3][i] - e[1] * e[2] * inverse + gap[1] * gap[2] * cross;
    }
  }
}

// Row r of a multi-plane slab as contiguous numbers.
template <class T>
const T* fetch_columns(const Group& g, const Operand& o, int64_t base, int64_t width, int64_t r, T* buffer) {
  int64_t run;
  const int64_t offset = base + adain_row(o, r, &run);
  if (o.column_stride == 1 && g.dtype == kDirect<T>) return reinterpret_cast<const T*>(o.ptr) + offset;
  load_row(o.ptr, g.dtype, offset, o.column_stride, width, buffer);
  return buffer;
}

template <class T, int N>
void slab_moments(const Group& g, const Slab& s, int64_t begin, int64_t end, AdainMoments* out) {
  if (g.columns == 1) {
    plane_moments<T, N>(g, s, begin, end, out);
    return;
  }
  constexpr int W = Simd<T>::W, U = N == 1 && kVectorBytes < 64 ? 2 : 1, P = pairs_of(N);
  const int64_t width = s.width, pitch = round_up(width, 16);
  const size_t running = sizeof(double) * (N + P) * (size_t)pitch;
  double* memory = static_cast<double*>(thread_scratch(running + sizeof(T) * N * kRows * (size_t)pitch));
  T* buffer = reinterpret_cast<T*>(memory + (N + P) * pitch);
  std::memset(memory, 0, running);
  Running<N> m;
  for (int k = 0; k < N; ++k) m.mean[k] = memory + k * pitch;
  for (int q = 0; q < P; ++q) m.second[q] = memory + (N + q) * pitch;
  for (int64_t r = begin; r < end; r += kRows) {
    const int64_t rows = std::min(kRows, end - r);
    const T* p[N][kRows];
    for (int k = 0; k < N; ++k)
      for (int64_t i = 0; i < rows; ++i)
        p[k][i] = fetch_columns(g, g.in[k], s.in[k], width, r + i, buffer + (k * kRows + i) * pitch);
    // Rows are read side by side, which hides their order from the processor: the next ones are asked for here.
    const char* next[N][kRows];
    const int64_t coming = std::min(kRows, end - r - rows), item = item_size(g.dtype);
    for (int k = 0; k < N; ++k)
      for (int64_t i = 0; i < coming; ++i) {
        int64_t run;
        next[k][i] = g.in[k].ptr + (s.in[k] + adain_row(g.in[k], r + rows + i, &run)) * item;
      }
    const double count = (double)(r - begin);
    int64_t at = 0;
    for (; at + U * W <= width; at += U * W) {
      if (at * item % 64 == 0)
        for (int k = 0; k < N; ++k)
          for (int64_t i = 0; i < coming; ++i) prefetch(next[k][i] + at * item);
      column_moments<T, N, U, false>(p, rows, at, U * W, count, m);
    }
    for (; at + W <= width; at += W) column_moments<T, N, 1, false>(p, rows, at, W, count, m);
    if (at < width) column_moments<T, N, 1, true>(p, rows, at, width - at, count, m);
  }
  for (int64_t c = 0; c < width; ++c) {
    out[c].count = (double)(end - begin);
    for (int k = 0; k < N; ++k) out[c].mean[k] = m.mean[k][c];
    for (int q = 0; q < P; ++q) out[c].second[q] = m.second[q][c];
    out[c].second[0] = std::max(out[c].second[0], 0.0);
  }
}

// ---- writing ---------------------------------------------------------------------------------------------------

// What writing needs of one plane: result = sum_k factor_k (t_k - centre_k) + offset, in the arithmetic type.
template <class T, int N>
struct Line {
  T factor[N], centre[N], offset;
  void set(const AdainCoefficients& c, const AdainMoments& m) {
    double exact = c.offset;
    for (int k = 0; k < N; ++k) {
      factor[k] = (T)c.factor[k];
      centre[k] = (T)m.mean[k];
      // What the rounding of the mean takes away is given back here.
      exact -= c.factor[k] * (m.mean[k] - (double)centre[k]);
    }
    offset = (T)exact;
  }
};

template <class T, int N>
void write_plane_chunk(const Span<T>* spans, int64_t n, int64_t item, const Line<T, N>& line, T* dst, bool stream) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  const T* p[N];
  for (int k = 0; k < N; ++k) p[k] = spans[k].p;
  const auto value = [&](int64_t i) {
    T v = line.offset;
    for (int k = 0; k < N; ++k) v += line.factor[k] * (p[k][i] - line.centre[k]);
    return v;
  };
  const auto vector = [&](int64_t i) {
    V v = splat<T>(line.offset);
    for (int k = 0; k < N; ++k) v += splat<T>(line.factor[k]) * (load<V>(p[k] + i) - splat<T>(line.centre[k]));
    return v;
  };
  const auto ahead = [&](int64_t i) {
    for (int k = 0; k < N; ++k) prefetch(spans[k].next + i * item);
  };
  int64_t i = 0;
  if (stream) {
    for (; i < n && reinterpret_cast<uintptr_t>(dst + i) % sizeof(V) != 0; ++i) dst[i] = value(i);
    for (; i + W <= n; i += W) {
      ahead(i);
      store_past_cache(dst + i, vector(i));
    }
  }
  for (; i + W <= n; i += W) {
    ahead(i);
    store(dst + i, vector(i));
  }
  for (; i < n; ++i) dst[i] = value(i);
}

template <class T, int N>
void write_plane(const Group& g, const Slab& s, int64_t begin, int64_t end, const AdainCoefficients& c,
                 const AdainMoments& m) {
  T* buffer = static_cast<T*>(thread_scratch(sizeof(T) * (N + 1) * kChunk));
  Line<T, N> line;
  line.set(c, m);
  const int64_t out_stride = g.out.axes[g.out.axis_count - 1].stride, item = item_size(g.dtype);
  const bool direct = g.dtype == kDirect<T> && out_stride == 1;
  for (int64_t r = begin; r < end;) {
    int64_t run;
    const int64_t offset = s.out + adain_row(g.out, r, &run);
    const int64_t n = std::min(std::min(kChunk, end - r), run);
    Span<T> spans[N];
    for (int k = 0; k < N; ++k) spans[k] = fetch(g, g.in[k], s.in[k], r, n, buffer + k * kChunk);
    if (direct) {
      write_plane_chunk<T, N>(spans, n, item, line, reinterpret_cast<T*>(g.out.ptr) + offset, g.stream);
    } else {
      T* row = buffer + N * kChunk;
      write_plane_chunk<T, N>(spans, n, item, line, row, false);
      store_row(g.out.ptr, g.dtype, offset, out_stride, n, row);
    }
    r += n;
  }
}

template <class T, int N>
void write_row(const T* const* p, int64_t n, const T* const* factor, const T* const* centre, const T* offset, T* dst,
               bool stream) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  const auto value = [&](int64_t i) {
    T v = offset[i];
    for (int k = 0; k < N; ++k) v += factor[k][i] * (p[k][i] - centre[k][i]);
    return v;
  };
  const auto vector = [&](int64_t i) {
    V v = load<V>(offset + i);
    for (int k = 0; k < N; ++k) v += load<V>(factor[k] + i) * (load<V>(p[k] + i) - load<V>(centre[k] + i));
    return v;
  };
  int64_t i = 0;
  if (stream) {
    for (; i < n && reinterpret_cast<uintptr_t>(dst + i) % sizeof(V) != 0; ++i) dst[i] = value(i);
    for (; i + W <= n; i += W) store_past_cache(dst + i, vector(i));
  }
  for (; i + W <= n; i += W) store(dst + i, vector(i));
  for (; i < n; ++i) dst[i] = value(i);
}

template <class T, int N>
void slab_write(const Group& g, const Slab& s, int64_t begin, int64_t end, const AdainCoefficients* c,
                const AdainMoments* m) {
  if (g.columns == 1) {
    write_plane<T, N>(g, s, begin, end, c[0], m[0]);
    if (g.stream) finish_streaming();
    return;
  }
  const int64_t width = s.width, pitch = round_up(width, 16);
  T* memory = static_cast<T*>(thread_scratch(sizeof(T) * (3 * N + 2) * (size_t)pitch));
  T *factor[N], *centre[N], *rows[N];
  for (int k = 0; k < N; ++k) {
    factor[k] = memory + (3 * k) * pitch;
    centre[k] = memory + (3 * k + 1) * pitch;
    rows[k] = memory + (3 * k + 2) * pitch;
  }
  T* offset = memory + 3 * N * pitch;
  T* result = offset + pitch;
  for (int64_t i = 0; i < width; ++i) {
    Line<T, N> line;
    line.set(c[i], m[i]);
    offset[i] = line.offset;
    for (int k = 0; k < N; ++k) {
      factor[k][i] = line.factor[k];
      centre[k][i] = line.centre[k];
    }
  }
  const bool direct = g.dtype == kDirect<T> && g.out.column_stride == 1;
  for (int64_t r = begin; r < end; ++r) {
    const T* p[N];
    for (int k = 0; k < N; ++k) p[k] = fetch_columns(g, g.in[k], s.in[k], width, r, rows[k]);
    int64_t run;
    const int64_t at = s.out + adain_row(g.out, r, &run);
    T* dst = direct ? reinterpret_cast<T*>(g.out.ptr) + at : result;
    write_row<T, N>(p, width, factor, centre, offset, dst, direct && g.stream);
    if (!direct) store_row(g.out.ptr, g.dtype, at, g.out.column_stride, width, result);
  }
  if (direct && g.stream) finish_streaming();
}

// ---- schedule --------------------------------------------------------------------------------------------------

struct Run {
  const AdainArgs& args;
  AdainDirection direction;
  const Parallel& parallel;
};

template <class F>
void each(const Run& run, const Group& g, int64_t count, int64_t elements, const F& body) {
  const int64_t grain = std::max<int64_t>(1, kTask / std::max<int64_t>(1, elements));
  const Parallel serial = serial_parallel();
  const bool small = g.planes * g.rows * g.inputs < kSerial;
  for_each_task(small ? serial : run.parallel, (count + grain - 1) / grain, [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * grain);
    for (int64_t i = task * grain; i < end; ++i) body(i);
  });
}

// Moments of all planes, by index.
template <class T, int N>
void all_moments(const Run& run, const Group& g, AdainMoments* out) {
  if (g.segments == 1) {
    each(run, g, g.slabs, g.width * g.rows, [&](int64_t i) {
      const Slab s = adain_slab(g, i);
      PerPlane<AdainMoments> m(s.width);
      slab_moments<T, N>(g, s, 0, g.rows, m);
      for (int64_t c = 0; c < s.width; ++c) out[s.index + c * g.column_index_step] = m[c];
    });
    return;
  }
  std::vector<AdainMoments> parts((size_t)(g.slabs * g.segments * g.width));
  each(run, g, g.slabs * g.segments, g.width * g.segment, [&](int64_t i) {
    const int64_t begin = i % g.segments * g.segment;
    slab_moments<T, N>(g, adain_slab(g, i / g.segments), begin, std::min(g.rows, begin + g.segment),
                       &parts[i * g.width]);
  });
  each(run, g, g.slabs, g.width * g.segments, [&](int64_t i) {
    const Slab s = adain_slab(g, i);
    for (int64_t c = 0; c < s.width; ++c) {
      AdainMoments m;
      for (int64_t part = 0; part < g.segments; ++part)
        adain_merge(N, parts[(i * g.segments + part) * g.width + c], &m);
      out[s.index + c * g.column_index_step] = m;
    }
  });
}

// Content: moments, then the result. `shares`, if wanted, gets one entry per plane.
template <class T, int N>
void content_pass(const Run& run, const Group& g, const AdainMoments* style, AdainShare* shares) {
  const auto rule = [&](const Slab& s, const AdainMoments* m, AdainCoefficients* c) {
    for (int64_t i = 0; i < s.width; ++i) {
      c[i] = AdainCoefficients{};
      AdainShare share;
      adain_content_rule(run.direction, run.args.eps, m[i], style[s.style + i * g.column_style_step], &c[i], &share);
      if (shares != nullptr) shares[s.index + i * g.column_index_step] = share;
    }
  };
  const bool write = g.out.ptr != nullptr;
  if (g.segments == 1) {
    each(run, g, g.slabs, g.width * g.rows, [&](int64_t i) {
      const Slab s = adain_slab(g, i);
      PerPlane<AdainMoments> m(s.width);
      PerPlane<AdainCoefficients> c(s.width);
      slab_moments<T, N>(g, s, 0, g.rows, m);
      rule(s, m, c);
      if (write) slab_write<T, N>(g, s, 0, g.rows, c, m);
    });
    return;
  }
  // A few slabs at a time, so that their second reading comes from the last-level cache.
  const int64_t bytes = g.width * g.rows * item_size(g.dtype) * N;
  const int64_t group = std::min(g.slabs, std::max<int64_t>(1, kGroup / bytes));
  std::vector<AdainMoments> parts((size_t)(group * g.segments * g.width)), moments((size_t)(group * g.width));
  std::vector<AdainCoefficients> coefficients((size_t)(group * g.width));
  for (int64_t first = 0; first < g.slabs; first += group) {
    const int64_t count = std::min(group, g.slabs - first);
    each(run, g, count * g.segments, g.width * g.segment, [&](int64_t i) {
      const int64_t begin = i % g.segments * g.segment;
      slab_moments<T, N>(g, adain_slab(g, first + i / g.segments), begin, std::min(g.rows, begin + g.segment),
                         &parts[i * g.width]);
    });
    each(run, g, count, g.width * g.segments, [&](int64_t i) {
      const Slab s = adain_slab(g, first + i);
      AdainMoments* m = &moments[i * g.width];
      for (int64_t c = 0; c < s.width; ++c) {
        m[c] = AdainMoments{};
        for (int64_t part = 0; part < g.segments; ++part)
          adain_merge(N, parts[(i * g.segments + part) * g.width + c], &m[c]);
      }
      rule(s, m, &coefficients[i * g.width]);
    });
    if (!write) continue;
    each(run, g, count * g.segments, g.width * g.segment, [&](int64_t i) {
      const int64_t slab = i / g.segments, begin = i % g.segments * g.segment;
      slab_write<T, N>(g, adain_slab(g, first + slab), begin, std::min(g.rows, begin + g.segment),
                       &coefficients[slab * g.width], &moments[slab * g.width]);
    });
  }
}

template <class T, int N>
void style_pass(const Run& run, const Group& g, const AdainMoments* moments, const AdainShare* shares) {
  each(run, g, g.slabs * g.segments, g.width * std::min(g.rows, g.segment), [&](int64_t i) {
    const Slab s = adain_slab(g, i / g.segments);
    const int64_t begin = i % g.segments * g.segment;
    PerPlane<AdainMoments> m(s.width);
    PerPlane<AdainCoefficients> c(s.width);
    for (int64_t k = 0; k < s.width; ++k) {
      const int64_t index = s.index + k * g.column_index_step;
      m[k] = moments[index];
      c[k] = AdainCoefficients{};
      adain_style_rule(run.direction, m[k], shares[index], &c[k]);
    }
    slab_write<T, N>(g, s, begin, std::min(g.rows, begin + g.segment), c, m);
  });
}

// Sums the shares of content planes by the style plane they use, in the order of their index.
void gather_shares(const Group& content, const std::vector<AdainShare>& shares, std::vector<AdainShare>* out) {
  for (int64_t i = 0; i < content.slabs; ++i) {
    const Slab s = adain_slab(content, i);
    for (int64_t c = 0; c < s.width; ++c) {
      const AdainShare& from = shares[s.index + c * content.column_index_step];
      AdainShare& to = (*out)[s.style + c * content.column_style_step];
      to.mean += from.mean;
      to.std += from.std;
      to.std_tangent += from.std_tangent;
    }
  }
}

template <class T, int NX, int NY>
void run_direction(const Run& run) {
  const Group content = describe(run.args, true, run.direction), style = describe(run.args, false, run.direction);
  std::vector<AdainMoments> moments((size_t)style.planes);
  all_moments<T, NY>(run, style, moments.data());
  const bool wants_style = run.args.style_out.ptr != nullptr;
  std::vector<AdainShare> shares(wants_style ? (size_t)content.planes : 0);
  content_pass<T, NX>(run, content, moments.data(), wants_style ? shares.data() : nullptr);
  if (!wants_style) return;
  std::vector<AdainShare> gathered((size_t)style.planes);
  gather_shares(content, shares, &gathered);
  style_pass<T, NY>(run, style, moments.data(), gathered.data());
}

template <class T>
void run_typed(const Run& run) {
  switch (run.direction) {
    case AdainDirection::forward: run_direction<T, 1, 1>(run); return;
    case AdainDirection::backward: run_direction<T, 2, 1>(run); return;
    case AdainDirection::jvp: run_direction<T, 2, 2>(run); return;
    case AdainDirection::jvp_backward: run_direction<T, 3, 2>(run); return;
  }
}

void adain_run(AdainDirection direction, const AdainArgs& args, const Parallel& parallel) {
  const Run run{args, direction, parallel};
  if (args.dtype == DType::f64)
    run_typed<double>(run);
  else
    run_typed<float>(run);
}

}  // namespace

extern const AdainKernels kAdain;
const AdainKernels kAdain = {adain_run};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
