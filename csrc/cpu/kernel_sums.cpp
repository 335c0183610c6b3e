// Kernel sums and their gradients on the CPU, at one ISA level (see kernel_sums.h).
//
// A task takes a block of rows and a block of columns, tile by tile: a matrix product of centred points (of few
// coordinates, sums of squared differences) gives -D / 2 up to norms, a pass over the tile the kernels and their sums.
// The gradient makes the same tiles again, and from each a matrix of dL / dD, whose products with the points are the
// gradient: dL / dx_i = 2 sum_j E_ij (x_i - y_j).
#include "transfuse/kernel_sums.h"

#include "kernel_pairs.h"
#include "row_products.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kTile = kPairRows * kPairColumns;
constexpr int64_t kSerial = 1 << 18;  // multiplications in all below which waking other threads does not pay

// A tile: rows [i, i + 48), columns [j, j + 96). `both`: it stands for its mirror image too.
struct Tile {
  int64_t i, j;
  bool both;
};

template <class T>
struct Pairs {
  using V = typename Simd<T>::V;
  using P = DotPlain<T>;
  static constexpr int64_t W = Simd<T>::W, kVecs = kPairColumns / W;

  const KernelSumsArgs& a;
  const int64_t group;
  const bool symmetric;
  const PairSchedule schedule;
  PackedPoints<T>* points[kMaxKernelPoints] = {nullptr};
  int64_t rows_padded, columns_padded;
  HeapArray<T> weights, grads;  // (columns), (products, rows), zero where nothing is
  T scale[kMaxKernels];         // log2(e) / (2 h^2) or 1 / h^2
  T slope[kMaxKernels];         // 1 / (2 h^2) or 1 / h^2
  bool plain = true;            // every product is one kernel
  // Of the gradient: what is wanted, and what that takes.
  bool wanted[kMaxKernelDistances] = {false}, moves[kMaxKernels] = {false}, used[kMaxKernels] = {false};
  bool read[kMaxKernelDistances] = {false}, counts[kMaxKernelProducts] = {false};
  int64_t row_sums[kMaxKernelPoints], column_sums[kMaxKernelPoints];  // where in `turned` and `mass`, or -1
  int64_t mass_of_row[kMaxKernelPoints], mass_of_column[kMaxKernelPoints];
  HeapArray<T> turned;                // sum_j E_ij y_j
  HeapArray<double> mass, by_kernel;  // sum_j E_ij; sum E D of (kernel, block of rows)

  static bool all_same(const KernelSumsArgs& a) {
    for (int s = 0; s < a.distances; ++s)
      if (a.row_points[s] != a.column_points[s]) return false;
    return true;
  }

  Pairs(const KernelSumsArgs& args, int64_t g, const Parallel& parallel)
      : a(args),
        group(g),
        symmetric(all_same(args)),
        schedule(args.rows, args.columns, symmetric),
        rows_padded(round_up(args.rows, kPairColumns)),
        columns_padded(round_up(args.columns, kPairColumns)),
        weights(columns_padded),
        grads(args.grads == nullptr ? 0 : args.products * rows_padded),
        turned(backward_sizes(args, false)),
        mass(backward_sizes(args, true)),
        by_kernel(args.grads == nullptr ? 0 : args.kernels * schedule.row_blocks) {
    for (int64_t j = 0; j < columns_padded; ++j)
      weights.data[j] = j >= a.columns ? T(0) : a.weights == nullptr ? T(1) : (T)a.weights[g * a.columns + j];
    // Bounds keep an exponent of zero times it, or of infinity times it, a number.
    const double most = sizeof(T) == 8 ? 1e300 : 1e37;
    for (int f = 0; f < a.kernels; ++f) {
      const double h = a.bandwidths[g * a.kernels + f];
      const double inverse = std::min(most, std::max(1.0 / most, (a.inverse ? 1.0 : 0.5) / h / h));
      slope[f] = (T)inverse;
      scale[f] = (T)(a.inverse ? inverse : std::min(most, inverse * 1.4426950408889634));
      if (!(h == h)) slope[f] = scale[f] = (T)h;
    }
    for (int p = 0; p < a.products; ++p) plain = plain && (a.mask[p] & (a.mask[p] - 1)) == 0;
    pack(parallel);
    if (a.grads != nullptr) prepare();
  }

