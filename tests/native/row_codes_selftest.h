// Self-test of row_codes: codes against the definition, one number at a time.
#pragma once

#include "check.h"
#include "transfuse/row_codes.h"

namespace selftest {

inline void check_row_codes(uint64_t number) {
  Random r(number);
  const DType dtype = r.pick(std::vector<DType>{DType::f32, DType::f64, DType::bf16, DType::f16});
  const int64_t rows = 1 + r.below(150), columns = r.pick(std::vector<int64_t>{0, 1, 3, 17, 515});
  const Layout layout = r.pick(std::vector<Layout>{Layout::heads_first, Layout::spread, Layout::channels_strided});
  Array x(dtype, {1, 1, rows, columns}, layout);
  x.randomize(r, 1.5);
  if (columns > 0) x.set(0, 0, 0, 0, -0.0);
  transfuse::RowCodesArgs a;
  a.dtype = dtype;
  a.x = x.data();
  a.rows = rows, a.columns = columns;
  a.stride[0] = x.stride(2), a.stride[1] = x.stride(3);
  a.wrap = r.chance(50);
  std::vector<float> edges;
  if (r.chance(70))
    for (int64_t e = 0, count = r.chance(50) ? 30 : 100; e < count; ++e) edges.push_back(-1.0f + 0.02f * (float)e);
  a.edges = edges.empty() ? nullptr : edges.data();
  a.edge_count = (int64_t)edges.size();
  std::vector<int64_t> codes((size_t)(2 * rows)), codes3 = codes, want;
  int64_t counts[2], counts3[2], below = 0;
  a.codes = codes.data(), a.counts = counts;
  transfuse::row_codes_kernels().run(a, transfuse::serial_parallel());
  a.codes = codes3.data(), a.counts = counts3;
  transfuse::row_codes_kernels().run(a, transfuse::std_thread_parallel(3));
  for (int64_t i = 0; i < rows; ++i) {
    uint64_t one = 0, two = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const double v = x.get(0, 0, i, c) + 0.0;
      uint64_t symbol;
      std::memcpy(&symbol, &v, 8);
      if (!edges.empty()) {
        int64_t cell = -1;
        for (const float e : edges) cell += (float)v >= e;
        below += cell < 0;
        symbol = (uint64_t)(cell >= 0 ? cell : a.wrap ? a.edge_count - 1 : 0);
      }
      const uint64_t half = transfuse::first_half(symbol, transfuse::column_key((uint64_t)c));
      one += half;
      two += transfuse::second_half(half);
    }
    want.push_back((int64_t)transfuse::mix_bits(one));
    want.push_back((int64_t)transfuse::mix_bits(two));
  }
  const std::string name = std::string("row_codes ") + name_of(dtype) + ", case " + std::to_string(number);
  check(codes == want, name);
  check(codes3 == want, name + ": 3 threads give other codes");
  check(counts[0] == 0 && counts[1] == below && counts3[1] == below, name + ": counts");
}

inline void row_codes_selftest(int cases) {
  for (int i = 0; i < cases; ++i) check_row_codes(95000 + (uint64_t)i);
}

}  // namespace selftest
