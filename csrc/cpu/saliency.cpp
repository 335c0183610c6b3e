// Gradient-weighted and NormGrad maps on the CPU, at one ISA level (see saliency.h).
//
// Every map is made of two reductions over a block of lines, each a row of contiguous numbers: *across* lines, into as
// many sums as a line is long, and *along* a line, into one sum for each. Where locations are contiguous, lines are
// channels; where channels are (channels last, tokens), lines are locations; the same code serves both with the two
// reductions changing places. Lines are divided into groups by the shape alone, and groups are added in order, so that
// results do not depend on the number of threads.
//
// Each tensor is read from memory once. Weights of channels need all locations first, but of a few channels only:
// where lines are channels, four are pooled and then, still in the cache, added to the map.
#include "transfuse/saliency.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "saliency_depthwise.h"
#include "saliency_lines.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr double kPooledEps = 1e-7;

// ---- maps -----------------------------------------------------------------------------------------------------------

// Sums over channels at every location, (batch, K, locations).
template <class T, class Mode>
void over_channels(const Parallel& parallel, const Shape& s, const SaliencyTensor& act, const SaliencyTensor& grad,
                   T* out) {
  constexpr int K = Mode::K;
  const int64_t n = s.locations;
  const auto nothing = [](int64_t) {};
  if (channels_last(Mode::kAct ? act : grad, s)) {
    for_each_part(
        parallel, s, groups_of(n),
        [&](int64_t b, int64_t part) {
          const Lines a = lines_of(act, s, b, true), g = lines_of(grad, s, b, true);
          T* buffer = line_buffer<T>();
          for (int64_t l = part * kGroup; l < std::min(n, (part + 1) * kGroup); ++l) {
            double result[K];
            along<T, Mode>(a, g, l, s.channels, nullptr, (Mode::kAct ? a : g).place(l + 1, 0), result, buffer);
            for (int k = 0; k < K; ++k) out[(b * K + k) * n + l] = (T)result[k];
          }
        },
        nothing);
    return;
  }
  const int64_t groups = groups_of(s.channels);
  std::vector<T> parts((size_t)(s.batch * groups * K * n));
  for_each_part(
      parallel, s, groups,
      [&](int64_t b, int64_t part) {
        const Lines a = lines_of(act, s, b, false), g = lines_of(grad, s, b, false);
        T* sums = parts.data() + (b * groups + part) * K * n;
        start<T, Mode>(sums, n);
        const int64_t first = part * kGroup, count = std::min(kGroup, s.channels - first);
        across<T, Mode>(a, g, first, count, 0, n, nullptr, n, sums, line_buffer<T>());
      },
      [&](int64_t b) {
        T* total = out + b * K * n;
        const T* own = parts.data() + b * groups * K * n;
        std::copy(own, own + K * n, total);
        for (int64_t part = 1; part < groups; ++part) merge_lines<T, Mode>(total, own + part * K * n, n);
      });
}

// The weight of a channel from its pooled sums.
double away_from_zero(double x, double eps) { return x < 0 ? x - eps : x + eps; }

struct GradCam {
  using Pool = PoolGradient;
  static constexpr bool kSumFirst = false;
  static double weight(const double* s, int64_t n) { return s[0] / (double)n; }
};
struct GradCamPlus {
  using Pool = PoolPlus;
  static constexpr bool kSumFirst = true;
  static double weight(const double* s, int64_t) { return s[0]; }
};
struct XGradCam {
  using Pool = PoolProduct;
  static constexpr bool kSumFirst = false;
  static double weight(const double* s, int64_t) { return s[0] / away_from_zero(s[1], kPooledEps); }
};