  ~Pairs() {
    for (PackedPoints<T>* p : points) delete p;
  }

  Pairs(const Pairs&) = delete;
  Pairs& operator=(const Pairs&) = delete;

  // ---- points -------------------------------------------------------------------------------------------------------

  void pack(const Parallel& parallel) {
    // Points that meet in a distance share a centre.
    int part[kMaxKernelPoints];
    for (int p = 0; p < a.points; ++p) part[p] = p;
    for (int s = 0; s < a.distances; ++s) {
      const int from = part[a.column_points[s]], to = part[a.row_points[s]];
      for (int p = 0; p < a.points; ++p)
        if (part[p] == from) part[p] = to;
    }
    for (int c = 0; c < a.points; ++c) {
      const KernelPoints* members[kMaxKernelPoints];
      int count = 0;
      for (int p = 0; p < a.points; ++p)
        if (part[p] == c) members[count++] = &a.point[p];
      if (count == 0) continue;
      HeapArray<double> centre(members[0]->width);
      centre_of(members, count, a.dtype, group, parallel, centre.data);
      for (int p = 0; p < a.points; ++p)
        if (part[p] == c) {
          points[p] = new PackedPoints<T>(a.point[p]);
          for_each_task(parallel, points[p]->padded / kPairColumns,
                        [&](int64_t block) { points[p]->fill(a.point[p], a.dtype, group, centre.data, block); });
        }
    }
  }

  const PackedPoints<T>& row_points(int s) const { return *points[a.row_points[s]]; }
  const PackedPoints<T>& column_points(int s) const { return *points[a.column_points[s]]; }

  // ---- tiles --------------------------------------------------------------------------------------------------------

  // Calls body(entry) for entries of the diagonal of all pairs that lie in the tile.
  template <class F>
  void diagonal(const Tile& t, const F& body) const {
    const int64_t end = std::min({t.i + kPairRows, t.j + kPairColumns, a.rows});
    for (int64_t i = std::max(t.i, t.j); i < end; ++i) body(i, (i - t.i) * kPairColumns + (i - t.j));
  }

  // -D / 2 of points of few coordinates.
  static void differences(int64_t depth, const T* x, int64_t ld, const T* panels, T* to) {
    constexpr int64_t width = kPanelVecs * W;
    for (int64_t i = 0; i < kPairRows; ++i)
      for (int64_t v = 0; v < kPairColumns; v += W) {
        const T* y = panels + v / width * width * depth + v % width;
        V sum{};
        for (int64_t d = 0; d < depth; ++d) {
          const V gap = splat<T>(x[i * ld + d]) - load<V>(y + d * width);
          sum = gap * gap + sum;
        }
        store(to + i * kPairColumns + v, splat<T>(T(-0.5)) * sum);
      }
  }

  // Products x_i y_j; on the diagonal what makes the distance exactly 0, or infinite where that pair is left out.
  void products(int s, const Tile& t, bool leave_out, T* dots) const {
    const PackedPoints<T>&x = row_points(s), &y = column_points(s);
    if (x.narrow())
      differences(x.depth, x.row(t.i), x.ld, y.panel(t.j), dots);
    else
      gemm_panels<P>((int)kPairRows, (int)kVecs, x.depth, x.row(t.i), x.ld, y.panel(t.j), dots, kPairColumns, false);
    if (leave_out)
      diagonal(t, [&](int64_t, int64_t at) { dots[at] = -(T)__builtin_inf(); });
    else if (a.row_points[s] == a.column_points[s])
      diagonal(t, [&](int64_t i, int64_t at) { dots[at] = x.norms.data[i]; });
  }

  // A product, the norm of the row's point and those of the columns': D. NaN stays NaN.
  TRANSFUSE_INLINE V distance(V dot, V row, V column) { return vmax(V{}, (row + column) - (dot + dot)); }
  template <bool kInverse>
  TRANSFUSE_INLINE V kernel(V d, V scale) {
    if (kInverse) return splat<T>(1) / (splat<T>(1) + d * scale);
    return vexp2(-(d * scale));
  }

