// Self-test of the token merging kernels against naive loops in double precision, and of what they do with plans that
// are none.
#pragma once

#include <algorithm>
#include <cmath>

#include "check.h"
#include "transfuse/token_merging.h"

namespace selftest {

using transfuse::MergeArgs;
using transfuse::NearestArgs;
using transfuse::Parallel;
using transfuse::token_merging_kernels;
using transfuse::TokenMergingKernels;
using transfuse::Weighting;

struct TokenSizes {
  int64_t batch, tokens, references, depth;
  DType dtype;
  Layout layout;
  bool shared = false;  // one set of references for the whole batch
  std::string name() const {
    return std::string(name_of(dtype)) + " B=" + std::to_string(batch) + " N=" + std::to_string(tokens) +
           " M=" + std::to_string(references) + " C=" + std::to_string(depth);
  }
};

inline double cosine(const Array& x, const Array& y, int64_t b, int64_t i, int64_t j) {
  double dot = 0, xx = 0, yy = 0;
  for (int64_t c = 0; c < x.shape()[2]; ++c) {
    const double u = x.get(b, i, c), v = y.get(b, j, c);
    dot += u * v;
    xx += u * u;
    yy += v * v;
  }
  return xx == 0 || yy == 0 ? 0 : dot / std::sqrt(xx * yy);
}

inline void check_nearest(const TokenSizes& s, uint64_t seed, const Parallel& parallel,
                          const TokenMergingKernels& kernels = token_merging_kernels()) {
  Random random(seed);
  const std::string what = "nearest " + s.name();
  Array x(s.dtype, {s.batch, s.tokens, s.depth}, s.layout);
  Array y(s.dtype, {s.batch, s.references, s.depth}, s.layout, {s.shared, false, false, false});
  x.randomize(random);
  y.randomize(random);
  if (s.tokens > 1) {
    for (int64_t c = 0; c < s.depth; ++c) x.set(0, 1, c, 0, 0.0);  // a zero vector
  }
  std::vector<uint8_t> mask((size_t)s.references);
  for (auto& m : mask) m = random.chance(70);
  const bool masked = random.chance(50), self = s.tokens == s.references && random.chance(50);
  Array near(statistics_of(s.dtype), {s.batch, s.tokens, 1});
  std::vector<int64_t> index((size_t)(s.batch * s.tokens), -7);
  NearestArgs a;
  a.dtype = s.dtype;
  a.batch = s.batch;
  a.rows = s.tokens;
  a.columns = s.references;
  a.depth = s.depth;
  a.x = x.view();
  a.reference = y.view();
  if (masked) a.mask = mask.data();
  a.mask_stride[1] = 1;
  a.exclude_self = self;
  a.similarity = near.data();
  a.index = index.data();
  kernels.nearest(a, parallel);
  const double band = 16 * epsilon(statistics_of(s.dtype));
  bool good = true;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t i = 0; i < s.tokens; ++i) {
      double best = -std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j < s.references; ++j)
        if ((!masked || mask[(size_t)j]) && !(self && i == j)) best = std::max(best, cosine(x, y, b, i, j));
      const double got = near.get(b, i, 0);
      const int64_t at = index[(size_t)(b * s.tokens + i)];
      if (std::isinf(best)) {
        good = good && got == best && at == -1;
      } else {
        good = good && std::fabs(got - best) <= band && at >= 0 && at < s.references &&
               std::fabs(cosine(x, y, b, i, at) - best) <= 2 * band && (!masked || mask[(size_t)at]) &&
               !(self && at == i);
      }
    }
  }
  check(good, what);
  check(x.gaps_untouched() && y.gaps_untouched(), what + ": inputs untouched");
}