// Lines are channels: pooled a few at a time, and added to the map at once.
template <class T, class Method>
void weighted_channels(const GradMapArgs& args, const Shape& s, const Parallel& parallel) {
  const int64_t n = s.locations, groups = groups_of(s.channels);
  std::vector<T> parts((size_t)(s.batch * groups * n));
  for_each_part(
      parallel, s, groups,
      [&](int64_t b, int64_t part) {
        const Lines a = lines_of(args.act, s, b, false), g = lines_of(args.grad, s, b, false);
        T* sums = parts.data() + (b * groups + part) * n;
        T* buffer = line_buffer<T>();
        std::fill(sums, sums + n, T(0));
        const int64_t last = std::min(s.channels, (part + 1) * kGroup);
        for (int64_t c = part * kGroup; c < last; c += kTogether) {
          const int64_t count = std::min<int64_t>(kTogether, last - c);
          T weights[kTogether];
          for (int64_t u = 0; u < count; ++u) {
            double pooled[Method::Pool::K], sum = 0.0;
            if (Method::kSumFirst) along<T, Sum>(a, g, c + u, n, nullptr, g.place(c + u, 0), &sum, buffer);
            const T rounded = (T)sum;
            const char* next = Method::Pool::kAct ? g.place(c + u + 1, 0) : a.place(c + u, 0);
            along<T, typename Method::Pool>(a, g, c + u, n, &rounded, next, pooled, buffer);
            weights[u] = (T)Method::weight(pooled, n);
          }
          across<T, Weighted>(a, g, c, count, 0, n, weights, n, sums, buffer);
        }
      },
      [&](int64_t b) {
        T* total = static_cast<T*>(args.out) + b * n;
        const T* own = parts.data() + b * groups * n;
        std::copy(own, own + n, total);
        for (int64_t part = 1; part < groups; ++part)
          for (int64_t i = 0; i < n; ++i) total[i] += own[part * n + i];
      });
}

// Sums over all locations of channels [begin, end), where lines are locations.
template <class T, class Mode>
void pool_block(const Lines& a, const Lines& g, int64_t locations, int64_t begin, int64_t end, const T* extra,
                double* result, T* buffer) {
  const int64_t n = end - begin;
  std::vector<T> sums((size_t)(Mode::K * n));
  std::fill(result, result + Mode::K * n, 0.0);
  for (int64_t l = 0; l < locations; l += kGroup) {
    start<T, Mode>(sums.data(), n);
    across<T, Mode>(a, g, l, std::min(kGroup, locations - l), begin, end, extra, n, sums.data(), buffer);
    for (int64_t i = 0; i < Mode::K * n; ++i) result[i] += (double)sums[(size_t)i];
  }
}

// Lines are locations: weights of all channels first.
template <class T, class Method>
void weighted_locations(const GradMapArgs& args, const Shape& s, const Parallel& parallel) {
  constexpr int K = Method::Pool::K;
  constexpr int64_t kBlockChannels = 256;
  const int64_t n = s.locations, blocks = (s.channels + kBlockChannels - 1) / kBlockChannels;
  std::vector<T> weights((size_t)(s.batch * s.channels));
  const auto pool = [&](int64_t b, int64_t block) {
    const Lines a = lines_of(args.act, s, b, true), g = lines_of(args.grad, s, b, true);
    const int64_t begin = block * kBlockChannels, end = std::min(s.channels, begin + kBlockChannels), m = end - begin;
    T* buffer = line_buffer<T>();
    std::vector<double> pooled((size_t)(K * m));
    std::vector<T> sums((size_t)(Method::kSumFirst ? end : 0));
    if (Method::kSumFirst) {
      std::vector<double> total((size_t)m);
      pool_block<T, Sum>(a, g, n, begin, end, nullptr, total.data(), buffer);
      for (int64_t i = 0; i < m; ++i) sums[(size_t)(begin + i)] = (T)total[(size_t)i];
    }
    pool_block<T, typename Method::Pool>(a, g, n, begin, end, sums.data(), pooled.data(), buffer);
    for (int64_t i = 0; i < m; ++i) {
      double own[K];
      for (int k = 0; k < K; ++k) own[k] = pooled[(size_t)(k * m + i)];
      weights[(size_t)(b * s.channels + begin + i)] = (T)Method::weight(own, n);
    }
  };
  const auto add = [&](int64_t b, int64_t part) {
    const Lines a = lines_of(args.act, s, b, true), g = lines_of(args.grad, s, b, true);
    T* buffer = line_buffer<T>();
    T* out = static_cast<T*>(args.out) + b * n;
    for (int64_t l = part * kGroup; l < std::min(n, (part + 1) * kGroup); ++l) {
      double result;
      along<T, Weighted>(a, g, l, s.channels, weights.data() + b * s.channels, a.place(l + 1, 0), &result, buffer);
      out[l] = (T)result;
    }
  };
  const auto nothing = [](int64_t) {};
  const int64_t parts = groups_of(n);
  if (s.batch >= 2 * parallel.threads) {
    for_each_part(
        parallel, s, 1,
        [&](int64_t b, int64_t) {
          for (int64_t block = 0; block < blocks; ++block) pool(b, block);
          for (int64_t part = 0; part < parts; ++part) add(b, part);
        },
        nothing);
    return;
  }
  for_each_part(parallel, s, blocks, pool, nothing);
  for_each_part(parallel, s, parts, add, nothing);
}

