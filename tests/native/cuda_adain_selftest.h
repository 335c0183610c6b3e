// Self-test of the CUDA kernels of adain, emulated: moments and results by naive loops in double precision. The few
// lines of mathematics per statistic (adain.h) are shared with the kernels; derivative tests of the op check those.
#pragma once

#include <memory>

#include "check.h"
#include "cuda_emulation/fibers.h"
#include "transfuse/adain.h"

namespace selftest {

using transfuse::AdainDirection;

// A (B, C, H, W) array: contiguous, channels_last, and others that packs of 16 bytes do not fit.
struct AdainArray {
  Array array;
  bool channels_last;
  AdainArray(DType dtype, const std::vector<int64_t>& n, Layout layout, bool last)
      : array(dtype, last ? std::vector<int64_t>{n[0], n[2], n[3], n[1]} : n, layout), channels_last(last) {}
  double get(const std::vector<int64_t>& i) const {
    return channels_last ? array.get(i[0], i[2], i[3], i[1]) : array.get(i[0], i[1], i[2], i[3]);
  }
  transfuse::AdainTensor tensor() const {
    transfuse::AdainTensor t;
    t.ptr = array.data();
    const int axes[4] = {0, channels_last ? 3 : 1, channels_last ? 1 : 2, channels_last ? 2 : 3};
    for (int d = 0; d < 4; ++d) t.stride[d] = array.stride(axes[d]);
    return t;
  }
};

template <class F>
inline void for_each_index(const std::vector<int64_t>& n, const F& body) {
  std::vector<int64_t> i(4);
  for (i[0] = 0; i[0] < n[0]; ++i[0])
    for (i[1] = 0; i[1] < n[1]; ++i[1])
      for (i[2] = 0; i[2] < n[2]; ++i[2])
        for (i[3] = 0; i[3] < n[3]; ++i[3]) body(i);
}

// The statistics of an index, for arrays of the content or of the style.
struct AdainNaive {
  std::vector<int64_t> kept;  // sizes, 1 where reduced
  std::vector<transfuse::AdainMoments> moments;

