// Second moments of image patches on the CPU, at one ISA level (see patch_gram.h).
//
// Images are packed once into padded rows, columns of one phase of the stride side by side, so that all products of a
// correlation are of contiguous vectors. A task owns the correlations of a few channels with all others at some
// distances, and so the entries of the result that come from them: whatever the number of threads, they are summed in
// one order. A vector of sums holds W neighbouring columns; the vectors of the first and last columns are kept apart
// from the others, and the sums over the first and last rows from the rest, which is all that windows differ in.
#include "transfuse/patch_gram.h"

#include <algorithm>
#include <vector>

#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int kTileChannels = 3, kTilePartners = 4;  // 12 sums, 3 operands and 1 more: 16 registers
constexpr int64_t kRowBlock = 24;                    // rows of a strip that stay in the first-level cache
constexpr int64_t kPacked = int64_t(16) << 20;       // bytes of packed images at a time
constexpr int64_t kBundles = 8;                      // tasks are taken together in so many; fewer are divided further
constexpr int64_t kBundleSums = 1 << 16;             // more bundles where one would hold more sums than this
constexpr int64_t kPartWork = int64_t(1) << 17;      // patches from which images are divided too
constexpr int64_t kMaxParts = 8;
constexpr int64_t kShortSums = 256;   // additions in single precision before sums are widened
constexpr int64_t kSerial = 1 << 15;  // multiplications below which waking other threads does not pay

// One direction: what an offset i of the patch means on the lattice of the stride.
struct Axis {
  int64_t kernel, step, padding, dilation, count;
  int64_t offset(int64_t i) const { return i * dilation; }
  int64_t phase(int64_t i) const { return offset(i) % step; }
  int64_t first(int64_t i) const { return offset(i) / step; }  // lattice position of the window's start
  int64_t extent() const { return (count - 1) * step + (kernel - 1) * dilation + 1; }
};

// Offsets of the patch at one phase that have a partner at distance `apart` (in offsets).
std::vector<int64_t> members(const Axis& axis, int64_t phase, int64_t apart) {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < axis.kernel; ++i)
    if (axis.phase(i) == phase && i + apart >= 0 && i + apart < axis.kernel) found.push_back(i);
  return found;
}

// Rows [begin, end) of the lattice that the same windows hold.
struct Segment {
  int64_t begin, end;
};

std::vector<Segment> segments(const Axis& axis, const std::vector<int64_t>& offsets) {
  std::vector<int64_t> cuts;
  for (const int64_t i : offsets) {
    cuts.push_back(axis.first(i));
    cuts.push_back(axis.first(i) + axis.count);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<Segment> found;
  for (size_t k = 0; k + 1 < cuts.size(); ++k) {
    const bool held = std::any_of(offsets.begin(), offsets.end(), [&](int64_t i) {
      return axis.first(i) <= cuts[k] && cuts[k + 1] <= axis.first(i) + axis.count;
    });
    if (held) found.push_back({cuts[k], cuts[k + 1]});
  }
  return found;
}

// The second factor of a correlation: a channel, and a distance across.
struct Partner {
  int64_t channel, apart;
};

// Correlations of channels [channel, channel + channels) at phases (down, across) and one distance down with partners.
struct Task {
  int64_t phase_down, phase_across, apart_down, channel, channels;
  std::vector<Partner> partners;
  std::vector<int64_t> down;
};

template <class T>
struct Packed {
  T* memory = nullptr;
  int64_t front, phase_stride, row_stride, channel_stride, image_stride;
};

template <class T, int kA, int kB>
TRANSFUSE_INLINE void correlate(const T* a, int64_t channel_stride, const int64_t* offset, int64_t rows, int64_t step,
                                T* sums) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::W;
  if (rows <= 0) __builtin_unreachable();
  V acc[kA][kB];
#pragma GCC unroll 4
  for (int i = 0; i < kA; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < kB; ++k) acc[i][k] = V{};
  const T* b[kB];
#pragma GCC unroll 4
  for (int k = 0; k < kB; ++k) b[k] = a + offset[k];
  int64_t at = 0;
  do {
    V av[kA];
#pragma GCC unroll 4
    for (int i = 0; i < kA; ++i) av[i] = load<V>(a + i * channel_stride + at);
#pragma GCC unroll 4
    for (int k = 0; k < kB; ++k) {
      const V bv = load<V>(b[k] + at);
#pragma GCC unroll 4
      for (int i = 0; i < kA; ++i) acc[i][k] = av[i] * bv + acc[i][k];
    }
    at += step;
  } while (--rows > 0);
#pragma GCC unroll 4
  for (int k = 0; k < kB; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < kA; ++i) {
      T* sum = sums + (k * kA + i) * W;
      store(sum, load<V>(sum) + acc[i][k]);
    }
}