  template <bool kInverse>
  void kernel_tile(int f, const Tile& t, const T* dots, T* to) const {
    const int s = a.distance_of[f];
    const T *row = row_points(s).norms.data + t.i, *column = column_points(s).norms.data + t.j;
    const V by = splat<T>(scale[f]);
    for (int64_t i = 0; i < kPairRows; ++i) {
      const V norm = splat<T>(row[i]);
      for (int64_t v = 0; v < kPairColumns; v += W) {
        const int64_t at = i * kPairColumns + v;
        store(to + at, kernel<kInverse>(distance(load<V>(dots + at), norm, load<V>(column + v)), by));
      }
    }
    if (a.exclude) diagonal(t, [&](int64_t, int64_t at) { to[at] = T(0); });
  }

  // ---- sums ---------------------------------------------------------------------------------------------------------

  double* sums(int p) const { return a.sums + (group * a.products + p) * a.rows; }

  // Adds the weighted sums of rows, and of columns, of what value(i, v) gives.
  template <bool kBoth, class F>
  TRANSFUSE_INLINE void add_sums(const Pairs& self, int p, const Tile& t, const F& value) {
    const T *w = self.weights.data + t.j, *own = self.weights.data + (kBoth ? t.i : 0);
    T columns[kPairColumns] = {};
    double* to = self.sums(p);
    const int64_t live = std::min(kPairRows, self.a.rows - t.i);
    for (int64_t i = 0; i < live; ++i) {
      V row{};
      const V mine = kBoth ? splat<T>(own[i]) : V{};
      for (int64_t v = 0; v < kPairColumns; v += W) {
        const V k = value(i, v);
        row = k * load<V>(w + v) + row;
        if (kBoth) store(columns + v, k * mine + load<V>(columns + v));
      }
      to[t.i + i] += (double)lane_sum<T>(row);
    }
    if (kBoth)
      for (int64_t j = 0; j < std::min(kPairColumns, self.a.columns - t.j); ++j) to[t.j + j] += (double)columns[j];
  }

  template <bool kInverse, bool kBoth>
  void plain_sums(int p, int f, const Tile& t, const T* dots) const {
    const int s = a.distance_of[f];
    const T *row = row_points(s).norms.data + t.i, *column = column_points(s).norms.data + t.j;
    const V by = splat<T>(scale[f]);
    add_sums<kBoth>(*this, p, t, [=](int64_t i, int64_t v) __attribute__((always_inline)) {
      return kernel<kInverse>(distance(load<V>(dots + i * kPairColumns + v), splat<T>(row[i]), load<V>(column + v)),
                              by);
    });
  }

  template <bool kBoth>
  void product_sums(int p, const Tile& t, const T* kernels) const {
    const T* factors[kMaxKernels];
    int count = 0;
    for (int f = 0; f < a.kernels; ++f)
      if (a.mask[p] >> f & 1) factors[count++] = kernels + f * kTile;
    const T *one = factors[0], *two = factors[count > 1 ? 1 : 0];
    if (count == 1)
      add_sums<kBoth>(*this, p, t, [=](int64_t i, int64_t v) __attribute__((always_inline)) {
        return load<V>(one + i * kPairColumns + v);
      });
    else if (count == 2)
      add_sums<kBoth>(*this, p, t, [=](int64_t i, int64_t v) __attribute__((always_inline)) {
        return load<V>(one + i * kPairColumns + v) * load<V>(two + i * kPairColumns + v);
      });
    else
      add_sums<kBoth>(*this, p, t, [&](int64_t i, int64_t v) __attribute__((always_inline)) {
        V k = load<V>(factors[0] + i * kPairColumns + v);
        for (int f = 1; f < count; ++f) k *= load<V>(factors[f] + i * kPairColumns + v);
        return k;
      });
  }