  int64_t index(const std::vector<int64_t>& i) const {
    int64_t at = 0;
    for (size_t d = 0; d < 4; ++d) at = at * kept[d] + (kept[d] == 1 ? 0 : i[d]);
    return at;
  }
  AdainNaive(const std::vector<int64_t>& n, const bool* reduced, const std::vector<AdainArray>& in, int inputs)
      : kept(n) {
    for (size_t d = 0; d < 4; ++d)
      if (reduced[d]) kept[d] = 1;
    moments.resize((size_t)(kept[0] * kept[1] * kept[2] * kept[3]));
    const auto at = [&](const std::vector<int64_t>& i) -> transfuse::AdainMoments& {
      return moments[(size_t)index(i)];
    };
    for_each_index(n, [&](const std::vector<int64_t>& i) { at(i).count += 1.0; });
    for_each_index(n, [&](const std::vector<int64_t>& i) {
      for (int k = 0; k < inputs; ++k) at(i).mean[k] += in[(size_t)k].get(i) / at(i).count;
    });
    const int pair[4][2] = {{0, 0}, {0, 1}, {0, 2}, {1, 2}};
    for_each_index(n, [&](const std::vector<int64_t>& i) {
      for (int p = 0; p < 4; ++p) {
        const int a = pair[p][0], b = pair[p][1];
        if (b >= inputs) continue;
        at(i).second[p] += (in[(size_t)a].get(i) - at(i).mean[a]) * (in[(size_t)b].get(i) - at(i).mean[b]);
      }
    });
  }
};

struct AdainCase {
  std::vector<int64_t> content, style;
  bool reduced[4];
  Layout layout;
  bool channels_last;
};

inline void check_adain_cuda(const AdainCase& s, DType dtype, AdainDirection direction, uint64_t seed) {
  const std::string what = "cuda adain " + std::string(name_of(dtype)) + " direction " +
                           std::to_string((int)direction) + " case " + std::to_string(seed);
  Random random(seed);
  const bool backward = direction == AdainDirection::backward || direction == AdainDirection::jvp_backward;
  const int inputs = transfuse::adain_content_inputs(direction), styles = transfuse::adain_style_inputs(direction);
  std::vector<AdainArray> x, y, results, others;
  for (int k = 0; k < inputs; ++k) x.emplace_back(dtype, s.content, s.layout, s.channels_last);
  for (int k = 0; k < styles; ++k) y.emplace_back(dtype, s.style, s.layout, s.channels_last);
  for (std::vector<AdainArray>* list : {&x, &y})
    for (AdainArray& a : *list) {
      const double middle = 2.0 * random.uniform();
      a.array.each(
          [&](int64_t i, int64_t j, int64_t k, int64_t l) { a.array.set(i, j, k, l, middle + random.uniform()); });
    }
  transfuse::AdainArgs args;
  args.dtype = dtype;
  args.rank = 4;
  args.eps = 0.01;
  for (int d = 0; d < 4; ++d) {
    args.content_size[d] = s.content[(size_t)d];
    args.style_size[d] = s.style[(size_t)d];
    args.reduced[d] = s.reduced[d];
  }
  for (int k = 0; k < inputs; ++k) args.content[k] = x[(size_t)k].tensor();
  for (int k = 0; k < styles; ++k) args.style[k] = y[(size_t)k].tensor();
  const AdainNaive content(s.content, s.reduced, x, inputs), style(s.style, s.reduced, y, styles);
  for (auto* list : {&results, &others}) {
    list->emplace_back(dtype, s.content, s.layout, s.channels_last);
    list->emplace_back(dtype, s.style, s.layout, s.channels_last);
  }
  // In another order of blocks and threads the same bits, or there is a race.
  for (const auto order : {emulation::Order::forward, emulation::Order::backward}) {
    emulation::set_order(order);
    auto& out = order == emulation::Order::forward ? results : others;
    args.out = out[0].tensor();
    args.style_out = backward ? out[1].tensor() : transfuse::AdainTensor();
    std::unique_ptr<transfuse::AdainMoments[]> moments(new transfuse::AdainMoments[style.moments.size()]);
    std::unique_ptr<transfuse::AdainShare[]> shares(new transfuse::AdainShare[content.moments.size()]);
    const char* error =
        transfuse::adain_cuda(direction, args, moments.get(), backward ? shares.get() : nullptr, nullptr);
    check(error == nullptr, what + ": " + (error == nullptr ? "" : error));
  }
  check(results[0].array.same_bytes(others[0].array) && results[1].array.same_bytes(others[1].array),
        what + ": depends on the order of threads");
  check(results[0].array.gaps_untouched() && results[1].array.gaps_untouched(), what + ": written outside");

  const auto style_at = [&](std::vector<int64_t> i) {
    for (size_t d = 0; d < 4; ++d)
      if (s.style[d] == 1) i[d] = 0;
    return (size_t)style.index(i);
  };
  std::vector<transfuse::AdainCoefficients> rules(content.moments.size());
  std::vector<transfuse::AdainShare> shares(style.moments.size());
  for_each_index(content.kept, [&](const std::vector<int64_t>& i) {
    transfuse::AdainShare share;
    const size_t at = (size_t)content.index(i), of = style_at(i);
    transfuse::adain_content_rule(direction, args.eps, content.moments[at], style.moments[of], &rules[at], &share);
    shares[of].mean += share.mean;
    shares[of].std += share.std;
    shares[of].std_tangent += share.std_tangent;
  });
  const auto compare = [&](const std::vector<int64_t>& n, const std::vector<AdainArray>& in, int count,
                           const AdainNaive& of, const AdainArray& got, const auto& rule, const std::string& name) {
    double worst = 0.0, largest = 0.0;
    for_each_index(n, [&](const std::vector<int64_t>& i) {
      const size_t at = (size_t)of.index(i);
      const transfuse::AdainCoefficients c = rule(at);
      double want = c.offset, size = std::fabs(c.offset);
      for (int k = 0; k < count; ++k) {
        const double term = c.factor[k] * (in[(size_t)k].get(i) - of.moments[at].mean[k]);
        want += term;
        size += std::fabs(term);
      }
      const double error = std::fabs(got.get(i) - want);
      worst = std::fmax(worst, std::isnan(error) ? 1e30 : error);
      largest = std::fmax(largest, size);
    });
    const double work = epsilon(statistics_of(dtype));
    check(worst <= (epsilon(dtype) + 64.0 * work) * largest + 1e-300,
          what + name + ": off by " + std::to_string(worst) + " of " + std::to_string(largest));
  };
  compare(s.content, x, inputs, content, results[0], [&](size_t at) { return rules[at]; }, " content");
  if (!backward) return;
  compare(
      s.style, y, styles, style, results[1],
      [&](size_t at) {
        transfuse::AdainCoefficients c;
        transfuse::adain_style_rule(direction, style.moments[at], shares[at], &c);
        return c;
      },
      " style");
}

inline void adain_cuda_selftest() {
  const std::vector<AdainCase> cases{
      {{2, 3, 8, 8}, {2, 3, 4, 4}, {false, false, true, true}, Layout::heads_first, false},    // whole packs
      {{2, 3, 5, 7}, {1, 3, 3, 3}, {false, false, true, true}, Layout::heads_first, false},    // no whole packs
      {{1, 2, 40, 64}, {1, 2, 16, 16}, {false, false, true, true}, Layout::offset, false},     // not aligned
      {{2, 2, 6, 5}, {2, 2, 6, 5}, {false, false, true, true}, Layout::spread, false},         // with gaps
      {{2, 37, 3, 2}, {1, 37, 2, 2}, {false, false, true, true}, Layout::heads_first, true},   // channels_last
      {{2, 70, 1, 3}, {2, 70, 2, 1}, {false, false, true, true}, Layout::offset, true},        // several blocks
      {{3, 2, 3, 5}, {2, 2, 3, 3}, {true, false, true, true}, Layout::heads_first, false},     // over the batch
      {{2, 3, 1, 1}, {2, 3, 1, 1}, {false, false, true, true}, Layout::heads_first, false},    // single elements
      {{2, 3, 2, 4}, {1, 1, 2, 4}, {false, false, false, true}, Layout::tokens_first, false},  // style axes of 1
  };
  const std::vector<DType> others{DType::bf16, DType::f64, DType::f16};
  uint64_t seed = 0;
  for (size_t i = 0; i < cases.size(); ++i)
    for (const auto direction :
         {AdainDirection::forward, AdainDirection::backward, AdainDirection::jvp, AdainDirection::jvp_backward}) {
      check_adain_cuda(cases[i], DType::f32, direction, ++seed);
      for (size_t k = 0; k < others.size(); ++k)
        if (i == 0 || (i % 3 == k && (size_t)direction == i % 4))
          check_adain_cuda(cases[i], others[k], direction, ++seed);
    }
}

}  // namespace selftest