template <class T, int kA>
TRANSFUSE_INLINE void correlate_all(const T* a, int64_t channel_stride, const std::vector<int64_t>& offsets,
                                    int64_t rows, int64_t step, T* sums) {
  constexpr int W = Simd<T>::W;
  const int64_t count = (int64_t)offsets.size();
  int64_t k = 0;
  for (; k + kTilePartners <= count; k += kTilePartners)
    correlate<T, kA, kTilePartners>(a, channel_stride, offsets.data() + k, rows, step, sums + k * kA * W);
  switch (count - k) {
    case 3: correlate<T, kA, 3>(a, channel_stride, offsets.data() + k, rows, step, sums + k * kA * W); break;
    case 2: correlate<T, kA, 2>(a, channel_stride, offsets.data() + k, rows, step, sums + k * kA * W); break;
    case 1: correlate<T, kA, 1>(a, channel_stride, offsets.data() + k, rows, step, sums + k * kA * W); break;
    default: break;
  }
}

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// The sums of one task.
template <class T>
struct Sweep {
  static constexpr int W = Simd<T>::W;
  const Task& task;
  const Axis &down, &across;
  const Packed<T>& packed;
  const std::vector<Segment> rows;
  // Lattice columns from the lowest that a window holds, in vectors; those that all windows hold share a slot.
  int64_t lowest = INT64_MAX, highest = 0, blocks = 0, inner = -1, plane = 0;
  std::vector<int64_t> slot_of, slot_start, offsets;
  std::vector<T> sums;       // (slot, segment, partner, channel, lane)
  std::vector<double> wide;  // the same