  template <bool kInverse>
  void forward_tile(const Tile& t, T* dots, T* kernels) const {
    for (int s = 0; s < a.distances; ++s) products(s, t, plain && a.exclude, dots + s * kTile);
    if (!plain)
      for (int f = 0; f < a.kernels; ++f)
        kernel_tile<kInverse>(f, t, dots + a.distance_of[f] * kTile, kernels + f * kTile);
    for (int p = 0; p < a.products; ++p) {
      if (plain) {
        const int f = __builtin_ctz(a.mask[p]);
        const T* of = dots + a.distance_of[f] * kTile;
        t.both ? plain_sums<kInverse, true>(p, f, t, of) : plain_sums<kInverse, false>(p, f, t, of);
      } else {
        t.both ? product_sums<true>(p, t, kernels) : product_sums<false>(p, t, kernels);
      }
    }
  }

  // ---- gradients ----------------------------------------------------------------------------------------------------

  // Numbers in `turned` or in `mass`.
  static int64_t backward_sizes(const KernelSumsArgs& a, bool scalars) {
    if (a.grads == nullptr) return 0;
    int64_t total = 0;
    for (int p = 0; p < a.points; ++p) {
      const int64_t padded = round_up(std::max<int64_t>(1, a.point[p].count), kPairColumns);
      total += 2 * padded * (scalars ? 1 : padded_columns<T>(std::max<int64_t>(1, a.point[p].width)));
      if (a.point_grads[p] == nullptr)
        total -= 2 * padded * (scalars ? 1 : padded_columns<T>(std::max<int64_t>(1, a.point[p].width)));
    }
    return total;
  }

  void prepare() {
    for (int p = 0; p < a.products; ++p)
      for (int64_t i = 0; i < rows_padded; ++i)
        grads.data[p * rows_padded + i] = i < a.rows ? (T)a.grads[(group * a.products + p) * a.rows + i] : T(0);
    for (int s = 0; s < a.distances; ++s)
      wanted[s] = a.point_grads[a.row_points[s]] != nullptr || a.point_grads[a.column_points[s]] != nullptr;
    for (int f = 0; f < a.kernels; ++f) moves[f] = wanted[a.distance_of[f]] || a.bandwidth_grads != nullptr;
    for (int p = 0; p < a.products; ++p)
      for (int f = 0; f < a.kernels; ++f) counts[p] = counts[p] || (moves[f] && (a.mask[p] >> f & 1));
    for (int p = 0; p < a.products; ++p)
      for (int f = 0; f < a.kernels; ++f) used[f] = used[f] || (counts[p] && (a.mask[p] >> f & 1));
    for (int f = 0; f < a.kernels; ++f) read[a.distance_of[f]] = read[a.distance_of[f]] || used[f];
    int64_t at = 0, scalars = 0;
    for (int p = 0; p < a.points; ++p) {
      row_sums[p] = column_sums[p] = -1;
      if (a.point_grads[p] == nullptr) continue;
      row_sums[p] = at;
      column_sums[p] = at += points[p]->padded * points[p]->ld;
      at += points[p]->padded * points[p]->ld;
      mass_of_row[p] = scalars;
      mass_of_column[p] = scalars += points[p]->padded;
      scalars += points[p]->padded;
    }
    std::fill(turned.data, turned.data + at, T(0));
    std::fill(mass.data, mass.data + scalars, 0.0);
    std::fill(by_kernel.data, by_kernel.data + a.kernels * schedule.row_blocks, 0.0);
  }

