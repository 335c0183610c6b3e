// Self-test of attention within windows: the window map against its definition, and every direction of the kernels
// against the same kernels without windows under the mask that the definition gives.
#pragma once

#include <random>
#include <vector>

#include "check.h"
#include "transfuse/windows.h"

namespace selftest {

struct WindowedProblem {
  transfuse::WindowGrid grid;
  int64_t batch = 2, heads = 4, kv_heads = 2, width = 5, value_width = 3, tokens = 0;
  std::vector<double> query, key, value, bias, grad, query_t, key_t, value_t, bias_t;
  std::vector<int64_t> owner, slot;  // of each token, numbered over all axes
};

inline std::vector<double> normals(std::mt19937_64& random, int64_t count) {
  std::normal_distribution<double> normal;
  std::vector<double> x((size_t)count);
  for (double& v : x) v = normal(random);
  return x;
}

inline WindowedProblem make_windowed(uint64_t seed) {
  using Grid = transfuse::WindowGrid;
  std::mt19937_64 random(seed);
  const auto pick = [&](int64_t low, int64_t high) { return low + (int64_t)(random() % (uint64_t)(high - low + 1)); };
  WindowedProblem p;
  Grid& g = p.grid;
  g.axes = (int)pick(1, 3);
  g.wrap = (Grid::Wrap)pick(0, 2);
  g.pad = pick(0, 1) != 0;
  g.bias = (Grid::Bias)pick(0, 2);
  for (int a = 0; a < g.axes; ++a) {
    g.size[a] = g.axes == 1 ? pick(0, 300) : pick(1, g.axes == 2 ? 13 : 5);
    g.window[a] = pick(1, g.axes == 1 ? 260 : 6);
    g.shift[a] = pick(-7, 7);
  }
  p.tokens = g.tokens();
  p.owner.assign((size_t)p.tokens, 0);
  p.slot.assign((size_t)p.tokens, 0);
  for (int64_t t = 0; t < p.tokens; ++t) {
    int64_t rest = t, place[transfuse::kMaxWindowAxes];
    for (int a = g.axes - 1; a >= 0; --a) {
      place[a] = rest % g.size[a];
      rest /= g.size[a];
    }
    for (int a = 0; a < g.axes; ++a) {
      const int64_t n = g.size[a], w = g.window[a], y = place[a];
      int64_t position, part = 0;
      if (g.wrap == Grid::Wrap::anchored) {
        position = y + ((-g.shift[a]) % w + w) % w;
      } else {
        const int64_t period = g.pad ? (n + w - 1) / w * w : n, turned = (g.shift[a] % period + period) % period;
        position = (y - turned + period) % period;
        part = g.wrap == Grid::Wrap::split && y < turned ? 1 : 0;
      }
      p.owner[(size_t)t] = p.owner[(size_t)t] * 1000 + 2 * (position / w) + part;
      p.slot[(size_t)t] = p.slot[(size_t)t] * w + position % w;
    }
  }
  const int64_t rows = p.batch * p.heads * p.tokens, keys = p.batch * p.kv_heads * p.tokens;
  p.query = normals(random, rows * p.width);
  p.query_t = normals(random, rows * p.width);
  p.grad = normals(random, rows * p.value_width);
  p.key = normals(random, keys * p.width);
  p.key_t = normals(random, keys * p.width);
  p.value = normals(random, keys * p.value_width);
  p.value_t = normals(random, keys * p.value_width);
  p.bias = normals(random, p.heads * g.bias_codes());
  p.bias_t = normals(random, p.heads * g.bias_codes());
  return p;
}

// Entry of the bias of one head for a query slot and a key slot.
inline int64_t bias_code(const transfuse::WindowGrid& g, int64_t query_slot, int64_t key_slot) {
  int64_t slots = 1, code = 0, step = 1;
  for (int a = 0; a < g.axes; ++a) slots *= g.window[a];
  if (g.bias == transfuse::WindowGrid::Bias::full) return query_slot * slots + key_slot;
  for (int a = g.axes - 1; a >= 0; --a) {
    code += (query_slot % g.window[a] - key_slot % g.window[a] + g.window[a] - 1) * step;
    query_slot /= g.window[a];
    key_slot /= g.window[a];
    step *= 2 * g.window[a] - 1;
  }
  return code;
}

struct WindowedResults {
  std::vector<double> out, lse, out_t, lse_t, grad_query, grad_key, grad_value, grad_bias;
};

inline transfuse::View rows_of(const std::vector<double>& x, int64_t heads, int64_t tokens, int64_t width) {
  transfuse::View v;
  v.ptr = x.data();
  v.dtype = transfuse::DType::f64;
  v.stride[0] = heads * tokens * width;
  v.stride[1] = tokens * width;
  v.stride[2] = width;
  v.stride[3] = 1;
  return v;
}
inline transfuse::MutableView rows_to(std::vector<double>& x, int64_t heads, int64_t tokens, int64_t width) {
  transfuse::MutableView v;
  v.ptr = x.data();
  v.dtype = transfuse::DType::f64;
  const transfuse::View same = rows_of(x, heads, tokens, width);
  for (int d = 0; d < 4; ++d) v.stride[d] = same.stride[d];
  return v;
}

// All four directions; `windows` or, without it, a dense bias and mask over all pairs of tokens.
inline WindowedResults run_windowed(const WindowedProblem& p, bool windows, bool second,
                                    const transfuse::Parallel& parallel) {
  using namespace transfuse;
  const int64_t n = p.tokens, codes = p.grid.bias_codes();
  const WindowMap map(p.grid);
  AttentionShape shape{p.batch, p.heads, p.kv_heads, n, p.width, p.value_width, DType::f64, {}};
  SourceView source;
  source.key = rows_of(p.key, p.kv_heads, n, p.width);
  source.value = rows_of(p.value, p.kv_heads, n, p.value_width);
  source.batch = p.batch;
  source.length = n;
  source.scale = 0.7;
  SourceTangent tangent;
  tangent.key = rows_of(p.key_t, p.kv_heads, n, p.width);
  tangent.value = rows_of(p.value_t, p.kv_heads, n, p.value_width);
  std::vector<double> dense((size_t)(codes > 0 ? p.heads * n * n : 0)), dense_t(dense.size());
  std::vector<uint8_t> mask((size_t)(n * n));
  const int64_t bias_size = codes == 0 ? 0 : windows ? p.heads * codes : p.heads * n * n;
  WindowedResults r;
  r.grad_bias.assign((size_t)bias_size, 0.0);
  MutableView bias_gradient;
  if (windows) {
    shape.windows = map.view();
    source.windowed = true;
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const bool same = p.owner[(size_t)i] == p.owner[(size_t)j];
        mask[(size_t)(i * n + j)] = same ? 1 : 0;
        if (!same || codes == 0) continue;
        const int64_t code = bias_code(p.grid, p.slot[(size_t)i], p.slot[(size_t)j]);
        for (int64_t h = 0; h < p.heads; ++h) {
          dense[(size_t)((h * n + i) * n + j)] = p.bias[(size_t)(h * codes + code)];
          dense_t[(size_t)((h * n + i) * n + j)] = p.bias_t[(size_t)(h * codes + code)];
        }
      }
    source.mask.ptr = mask.data();
    source.mask.stride[2] = n;
    source.mask.stride[3] = 1;
  }
  if (codes > 0 && n > 0) {
    source.bias.ptr = windows ? p.bias.data() : dense.data();
    tangent.bias.ptr = windows ? p.bias_t.data() : dense_t.data();
    bias_gradient.ptr = r.grad_bias.data();
    for (View* v : {&source.bias, &tangent.bias}) {
      v->dtype = DType::f64;
      v->stride[1] = windows ? codes : n * n;
      v->stride[2] = windows ? 0 : n;
      v->stride[3] = 1;
    }
    bias_gradient.dtype = DType::f64;
    for (int d = 0; d < 4; ++d) bias_gradient.stride[d] = source.bias.stride[d];
  }
  const size_t rows = (size_t)(p.batch * p.heads * n), keys = (size_t)(p.batch * p.kv_heads * n);
  const double unset = std::numeric_limits<double>::quiet_NaN();
  r.out.assign(rows * (size_t)p.value_width, unset);
  r.out_t = r.out;
  r.lse.assign(rows, unset);
  r.lse_t = r.lse;
  r.grad_query.assign(rows * (size_t)p.width, 0.0);
  r.grad_key.assign(keys * (size_t)p.width, unset);
  r.grad_value.assign(keys * (size_t)p.value_width, unset);
  const View query = rows_of(p.query, p.heads, n, p.width);
  const Weight gate;
  attention_kernels().forward(
      {shape, query, {}, &source, 1, 1, &gate, rows_to(r.out, p.heads, n, p.value_width), r.lse.data()}, parallel);
  const View out = rows_of(r.out, p.heads, n, p.value_width), query_t = rows_of(p.query_t, p.heads, n, p.width);
  attention_kernels().tangent({shape, query, query_t, &source, &tangent, 1, out, r.lse.data(),
                               rows_to(r.out_t, p.heads, n, p.value_width), r.lse_t.data()},
                              parallel);
  SourceGradient gradient;
  gradient.key = rows_to(r.grad_key, p.kv_heads, n, p.width);
  gradient.value = rows_to(r.grad_value, p.kv_heads, n, p.value_width);
  gradient.bias = bias_gradient;
  AttentionBackward backward{};
  backward.shape = shape;
  backward.query = query;
  backward.sources = &source;
  backward.source_count = 1;
  backward.out = out;
  backward.grad_out = rows_of(p.grad, p.heads, n, p.value_width);
  backward.lse = r.lse.data();
  backward.grad_query = rows_to(r.grad_query, p.heads, n, p.width);
  backward.gradients = &gradient;
  if (second) {
    backward.query_tangent = query_t;
    backward.tangents = &tangent;
    backward.out_tangent = rows_of(r.out_t, p.heads, n, p.value_width);
    backward.lse_tangent = r.lse_t.data();
  }
  attention_kernels().backward(backward, parallel);
  if (!windows && codes > 0) {  // back to codes
    std::vector<double> sums((size_t)(p.heads * codes), 0.0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        if (p.owner[(size_t)i] != p.owner[(size_t)j]) continue;
        const int64_t code = bias_code(p.grid, p.slot[(size_t)i], p.slot[(size_t)j]);
        for (int64_t h = 0; h < p.heads; ++h)
          sums[(size_t)(h * codes + code)] += r.grad_bias[(size_t)((h * n + i) * n + j)];
      }
    r.grad_bias = sums;
  }
  return r;
}