  Sweep(const Task& t, const Axis& d, const Axis& a, const Packed<T>& p)
      : task(t), down(d), across(a), packed(p), rows(segments(d, t.down)) {
    for (int64_t j = 0; j < across.kernel; ++j)
      if (across.phase(j) == task.phase_across) {
        lowest = std::min(lowest, across.first(j));
        highest = std::max(highest, across.first(j));
      }
    blocks = (highest - lowest + across.count + W - 1) / W;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t t0 = lowest + b * W;
      const bool common = t0 >= highest && t0 + W <= lowest + across.count;
      if (!common || inner < 0) {
        slot_start.push_back(t0);
        if (common) inner = (int64_t)slot_start.size() - 1;
      }
      slot_of.push_back(common ? inner : (int64_t)slot_start.size() - 1);
    }
    for (const Partner& partner : task.partners) {
      const int64_t column = task.phase_across + across.offset(partner.apart), shift = floor_div(column, across.step);
      offsets.push_back((partner.channel - task.channel) * packed.channel_stride +
                        down.offset(task.apart_down) * packed.row_stride +
                        (column - shift * across.step - task.phase_across) * packed.phase_stride + shift);
    }
    plane = (int64_t)task.partners.size() * task.channels * W;
    sums.assign(slot_start.size() * rows.size() * (size_t)plane, T(0));
    wide.assign(sums.size(), 0.0);
  }

  // Lattice rows [begin, end) of an image.
  void add(const T* image, int64_t begin, int64_t end) {
    const int64_t step = down.step * packed.row_stride;
    const T* base = image + task.channel * packed.channel_stride + task.phase_down * packed.row_stride +
                    task.phase_across * packed.phase_stride + packed.front + lowest;
    for (size_t k = 0; k < rows.size(); ++k) {
      const int64_t first = std::max(begin, rows[k].begin), count = std::min(end, rows[k].end) - first;
      if (count <= 0) continue;
      for (int64_t b = 0; b < blocks; ++b) {
        const T* a = base + b * W + first * step;
        T* to = sums.data() + (slot_of[(size_t)b] * (int64_t)rows.size() + (int64_t)k) * plane;
        switch (task.channels) {
          case 3: correlate_all<T, 3>(a, packed.channel_stride, offsets, count, step, to); break;
          case 2: correlate_all<T, 2>(a, packed.channel_stride, offsets, count, step, to); break;
          default: correlate_all<T, 1>(a, packed.channel_stride, offsets, count, step, to); break;
        }
      }
    }
  }

  void widen() {
    for (size_t i = 0; i < sums.size(); ++i) wide[i] += (double)sums[i];
    std::fill(sums.begin(), sums.end(), T(0));
  }

  // What the windows that start at column offset j hold, of one segment.
  double window(int64_t partner, int64_t a, int64_t j, int64_t segment) const {
    const int64_t first = across.first(j), last = first + across.count;
    double sum = 0.0;
    for (int64_t slot = 0; slot < (int64_t)slot_start.size(); ++slot) {
      const double* lanes =
          wide.data() + (slot * (int64_t)rows.size() + segment) * plane + (partner * task.channels + a) * W;
      for (int64_t lane = 0; lane < W; ++lane) {
        const int64_t t = slot_start[(size_t)slot] + lane;
        if (slot == inner || (t >= first && t < last)) sum += lanes[lane];
      }
    }
    return sum;
  }

  void finish(double* s, int64_t n) const {
    std::vector<double> per_segment(rows.size());
    for (size_t p = 0; p < task.partners.size(); ++p) {
      const Partner& partner = task.partners[p];
      for (int64_t a = 0; a < task.channels; ++a) {
        const int64_t channel = task.channel + a;
        // Of a pair at distance 0 one order is enough.
        if (task.apart_down == 0 && partner.apart == 0 && partner.channel < channel) continue;
        for (const int64_t j : members(across, task.phase_across, partner.apart)) {
          for (size_t k = 0; k < rows.size(); ++k) per_segment[k] = window((int64_t)p, a, j, (int64_t)k);
          for (const int64_t i : task.down) {
            double sum = 0.0;
            for (size_t k = 0; k < rows.size(); ++k)
              if (down.first(i) <= rows[k].begin && rows[k].end <= down.first(i) + down.count) sum += per_segment[k];
            const int64_t row = (channel * down.kernel + i) * across.kernel + j;
            const int64_t column =
                (partner.channel * down.kernel + i + task.apart_down) * across.kernel + j + partner.apart;
            s[std::min(row, column) * n + std::max(row, column)] += sum;
          }
        }
      }
    }
  }
};

template <class T>
struct Gram {
  static constexpr int W = Simd<T>::W;
  const PatchGramArgs& args;
  const Axis down, across;
  const int64_t channels, n;
  Packed<T> packed;

  explicit Gram(const PatchGramArgs& a)
      : args(a), down(axis(a, 0)), across(axis(a, 1)), channels(a.size[2]), n(channels * down.kernel * across.kernel) {
    // Lanes of a vector that belong to no window may reach this far to either side; they read zeros.
    packed.front = across.first(across.kernel - 1);
    packed.phase_stride = packed.front + (across.extent() + across.step - 1) / across.step + packed.front + W;
    packed.row_stride = across.step * packed.phase_stride;
    packed.channel_stride = down.extent() * packed.row_stride;
    packed.image_stride = channels * packed.channel_stride;
  }