  // Adds to E what product p gives by kernel f; returns the sum of E D of it where that is asked for.
  template <bool kInverse>
  double add_slopes(int p, int f, const Tile& t, const T* dots, const T* kernels, T* e) const {
    const int s = a.distance_of[f];
    const T *norms = row_points(s).norms.data + t.i, *column = column_points(s).norms.data + t.j;
    const T *w = weights.data + t.j, *g = grads.data + p * rows_padded, *own = kernels + f * kTile;
    const bool other = symmetric, distances = a.bandwidth_grads != nullptr;
    const uint32_t rest = a.mask[p] & ~(1u << f);
    T others[kPairColumns];
    V along{};
    const V by = splat<T>(-slope[f]);
    for (int64_t i = 0; i < kPairRows; ++i) {
      const T* beside = nullptr;
      const int64_t at = i * kPairColumns;
      for (int h = 0; h < a.kernels; ++h) {
        if (!(rest >> h & 1)) continue;
        const T* more = kernels + h * kTile + at;
        if (beside == nullptr) {
          beside = more;
          continue;
        }
        for (int64_t v = 0; v < kPairColumns; v += W) store(others + v, load<V>(beside + v) * load<V>(more + v));
        beside = others;
      }
      const V mine = splat<T>(g[t.i + i]), weight = other ? splat<T>(weights.data[t.i + i]) : V{};
      const V norm = splat<T>(norms[i]);
      for (int64_t v = 0; v < kPairColumns; v += W) {
        const V k = load<V>(own + at + v);
        V u = mine * load<V>(w + v);
        if (other) u = weight * load<V>(g + t.j + v) + u;
        u *= kInverse ? k * k * by : k * by;
        if (beside != nullptr) u *= load<V>(beside + v);
        store(e + at + v, load<V>(e + at + v) + u);
        if (distances) along = u * distance(load<V>(dots + at + v), norm, load<V>(column + v)) + along;
      }
    }
    return (double)lane_sum<T>(along);
  }

  void add_turned(int s, const Tile& t, bool columns_too, T* e) {
    const int x = a.row_points[s], y = a.column_points[s];
    if (x == y) diagonal(t, [&](int64_t, int64_t at) { e[at] = T(0); });
    const int to_column = symmetric ? x : y;
    const bool rows = a.point_grads[x] != nullptr;
    const bool columns = columns_too && a.point_grads[to_column] != nullptr;
    T sums[kPairColumns] = {};
    double* of_rows = rows ? mass.data + mass_of_row[x] + t.i : nullptr;
    for (int64_t i = 0; i < kPairRows; ++i) {
      V row{};
      for (int64_t v = 0; v < kPairColumns; v += W) {
        const V value = load<V>(e + i * kPairColumns + v);
        row += value;
        store(sums + v, load<V>(sums + v) + value);
      }
      if (rows) of_rows[i] += (double)lane_sum<T>(row);
    }
    const PackedPoints<T>&px = *points[x], &py = *points[y];
    const int vecs = (int)((px.depth + W - 1) / W);
    if (rows)
      gemm<P, false>((int)kPairRows, vecs, kPairColumns, e, kPairColumns, py.row(t.j), py.ld,
                     turned.data + row_sums[x] + t.i * px.ld, px.ld, true);
    if (!columns) return;
    double* of_columns = mass.data + (symmetric ? mass_of_row[y] : mass_of_column[y]) + t.j;
    for (int64_t j = 0; j < kPairColumns; ++j) of_columns[j] += (double)sums[j];
    gemm<P, true>((int)kPairColumns, vecs, kPairRows, e, kPairColumns, px.row(t.i), px.ld,
                  turned.data + (symmetric ? row_sums[y] : column_sums[y]) + t.j * py.ld, py.ld, true);
  }

  template <bool kInverse>
  void backward_tile(const Tile& t, int64_t block, T* dots, T* kernels, T* e) {
    for (int s = 0; s < a.distances; ++s)
      if (read[s]) products(s, t, false, dots + s * kTile);
    for (int f = 0; f < a.kernels; ++f)
      if (used[f]) kernel_tile<kInverse>(f, t, dots + a.distance_of[f] * kTile, kernels + f * kTile);
    // In a block with itself a pair comes twice.
    const double share = symmetric && !t.both ? 0.5 : 1.0;
    for (int s = 0; s < a.distances; ++s) {
      if (!wanted[s] && a.bandwidth_grads == nullptr) continue;
      std::fill(e, e + kTile, T(0));
      for (int f = 0; f < a.kernels; ++f) {
        if (a.distance_of[f] != s) continue;
        double sum = 0.0;
        for (int p = 0; p < a.products; ++p)
          if (a.mask[p] >> f & 1) sum += add_slopes<kInverse>(p, f, t, dots + s * kTile, kernels, e);
        by_kernel.data[f * schedule.row_blocks + block] += share * sum;
      }
      if (wanted[s]) add_turned(s, t, t.both || !symmetric, e);
    }
  }