// A plan from the kernel, checked to be one; then everything that uses it.
// `tells`: whether the kernels say that a plan names what does not exist. Otherwise they must only not read it.
inline void check_merging(const TokenSizes& s, uint64_t seed, const Parallel& parallel,
                          const TokenMergingKernels& kernels = token_merging_kernels(), bool tells = true) {
  Random random(seed);
  const std::string what = "merge " + s.name();
  Array x(s.dtype, {s.batch, s.tokens, s.depth}, s.layout);
  x.randomize(random);
  std::vector<int64_t> destination, protect;
  for (int64_t t = 0; t < s.tokens; ++t) {
    if (random.chance(30)) destination.push_back(t);
    if (random.chance(5)) protect.push_back(t);
  }
  int64_t open = 0, sources = 0;
  for (int64_t t = 0; t < s.tokens; ++t) {
    const bool kept = std::binary_search(protect.begin(), protect.end(), t);
    const bool is_destination = std::binary_search(destination.begin(), destination.end(), t);
    open += is_destination && !kept;
    sources += !is_destination && !kept;
  }
  const int64_t merged = open == 0 || sources == 0 ? 0 : random.below(sources + 1), rows = s.tokens - merged;
  std::vector<int64_t> row((size_t)(s.batch * s.tokens)), order(row.size()), start((size_t)(s.batch * (rows + 1)));
  transfuse::MatchArgs m;
  m.dtype = s.dtype;
  m.batch = s.batch;
  m.tokens = s.tokens;
  m.depth = s.depth;
  m.metric = x.view();
  m.destination = destination.data();
  m.destinations = (int64_t)destination.size();
  m.protect = protect.data();
  m.protects = (int64_t)protect.size();
  m.merged = merged;
  m.rows = row.data();
  m.order = order.data();
  m.start = start.data();
  kernels.match(m, parallel);
  bool good = true;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t* o = order.data() + b * s.tokens;
    const int64_t* first = start.data() + b * (rows + 1);
    std::vector<int64_t> seen(o, o + s.tokens);
    std::sort(seen.begin(), seen.end());
    for (int64_t t = 0; t < s.tokens; ++t) good = good && seen[(size_t)t] == t;
    good = good && first[0] == 0 && first[rows] == s.tokens;
    for (int64_t r = 0; r < rows && good; ++r) {
      good = first[r] < first[r + 1];
      for (int64_t k = first[r]; k < first[r + 1]; ++k) good = good && row[(size_t)(b * s.tokens + o[k])] == r;
    }
  }
  check(good, what + ": the plan is a partition");
  if (!good) return;

  MergeArgs a;
  a.dtype = s.dtype;
  a.depth = s.depth;
  a.plan = {s.batch, s.tokens, rows, row.data(), order.data(), start.data(), s.tokens, s.tokens, rows + 1};
  a.in = x.view();
  Array scale(statistics_of(s.dtype), {s.batch, s.tokens, 1});
  scale.randomize(random);
  {
    const std::string label = what + " average";
    Array weight(statistics_of(s.dtype), {s.batch, s.tokens, 1}), out(s.dtype, {s.batch, rows, s.depth});
    Array total(DType::f64, {s.batch, rows, 1}), want(DType::f64, {s.batch, rows, s.depth});
    total.fill(0);
    want.fill(0);
    weight.each([&](int64_t b, int64_t t, int64_t, int64_t) {
      weight.set(b, t, 0, 0, 1.5 + random.uniform());
      total.add(b, row[(size_t)(b * s.tokens + t)], 0, 0, weight.get(b, t, 0));
    });
    x.each([&](int64_t b, int64_t t, int64_t c, int64_t) {
      const int64_t r = row[(size_t)(b * s.tokens + t)];
      want.add(b, r, c, 0, weight.get(b, t, 0) * x.get(b, t, c) / total.get(b, r, 0));
    });
    a.weighting = Weighting::average;
    a.scale = weight.data();
    a.scale_stride = s.tokens;
    a.out = out.data();
    check(kernels.segments(a, parallel), label + ": accepts the plan");
    check_close(out, want, 2.0 + (double)s.tokens * (statistics_of(s.dtype) == s.dtype ? 1.0 : 0.0), epsilon(s.dtype),
                label);
  }
  for (const Weighting weighting : {Weighting::sum, Weighting::mean, Weighting::first}) {
    for (const bool scaled : {false, true}) {
      if (scaled && weighting != Weighting::sum) continue;
      const std::string label = what + " weighting " + std::to_string((int)weighting) + (scaled ? " scaled" : "");
      Array out(s.dtype, {s.batch, rows, s.depth}), want(DType::f64, {s.batch, rows, s.depth});
      Array back(s.dtype, {s.batch, s.tokens, s.depth}), expected(DType::f64, {s.batch, s.tokens, s.depth});
      want.fill(0);
      expected.fill(0);
      a.weighting = weighting;
      a.scale = scaled ? scale.data() : nullptr;
      a.scale_stride = s.tokens;
      a.in = x.view();
      a.out = out.data();
      check(kernels.segments(a, parallel), label + ": segments accepts the plan");
      const auto share = [&](int64_t b, int64_t t) {
        const int64_t r = row[(size_t)(b * s.tokens + t)], f = start[(size_t)(b * (rows + 1) + r)];
        const double count = (double)(start[(size_t)(b * (rows + 1) + r + 1)] - f);
        if (weighting == Weighting::mean) return 1.0 / count;
        if (weighting == Weighting::first) return order[(size_t)(b * s.tokens + f)] == t ? 1.0 : 0.0;
        return scaled ? scale.get(b, t, 0) : 1.0;
      };
      x.each([&](int64_t b, int64_t t, int64_t c, int64_t) {
        want.add(b, row[(size_t)(b * s.tokens + t)], c, 0, share(b, t) * x.get(b, t, c));
      });
      const double steps = 2.0 + (double)s.tokens * (statistics_of(s.dtype) == s.dtype ? 1.0 : 0.0);
      check_close(out, want, steps, epsilon(s.dtype), label + ": segments");
      a.in = out.view();
      a.out = back.data();
      check(kernels.gather(a, parallel), label + ": gather accepts the plan");
      back.each([&](int64_t b, int64_t t, int64_t c, int64_t) {
        expected.set(b, t, c, 0, share(b, t) * out.get(b, row[(size_t)(b * s.tokens + t)], c));
      });
      check_close(back, expected, 2, epsilon(s.dtype), label + ": gather");
    }
  }
  // Largest numbers, exactly, and who holds them.
  a.weighting = Weighting::sum;
  a.scale = nullptr;
  a.in = x.view();
  Array out(s.dtype, {s.batch, rows, s.depth});
  std::vector<int64_t> winner((size_t)(s.batch * rows * s.depth));
  a.out = out.data();
  a.winner = winner.data();
  check(kernels.amax(a, parallel), what + ": amax accepts the plan");
  good = true;
  out.each([&](int64_t b, int64_t r, int64_t c, int64_t) {
    const int64_t token = winner[(size_t)((b * rows + r) * s.depth + c)];
    good = good && row[(size_t)(b * s.tokens + token)] == r && x.get(b, token, c) == out.get(b, r, c);
  });
  x.each([&](int64_t b, int64_t t, int64_t c, int64_t) {
    const int64_t r = row[(size_t)(b * s.tokens + t)];
    const int64_t token = winner[(size_t)((b * rows + r) * s.depth + c)];
    good = good && (x.get(b, t, c) < out.get(b, r, c) || (x.get(b, t, c) == out.get(b, r, c) && token <= t));
  });
  check(good, what + ": amax");

  if (s.batch == 0 || s.tokens == 0) return;
  // What is no plan is refused, and nothing outside is read (which the sanitizers would see).
  for (const int64_t bad : {(int64_t)-1, s.tokens, (int64_t)1 << 40}) {
    std::vector<int64_t> broken = order;
    broken[(size_t)random.below((int64_t)broken.size())] = bad;
    a.plan.order = broken.data();
    check(kernels.amax(a, parallel) != tells, what + ": a token that is not there");
    a.plan.order = order.data();
    broken = row;
    broken[(size_t)random.below((int64_t)broken.size())] = bad;
    a.plan.row = broken.data();
    Array back(s.dtype, {s.batch, s.tokens, s.depth});
    a.in = out.view();
    a.out = back.data();
    check(kernels.gather(a, parallel) != tells, what + ": a row that is not there");
    a.plan.row = row.data();
    a.in = x.view();
    a.out = out.data();
  }
}