  static Axis axis(const PatchGramArgs& a, int d) {
    return {a.kernel[d], a.step[d], a.padding[d], a.dilation[d], a.count[d]};
  }

  // ---- packing ------------------------------------------------------------------------------------------------------

  void pack(int64_t group, int64_t image, int64_t channel, T* to) const {
    const int64_t height = args.size[3], width = args.size[4], extent = across.extent();
    const int64_t base = group * args.stride[0] + image * args.stride[1] + channel * args.stride[2];
    std::memset(to, 0, (size_t)packed.channel_stride * sizeof(T));
    // Columns of the image that any patch reaches.
    const int64_t begin = std::max<int64_t>(0, -across.padding), left = across.padding;
    const int64_t count = std::min(width, extent - left) - begin;
    if (count <= 0) return;
    std::vector<T> row((size_t)(across.step == 1 ? 0 : count));
    for (int64_t r = 0; r < down.extent(); ++r) {
      const int64_t y = r - down.padding;
      if (y < 0 || y >= height) continue;
      T* line = to + r * packed.row_stride + packed.front;
      const int64_t offset = base + y * args.stride[3];
      if (across.step == 1) {
        load_row(args.x, args.dtype, offset, args.stride[4], count, line + left);
        continue;
      }
      load_row(args.x, args.dtype, offset, args.stride[4], count, row.data());
      for (int64_t phase = 0; phase < across.step; ++phase) {
        // Padded column left + k holds number k of the row; those of this phase are `step` apart.
        const int64_t first = ((phase - left) % across.step + across.step) % across.step;
        T* target = line + phase * packed.phase_stride + (left + first) / across.step;
        for (int64_t k = first; k < count; k += across.step) *target++ = row[(size_t)k];
      }
    }
  }

  // ---- tasks --------------------------------------------------------------------------------------------------------