  void finish(const Parallel& parallel) {
    for (int p = 0; p < a.points; ++p) {
      if (a.point_grads[p] == nullptr) continue;
      const PackedPoints<T>& x = *points[p];
      T* out = static_cast<T*>(a.point_grads[p]) + group * x.count * x.width;
      for_each_task(parallel, (x.count + kPairColumns - 1) / kPairColumns, [&](int64_t block) {
        for (int64_t i = block * kPairColumns; i < std::min(x.count, (block + 1) * kPairColumns); ++i) {
          const double m = mass.data[mass_of_row[p] + i] + mass.data[mass_of_column[p] + i];
          const T *one = turned.data + row_sums[p] + i * x.ld, *two = turned.data + column_sums[p] + i * x.ld;
          for (int64_t d = 0; d < x.width; ++d)
            out[i * x.width + d] = (T)(2.0 * (m * (double)x.row(i)[d] - ((double)one[d] + (double)two[d])));
        }
      });
    }
    if (a.bandwidth_grads == nullptr) return;
    for (int f = 0; f < a.kernels; ++f) {
      double sum = 0.0;
      for (int64_t b = 0; b < schedule.row_blocks; ++b) sum += by_kernel.data[f * schedule.row_blocks + b];
      const int64_t at = group * a.kernels + f;
      a.bandwidth_grads[at] = -2.0 * sum / a.bandwidths[at];
    }
  }

  // ---- all of it ----------------------------------------------------------------------------------------------------

  template <bool kInverse>
  void block(int64_t row_block, int64_t column_block) {
    const bool back = a.grads != nullptr, both = symmetric && row_block != column_block;
    T* dots = static_cast<T*>(thread_scratch((size_t)((a.distances + a.kernels + 1) * kTile) * sizeof(T)));
    T *kernels = dots + a.distances * kTile, *e = kernels + a.kernels * kTile;
    const int64_t row_end = std::min(a.rows, (row_block + 1) * schedule.block);
    const int64_t column_end = std::min(a.columns, (column_block + 1) * schedule.block);
    for (int64_t j = column_block * schedule.block; j < column_end; j += kPairColumns)
      for (int64_t i = row_block * schedule.block; i < row_end; i += kPairRows) {
        const Tile t{i, j, both};
        if (back)
          backward_tile<kInverse>(t, row_block, dots, kernels, e);
        else
          forward_tile<kInverse>(t, dots, kernels);
      }
  }

  void run(const Parallel& parallel) {
    for (int64_t r = 0; r < schedule.rounds(); ++r)
      for_each_task(parallel, schedule.tasks(r), [&](int64_t task) {
        int64_t row, column;
        if (!schedule.pair(r, task, &row, &column)) return;
        a.inverse ? block<true>(row, column) : block<false>(row, column);
      });
    if (a.grads != nullptr) finish(parallel);
  }
};

template <class T>
void run_as(const KernelSumsArgs& args, const Parallel& parallel) {
  int64_t depth = args.kernels;
  for (int s = 0; s < args.distances; ++s) depth += args.point[args.row_points[s]].width;
  const Parallel serial = serial_parallel(), &threads = args.rows * args.columns * depth < kSerial ? serial : parallel;
  for (int64_t g = 0; g < args.groups; ++g) {
    Pairs<T> pairs(args, g, threads);
    pairs.run(threads);
  }
}

void run(const KernelSumsArgs& args, const Parallel& parallel) {
  args.dtype == DType::f64 ? run_as<double>(args, parallel) : run_as<float>(args, parallel);
}

void forward(const KernelSumsArgs& args, const Parallel& parallel) {
  std::fill(args.sums, args.sums + args.groups * args.products * args.rows, 0.0);
  run(args, parallel);
}

}  // namespace

extern const KernelSumsKernels kKernelSums;
const KernelSumsKernels kKernelSums = {forward, run};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