inline void check_push(const TokenSizes& s, uint64_t seed, const Parallel& parallel,
                       const TokenMergingKernels& kernels = token_merging_kernels()) {
  Random random(seed);
  const std::string what = "push " + s.name();
  Array x(s.dtype, {s.batch, s.tokens, s.depth}, s.layout), y(s.dtype, {s.batch, s.references, s.depth}, s.layout);
  Array near(statistics_of(s.dtype), {s.batch, s.tokens, 1}), out(s.dtype, {s.batch, s.tokens, s.depth});
  Array want(DType::f64, {s.batch, s.tokens, s.depth});
  x.randomize(random);
  y.randomize(random);
  near.randomize(random);
  std::vector<int64_t> index((size_t)(s.batch * s.tokens));
  for (auto& i : index) i = random.below(s.references);
  transfuse::PushArgs a;
  a.dtype = s.dtype;
  a.batch = s.batch;
  a.tokens = s.tokens;
  a.references = s.references;
  a.depth = s.depth;
  a.x = x.view();
  a.reference = y.view();
  a.similarity = near.data();
  a.index = index.data();
  a.alpha = 0.75;
  a.threshold = 0.125;
  a.out = out.data();
  check(kernels.push(a, parallel), what + ": accepts the index");
  x.each([&](int64_t b, int64_t t, int64_t c, int64_t) {
    const double v = x.get(b, t, c), w = y.get(b, index[(size_t)(b * s.tokens + t)], c);
    want.set(b, t, c, 0, near.get(b, t, 0) > 0.125 ? v + 0.75 * (v - w) : v);
  });
  check_close(out, want, 4, epsilon(s.dtype), what);
}

inline void token_merging_selftest(int cases) {
  const std::vector<DType> dtypes{DType::f32, DType::bf16, DType::f16, DType::f64};
  const std::vector<Layout> layouts{Layout::heads_first, Layout::tokens_first, Layout::spread, Layout::channels_strided,
                                    Layout::offset};
  const std::vector<int64_t> sizes{1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 95, 96, 97, 193};
  const std::vector<int64_t> depths{1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40, 64, 385, 770};
  uint64_t seed = 7000;
  for (int k = 0; k < 4 * cases; ++k) {
    Random random(++seed);
    TokenSizes s{1 + random.below(3), random.pick(sizes),  0,
                 random.pick(depths), random.pick(dtypes), random.pick(layouts)};
    s.references = random.chance(30) ? s.tokens : random.pick(sizes);
    const Parallel parallel = random.chance(50) ? transfuse::serial_parallel() : transfuse::std_thread_parallel(3);
    check_nearest(s, seed, parallel);
    check_merging(s, seed, parallel);
    check_push(s, seed, parallel);
  }
}

}  // namespace selftest
