// Self-test of the CUDA kernels of token merging, emulated: the naive loops of token_merging_selftest.h. Plans are made
// by the CPU, as there is no CUDA kernel for that.
#pragma once

#include <memory>

#include "cuda_emulation/fibers.h"
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

inline void run_nearest_on_cuda(const NearestArgs& a, const Parallel&) {
  const int64_t size = transfuse::item_size(statistics_of(a.dtype));
  const size_t bytes = (size_t)(a.batch * (a.rows + a.columns) * size);
  std::unique_ptr<double[]> inverse(new double[(bytes + 7) / 8]);
  run_in_two_orders("cuda nearest", a.index, (size_t)(a.batch * a.rows) * sizeof(int64_t),
                    [&] { return transfuse::nearest_tokens_cuda(a, inverse.get(), nullptr); });
}

inline void run_match_on_cpu(const transfuse::MatchArgs& a, const Parallel& parallel) {
  token_merging_kernels().match(a, parallel);
}

// What random numbers do not meet: equal references, NaN, vectors too short and too long, and nothing to choose from.
inline void check_nearest_specials(DType dtype) {
  const std::string what = std::string("cuda nearest specials ") + name_of(dtype);
  const int64_t references = 300, depth = 9;
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
    check_nearest_specials(dtype);
  }
}

}  // namespace selftest