template <class T, class Method>
void weighted(const GradMapArgs& args, const Shape& s, const Parallel& parallel) {
  if (channels_last(args.act, s))
    weighted_locations<T, Method>(args, s, parallel);
  else
    weighted_channels<T, Method>(args, s, parallel);
}

template <class T>
void grad_map_as(const GradMapArgs& args, const Parallel& parallel) {
  const Shape s{args.dtype, args.batch, args.channels, args.locations};
  T* out = static_cast<T*>(args.out);
  switch (args.method) {
    case MapMethod::gradcam: weighted<T, GradCam>(args, s, parallel); return;
    case MapMethod::gradcam_pp: weighted<T, GradCamPlus>(args, s, parallel); return;
    case MapMethod::xgradcam: weighted<T, XGradCam>(args, s, parallel); return;
    case MapMethod::layercam: over_channels<T, PositiveGradient>(parallel, s, args.act, args.grad, out); return;
    case MapMethod::hirescam: over_channels<T, Product>(parallel, s, args.act, args.grad, out); return;
    case MapMethod::elementwise: over_channels<T, PositiveProduct>(parallel, s, args.act, args.grad, out); return;
  }
}

// ---- NormGrad -------------------------------------------------------------------------------------------------------

template <class T>
void root(T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(out[i]);
}

template <class T>
void scaled(const NormGradArgs& args, const Shape& s, const Parallel& parallel) {
  T* out = static_cast<T*>(args.out);
  switch (args.phase2) {
    case Phase2::norm: over_channels<T, ProductSquare>(parallel, s, args.act, args.grad, out); break;
    case Phase2::filter_norm: over_channels<T, PositiveProductSquare>(parallel, s, args.act, args.grad, out); break;
    case Phase2::sum: over_channels<T, Product>(parallel, s, args.act, args.grad, out); return;
    case Phase2::max: over_channels<T, ProductMax>(parallel, s, args.act, args.grad, out); return;
  }
  root(out, s.batch * s.locations);
}

// The statistics that a phase 2 needs, of one tensor: (batch, K, locations).
template <class T>
int statistics(Phase2 phase2, const SaliencyTensor& x, const Shape& s, const Parallel& parallel, std::vector<T>* out) {
  const int count = phase2 == Phase2::filter_norm || phase2 == Phase2::max ? 2 : 1;
  out->resize((size_t)(s.batch * count * s.locations));
  switch (phase2) {
    case Phase2::norm: over_channels<T, Square>(parallel, s, x, x, out->data()); break;
    case Phase2::filter_norm: over_channels<T, SignedSquares>(parallel, s, x, x, out->data()); break;
    case Phase2::sum: over_channels<T, Sum>(parallel, s, x, x, out->data()); break;
    case Phase2::max: over_channels<T, Extremes>(parallel, s, x, x, out->data()); break;
  }
  return count;
}

template <class T>
void bias(const NormGradArgs& args, const Shape& s, const Parallel& parallel) {
  std::vector<T> found;
  const int count = statistics(args.phase2, args.grad, s, parallel, &found);
  T* out = static_cast<T*>(args.out);
  for (int64_t b = 0; b < s.batch; ++b)
    std::copy_n(found.data() + b * count * s.locations, s.locations, out + b * s.locations);
  if (args.phase2 == Phase2::norm || args.phase2 == Phase2::filter_norm) root(out, s.batch * s.locations);
}

// One statistic of the activations over the neighbourhood of an output location.
template <class T>
struct Neighbourhood {
  const NormGradArgs& args;
  int64_t at[3];  // first input position of the neighbourhood, padding counted from -1 down