  std::vector<Task> tasks() const {
    std::vector<Task> found;
    for (int64_t phase_down = 0; phase_down < std::min(down.step, down.offset(down.kernel - 1) + 1); ++phase_down)
      for (int64_t apart = 0; apart < down.kernel; ++apart) {
        const std::vector<int64_t> rows = members(down, phase_down, apart);
        if (rows.empty()) continue;
        for (int64_t phase = 0; phase < std::min(across.step, across.offset(across.kernel - 1) + 1); ++phase) {
          std::vector<Partner> partners;
          // Half of the matrix: forwards in rows, and within a row forwards in columns.
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t k = apart == 0 ? 0 : 1 - across.kernel; k < across.kernel; ++k)
              if (!members(across, phase, k).empty()) partners.push_back({c, k});
          if (partners.empty()) continue;
          for (int64_t c = 0; c < channels; c += kTileChannels)
            found.push_back(
                {phase_down, phase, apart, c, std::min<int64_t>(kTileChannels, channels - c), partners, rows});
        }
      }
    if ((int64_t)found.size() >= kBundles) return found;
    std::vector<Task> divided;
    for (const Task& task : found)
      for (size_t k = 0; k < task.partners.size(); k += 2 * kTilePartners) {
        divided.push_back(task);
        const auto begin = task.partners.begin() + (int64_t)k;
        const size_t last = std::min(task.partners.size(), k + 2 * kTilePartners);
        divided.back().partners.assign(begin, task.partners.begin() + (int64_t)last);
      }
    return divided;
  }

  // Adds the tasks' correlations over packed images [begin, end) to their entries of S (n, n), above the diagonal.
  // Blocks of rows outermost: what one task has loaded is there for the next.
  void run(const Task* first, const Task* last, int64_t begin, int64_t end, double* s) const {
    std::vector<Sweep<T>> sweeps;
    sweeps.reserve((size_t)(last - first));
    for (const Task* task = first; task != last; ++task) sweeps.emplace_back(*task, down, across, packed);
    const int64_t rows = down.first(down.kernel - 1) + down.count;
    const int64_t additions = (across.count / W + 1) * (rows / kRowBlock + 1);
    const int64_t period = std::max<int64_t>(1, std::min<int64_t>(32, kShortSums / additions));
    for (int64_t image = begin; image < end; ++image) {
      const T* base = packed.memory + image * packed.image_stride;
      for (int64_t row = 0; row < rows; row += kRowBlock)
        for (Sweep<T>& sweep : sweeps) sweep.add(base, row, row + kRowBlock);
      if ((image - begin + 1) % period == 0 || image + 1 == end)
        for (Sweep<T>& sweep : sweeps) sweep.widen();
    }
    for (const Sweep<T>& sweep : sweeps) sweep.finish(s, n);
  }

  // ---- all of it ----------------------------------------------------------------------------------------------------

  void group(int64_t index, const Parallel& parallel) {
    const int64_t batch = args.size[1], bytes = packed.image_stride * (int64_t)sizeof(T);
    const int64_t held = std::max<int64_t>(1, std::min(batch, kPacked / bytes));
    int64_t parts = std::max<int64_t>(1, std::min({kMaxParts, held * down.count * across.count / kPartWork, held}));
    if (n > 512) parts = 1;  // a part has a matrix of its own
    // Of this thread, and shared with the others while they run its tasks, none of which asks for memory of its own
    // here. Not filled: packing writes every number of an image.
    packed.memory = static_cast<T*>(thread_scratch((size_t)(held * bytes)));
    std::vector<double> s((size_t)(parts * n * n), 0.0);
    const std::vector<Task> all = tasks();
    // Not more sums in a bundle than the second-level cache holds (about three slots of five segments).
    int64_t held_sums = 0;
    for (const Task& task : all) held_sums += (int64_t)task.partners.size() * task.channels * W * 15;
    const int64_t bundles = std::min<int64_t>(std::max(kBundles, held_sums / kBundleSums), (int64_t)all.size());
    for (int64_t start = 0; start < batch; start += held) {
      const int64_t images = std::min(held, batch - start);
      for_each_task(parallel, images * channels, [&](int64_t i) {
        T* to = packed.memory + i / channels * packed.image_stride + i % channels * packed.channel_stride;
        pack(index, start + i / channels, i % channels, to);
      });
      const int64_t share = (images + parts - 1) / parts;
      for_each_task(parallel, bundles * parts, [&](int64_t i) {
        const int64_t part = i % parts, begin = std::min(images, part * share), end = std::min(images, begin + share);
        const int64_t bundle = i / parts, tasks = (int64_t)all.size();
        const Task* first = all.data();
        if (begin < end)
          run(first + bundle * tasks / bundles, first + (bundle + 1) * tasks / bundles, begin, end,
              s.data() + part * n * n);
      });
    }
    T* out = static_cast<T*>(args.out) + index * n * n;
    for (int64_t row = 0; row < n; ++row)
      for (int64_t column = row; column < n; ++column) {
        double sum = 0.0;
        for (int64_t part = 0; part < parts; ++part) sum += s[(size_t)((part * n + row) * n + column)];
        out[row * n + column] = out[column * n + row] = (T)sum;
      }
  }
};

template <class T>
void run_as(const PatchGramArgs& args, const Parallel& parallel) {
  Gram<T> gram(args);
  const int64_t work = args.size[1] * args.count[0] * args.count[1] * gram.n;
  const Parallel serial = serial_parallel();
  for (int64_t g = 0; g < args.size[0]; ++g) gram.group(g, work < kSerial ? serial : parallel);
}

void run(const PatchGramArgs& args, const Parallel& parallel) {
  args.dtype == DType::f64 ? run_as<double>(args, parallel) : run_as<float>(args, parallel);
}

}  // namespace

extern const PatchGramKernels kPatchGram;
const PatchGramKernels kPatchGram = {run};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