inline void check_near(const std::vector<double>& got, const std::vector<double>& want, const std::string& what) {
  double worst = got.size() == want.size() ? 0.0 : INFINITY, largest = 1.0;
  for (size_t i = 0; i < got.size() && i < want.size(); ++i) {
    const double gap = got[i] == want[i] ? 0.0 : std::fabs(got[i] - want[i]);
    worst = gap <= worst ? worst : gap;  // written so that NaN stays
    largest = std::fmax(largest, std::fabs(want[i]));
  }
  check(worst <= 1e-12 * largest, what + ": differs by " + std::to_string(worst));
}

inline void window_selftest(int cases) {
  const transfuse::Parallel one = transfuse::serial_parallel(), three = transfuse::std_thread_parallel(3);
  for (uint64_t seed = 0; seed < (uint64_t)cases; ++seed) {
    const WindowedProblem p = make_windowed(seed);
    const std::string name = "windows case " + std::to_string(seed);
    for (const bool second : {false, true}) {
      const WindowedResults got = run_windowed(p, true, second, one), want = run_windowed(p, false, second, one);
      check_near(got.out, want.out, name + " out");
      check_near(got.lse, want.lse, name + " lse");
      check_near(got.out_t, want.out_t, name + " tangent");
      check_near(got.lse_t, want.lse_t, name + " tangent of lse");
      check_near(got.grad_query, want.grad_query, name + " dq");
      check_near(got.grad_key, want.grad_key, name + " dk");
      check_near(got.grad_value, want.grad_value, name + " dv");
      check_near(got.grad_bias, want.grad_bias, name + " dbias");
      const WindowedResults again = run_windowed(p, true, second, three);
      check(again.grad_bias == got.grad_bias && again.grad_key == got.grad_key && again.out == got.out,
            name + ": depends on the number of threads");
    }
  }
}

}  // namespace selftest