  template <class F>
  void each(const F& body) const {
    for (int64_t i = 0; i < args.kernel[0]; ++i)
      for (int64_t j = 0; j < args.kernel[1]; ++j)
        for (int64_t k = 0; k < args.kernel[2]; ++k) {
          const int64_t z = at[0] + i * args.dilation[0], y = at[1] + j * args.dilation[1],
                        x = at[2] + k * args.dilation[2];
          const bool inside = z >= 0 && z < args.grid[0] && y >= 0 && y < args.grid[1] && x >= 0 && x < args.grid[2];
          body(inside ? (z * args.grid[1] + y) * args.grid[2] + x : int64_t(-1));
        }
  }
  double sum(const T* map) const {
    double total = 0.0;
    each([&](int64_t i) { total += i < 0 ? 0.0 : (double)map[i]; });
    return total;
  }
  template <bool kLargest>
  double extreme(const T* map) const {
    double found = kLargest ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::infinity();
    each([&](int64_t i) {
      const double x = i < 0 ? 0.0 : (double)map[i];
      found = kLargest ? larger(x, found) : smaller(x, found);
    });
    return found;
  }
};

template <class T>
void convolved(const NormGradArgs& args, const Parallel& parallel) {
  const int64_t n = volume(args.grid), m = volume(args.out_grid);
  const Shape in{args.dtype, args.batch, args.act_channels, n}, out{args.dtype, args.batch, args.grad_channels, m};
  std::vector<T> of_act, of_grad;
  const int count = statistics(args.phase2, args.act, in, parallel, &of_act);
  statistics(args.phase2, args.grad, out, parallel, &of_grad);
  const Parallel serial = serial_parallel();
  for_each_task(args.batch * m < kSerial ? serial : parallel, args.batch, [&](int64_t b) {
    const T *a = of_act.data() + b * count * n, *g = of_grad.data() + b * count * m;
    T* to = static_cast<T*>(args.out) + b * m;
    Neighbourhood<T> near{args, {0, 0, 0}};
    for (int64_t i = 0; i < m; ++i) {
      const int64_t z = i / (args.out_grid[1] * args.out_grid[2]), y = i / args.out_grid[2] % args.out_grid[1];
      const int64_t position[3] = {z, y, i % args.out_grid[2]};
      for (int d = 0; d < 3; ++d) near.at[d] = position[d] * args.step[d] - args.padding[d];
      double value = 0.0;
      // In double: products of squares leave the range of single precision.
      switch (args.phase2) {
        case Phase2::norm: value = std::sqrt(near.sum(a) * (double)g[i]); break;
        case Phase2::filter_norm:
          value = std::sqrt(near.sum(a) * (double)g[i] + near.sum(a + n) * (double)g[m + i]);
          break;
        case Phase2::sum: value = near.sum(a) * (double)g[i]; break;
        case Phase2::max: {
          const double high = near.template extreme<true>(a), low = near.template extreme<false>(a + n);
          const double top = (double)g[i], bottom = (double)g[m + i];
          value = larger(larger(high * top, high * bottom), larger(low * top, low * bottom));
          break;
        }
      }
      to[i] = (T)value;
    }
  });
}

template <class T>
void normgrad_as(const NormGradArgs& args, const Parallel& parallel) {
  const Shape s{args.dtype, args.batch, args.grad_channels, volume(args.out_grid)};
  switch (args.phase1) {
    case Phase1::scaling: scaled<T>(args, s, parallel); return;
    case Phase1::bias: bias<T>(args, s, parallel); return;
    case Phase1::conv: convolved<T>(args, parallel); return;
    case Phase1::depthwise: Depthwise<T>(args, s).run(parallel); return;
  }
}

void grad_map(const GradMapArgs& args, const Parallel& parallel) {
  args.dtype == DType::f64 ? grad_map_as<double>(args, parallel) : grad_map_as<float>(args, parallel);
}

void normgrad(const NormGradArgs& args, const Parallel& parallel) {
  args.dtype == DType::f64 ? normgrad_as<double>(args, parallel) : normgrad_as<float>(args, parallel);
}

}  // namespace

extern const SaliencyKernels kSaliency;
const SaliencyKernels kSaliency = {grad_map, normgrad};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
