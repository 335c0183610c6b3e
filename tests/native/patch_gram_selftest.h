// Self-test of patch_gram: sums over patches, one pixel at a time in double, against the kernels.
#pragma once

#include <algorithm>

#include "check.h"
#include "transfuse/patch_gram.h"

namespace selftest {

inline void check_patch_gram(uint64_t number) {
  Random r(number);
  const DType dtype = r.pick(std::vector<DType>{DType::f32, DType::f64, DType::bf16, DType::f16});
  transfuse::PatchGramArgs args;
  args.dtype = dtype;
  const int64_t batch = 1 + r.below(3), channels = 1 + r.below(5);
  for (int d = 0; d < 2; ++d) {
    args.kernel[d] = 1 + r.below(5);
    args.step[d] = 1 + r.below(4);
    args.padding[d] = r.below(4);
    args.dilation[d] = 1 + r.below(3);
    const int64_t reach = args.dilation[d] * (args.kernel[d] - 1) + 1;
    args.size[3 + d] = std::max<int64_t>(1, reach - 2 * args.padding[d]) + r.below(20);
    args.count[d] = (args.size[3 + d] + 2 * args.padding[d] - reach) / args.step[d] + 1;
  }
  const Layout layout = r.pick(std::vector<Layout>{Layout::heads_first, Layout::spread, Layout::channels_strided});
  Array x(dtype, {batch, channels, args.size[3], args.size[4]}, layout);
  x.randomize(r);
  args.x = x.data();
  args.size[0] = 1;
  args.size[1] = batch;
  args.size[2] = channels;
  for (int d = 0; d < 4; ++d) args.stride[1 + d] = x.stride(d);
  const int64_t kh = args.kernel[0], kw = args.kernel[1], n = channels * kh * kw;
  const DType kind = statistics_of(dtype);
  Array out(kind, {1, 1, n, n}), out3 = out, want(DType::f64, {1, 1, n, n});
  args.out = out.data();
  transfuse::patch_gram_kernels().run(args, transfuse::serial_parallel());
  args.out = out3.data();
  transfuse::patch_gram_kernels().run(args, transfuse::std_thread_parallel(3));

  want.fill(0.0);
  std::vector<double> patch((size_t)n);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t v = 0; v < args.count[0]; ++v)
      for (int64_t u = 0; u < args.count[1]; ++u) {
        for (int64_t f = 0; f < n; ++f) {
          const int64_t y = v * args.step[0] - args.padding[0] + f / kw % kh * args.dilation[0];
          const int64_t column = u * args.step[1] - args.padding[1] + f % kw * args.dilation[1];
          const bool inside = y >= 0 && y < args.size[3] && column >= 0 && column < args.size[4];
          patch[(size_t)f] = inside ? x.get(b, f / (kh * kw), y, column) : 0.0;
        }
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < n; ++j) want.add(0, 0, i, j, patch[(size_t)i] * patch[(size_t)j]);
      }
  const std::string name = std::string("patch_gram ") + name_of(dtype) + ", case " + std::to_string(number);
  check_close(out, want, 8.0, epsilon(kind), name);
  check(out3.same_bytes(out), name + ": 3 threads give other bits");
}

inline void patch_gram_selftest(int cases) {
  for (int i = 0; i < 3 * cases; ++i) check_patch_gram(70000 + (uint64_t)i);
}

}  // namespace selftest
