// Self-test of the CUDA kernels of token merging, emulated: the naive loops of token_merging_selftest.h. Plans are made
// by the CPU, as there is no CUDA kernel for that.
#pragma once

#include <memory>

#include "cuda_emulation/fibers.h"
#include "cuda_emulation/tensor_core_instructions.h"
#include "token_merging_selftest.h"

namespace selftest {

// Runs `start` twice, blocks and threads in another order the second time, and compares `bytes` of the result.
template <class F>
inline void run_in_two_orders(const std::string& what, void* out, size_t bytes, const F& start) {
  emulation::set_order(emulation::Order::shuffled);
  const char* error = start();
  check(error == nullptr, what + ": " + (error == nullptr ? "" : error));
  const std::vector<char> first(static_cast<char*>(out), static_cast<char*>(out) + bytes);
  emulation::set_order(emulation::Order::forward);
  start();
  check(bytes == 0 || std::memcmp(first.data(), out, bytes) == 0, what + ": depends on the order of threads");
}

template <const char* (*kStart)(const MergeArgs&, void*)>
inline bool run_merge_on_cuda(const MergeArgs& a, const Parallel&) {
  const bool gather = kStart == &transfuse::merge_gather_cuda;
  const int64_t items = a.plan.batch * (gather ? a.plan.tokens : a.plan.rows) * a.depth;
  run_in_two_orders("cuda merge", a.out, (size_t)(items * transfuse::item_size(a.dtype)),
                    [&] { return kStart(a, nullptr); });
  return true;
}

inline bool run_push_on_cuda(const transfuse::PushArgs& a, const Parallel&) {
  run_in_two_orders("cuda push", a.out, (size_t)(a.batch * a.tokens * a.depth * transfuse::item_size(a.dtype)),
                    [&] { return transfuse::push_tokens_cuda(a, nullptr); });
  return true;
}

// Searches on tensor cores are those that copy in packs.
inline long& searches_on_tensor_cores() {
  static long count = 0;
  return count;
}

inline void run_nearest_on_cuda(const NearestArgs& a, const Parallel&) {
  const size_t items = (size_t)transfuse::nearest_tokens_cuda_working(a);
  std::unique_ptr<double[]> working(new double[items]);
  const long before = emulation::copies_begun();
  run_in_two_orders("cuda nearest", a.index, (size_t)(a.batch * a.rows) * sizeof(int64_t), [&] {
    std::memset(working.get(), 0x5a, items * sizeof(double));
    return transfuse::nearest_tokens_cuda(a, working.get(), nullptr);
  });
  check(emulation::bank_conflicts() == 0, "cuda nearest: operands in the same banks of shared memory");
  if (emulation::copies_begun() > before) ++searches_on_tensor_cores();
  check(emulation::copies_pending() == 0, "cuda nearest: copies that nobody has waited for");
}

inline void run_match_on_cpu(const transfuse::MatchArgs& a, const Parallel& parallel) {
  token_merging_kernels().match(a, parallel);
}

// What random numbers do not meet: equal references, NaN, vectors too short and too long, and nothing to choose from.
inline void check_nearest_specials(DType dtype, int64_t depth) {
  const std::string what = std::string("cuda nearest specials ") + name_of(dtype) + " C=" + std::to_string(depth);
  const int64_t references = 300;
  Array x(dtype, {1, 4, depth}), y(dtype, {1, references, depth}), near(statistics_of(dtype), {1, 4, 1});
  Random random(5);
  y.randomize(random);
  x.randomize(random);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (int64_t c = 0; c < depth; ++c) {
    // Four times the nearest of token 0; of these a lower one is a higher thread's, and some are of other tiles.
    for (const int64_t j : {10, 66, 131, 132}) y.set(0, j, c, 0, x.get(0, 0, c));
    y.set(0, 7, c, 0, nan);
    x.set(0, 1, c, 0, nan);
    x.set(0, 2, c, 0, 0.0);
  }
  std::vector<int64_t> index(4, -7);
  NearestArgs a;
  a.dtype = dtype;
  a.batch = 1;
  a.rows = 4;
  a.columns = references;
  a.depth = depth;
  a.x = x.view();
  a.reference = y.view();
  a.similarity = near.data();
  a.index = index.data();
  run_nearest_on_cuda(a, {});
  check(index[0] == 10, what + ": ties go to the lowest");
  check(index[1] == 0 && std::isnan(near.get(0, 1, 0)), what + ": nothing but NaN");
  check(index[2] == 0 && near.get(0, 2, 0) == 0.0, what + ": a zero vector");
  std::vector<uint8_t> mask((size_t)references, 0);
  a.mask = mask.data();
  a.mask_stride[1] = 1;
  run_nearest_on_cuda(a, {});
  check(index[3] == -1 && std::isinf(near.get(0, 3, 0)), what + ": nothing allowed");
  mask[7] = mask[9] = 1;
  run_nearest_on_cuda(a, {});
  check(index[3] == 9 && index[1] == 7 && std::isnan(near.get(0, 1, 0)), what + ": a NaN loses");
}

// Norms whose squares, and products, overflow: the same neighbours as without their scales.
inline void check_nearest_large(DType dtype, int64_t depth) {
  const std::string what =
      std::string("cuda nearest of large vectors ") + name_of(dtype) + " C=" + std::to_string(depth);
  const int64_t rows = 6, references = 140;
  const int high = dtype == DType::f64 ? 900 : 115, middle = high / 2;  // two middle ones do not overflow
  Array x(dtype, {1, rows, depth}), y(dtype, {1, references, depth}), near(statistics_of(dtype), {1, rows, 1});
  Array small_x = x, small_y = y;
  Random random(11);
  small_x.randomize(random);
  small_y.randomize(random);
  const auto scale = [&](const Array& from, Array* to, const std::vector<int>& exponents) {
    from.each([&](int64_t b, int64_t i, int64_t c, int64_t) {
      to->set(b, i, c, 0, std::ldexp(from.get(b, i, c), exponents[(size_t)i % exponents.size()]));
    });
  };
  std::vector<int64_t> index((size_t)rows, -7);
  NearestArgs a;
  a.dtype = dtype;
  a.batch = 1;
  a.rows = rows;
  a.columns = references;
  a.depth = depth;
  a.x = x.view();
  a.reference = y.view();
  a.similarity = near.data();
  a.index = index.data();
  // No product overflows; those of large rows do; those of large columns do too.
  for (const std::vector<int>& exponents : {std::vector<int>{0}, {middle}, {0, high, middle, -20}}) {
    scale(small_x, &x, {0, high, middle});
    scale(small_y, &y, exponents);
    run_nearest_on_cuda(a, {});
    bool good = true;
    for (int64_t i = 0; i < rows; ++i) {
      double best = -2;
      for (int64_t j = 0; j < references; ++j) best = std::max(best, cosine(small_x, small_y, 0, i, j));
      const double band = 16 * epsilon(statistics_of(dtype)), got = near.get(0, i, 0);
      const int64_t at = index[(size_t)i];
      good = good && std::fabs(got - best) <= band && at >= 0 && at < references &&
             std::fabs(cosine(small_x, small_y, 0, i, at) - best) <= 2 * band;
    }
    check(good, what);
  }
}

// Vectors among themselves: each is its own nearest, of cosine 1 but for the sums' rounding (token_nearest_half.cu).
inline void check_nearest_itself(DType dtype, int64_t depth) {
  const std::string what = std::string("cuda nearest of itself ") + name_of(dtype) + " C=" + std::to_string(depth);
  const int64_t rows = 7;
  Array x(dtype, {1, rows, depth}), near(DType::f32, {1, rows, 1});
  Random random(3);
  x.randomize(random);
  std::vector<int64_t> index((size_t)rows, -7);
  NearestArgs a;
  a.dtype = dtype;
  a.batch = 1;
  a.rows = a.columns = rows;
  a.depth = depth;
  a.x = a.reference = x.view();
  a.similarity = near.data();
  a.index = index.data();
  run_nearest_on_cuda(a, {});
  double worst = 0;
  bool good = true;
  for (int64_t i = 0; i < rows; ++i) {
    good = good && index[(size_t)i] == i;
    worst = std::fmax(worst, std::fabs(near.get(0, i, 0) - 1.0));
  }
  check(good, what + ": neighbours");
  check(worst <= (1.25 * (double)depth + 4.0) * epsilon(DType::f32), what + ": error " + std::to_string(worst));
}

// Around the edges of tiles of 128 x 128 and slices of 32 channels, with one and with several tiles to a block.
inline void check_nearest_on_tensor_cores(DType dtype, uint64_t seed, const TokenMergingKernels& kernels) {
  const Parallel serial = transfuse::serial_parallel();
  const long before = searches_on_tensor_cores();
  const std::vector<TokenSizes> sizes{
      {2, 65, 129, 40, dtype, Layout::heads_first},
      {1, 1, 1, 8, dtype, Layout::padded_rows},
      {1, 129, 64, 32, dtype, Layout::padded_packs},
      {4, 3, 300, 72, dtype, Layout::padded_packs, true},  // blocks of three tiles
      {5, 70, 200, 8, dtype, Layout::heads_first},         // and of two
      {1, 130, 130, 16, dtype, Layout::heads_first},
      {1, 130, 130, 16, dtype, Layout::padded_packs},
      {1, 5, 17, 136, dtype, Layout::padded_packs},
      {6, 66, 67, 40, dtype, Layout::heads_first},  // more than the blocks of a grid
  };
  for (const TokenSizes& s : sizes) check_nearest(s, ++seed, serial, kernels);
  check_nearest_specials(dtype, 16);
  check_nearest_itself(dtype, 320);
  if (dtype == DType::bf16) check_nearest_large(dtype, 16);
  const long searches = (long)sizes.size() + 3 + 1 + (dtype == DType::bf16 ? 3 : 0);
  check(searches_on_tensor_cores() - before == searches, std::string("cuda nearest on tensor cores ") + name_of(dtype));
}

inline void token_merging_cuda_selftest() {
  const transfuse::TokenMergingKernels kernels{run_nearest_on_cuda,
                                               run_match_on_cpu,
                                               run_merge_on_cuda<transfuse::merge_segments_cuda>,
                                               run_merge_on_cuda<transfuse::merge_amax_cuda>,
                                               run_merge_on_cuda<transfuse::merge_gather_cuda>,
                                               run_push_on_cuda};
  const Parallel serial = transfuse::serial_parallel();
  const std::vector<Layout> layouts{Layout::heads_first,      Layout::tokens_first, Layout::spread,
                                    Layout::channels_strided, Layout::offset,       Layout::padded_rows};
  uint64_t seed = 0;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    const auto check_all = [&](int64_t tokens, int64_t depth, Layout layout) {
      const TokenSizes s{1 + (int64_t)(seed % 2), tokens, 5, depth, dtype, layout};
      ++seed;
      check_merging(s, seed, serial, kernels, false);
      check_push(s, seed, serial, kernels);
    };
    for (const Layout layout : layouts) check_all(16, 16, layout);  // whole packs, if they are aligned
    for (const int64_t depth : {1, 17, 40, 320}) check_all(depth % 7 + 2, depth, Layout::heads_first);
    // Around the edges of a tile of 64 x 128 x 16.
    check_nearest({2, 65, 129, 17, dtype, Layout::offset}, ++seed, serial, kernels);
    check_nearest({1, 3, 3, 16, dtype, Layout::channels_strided}, ++seed, serial, kernels);
    const long before = searches_on_tensor_cores();
    check_nearest_specials(dtype, 9);
    if (dtype != DType::f16) check_nearest_large(dtype, 9);
    check(searches_on_tensor_cores() == before, std::string("cuda nearest on CUDA cores ") + name_of(dtype));
  }
  for (const DType dtype : {DType::bf16, DType::f16}) check_nearest_on_tensor_cores(dtype, ++seed * 100, kernels);
}

}  // namespace selftest
