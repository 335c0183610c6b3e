// Self-test of the attention kernels against naive loops in double precision: forward with every option, backward,
// Jacobian-vector product and its backward. The loops themselves are checked by finite differences first.
#pragma once

#include "attention_naive.h"

namespace selftest {

// ---- making problems -----------------------------------------------------------------------------------------------

struct Wish {  // what a problem should be; the rest is drawn
  DType dtype = DType::f32;
  int64_t batch = 2, heads = 2, kv_heads = 2, queries = 33, key_dim = 40, value_dim = 40;
  std::vector<int64_t> lengths{65};
  bool plain = false;      // no mask, bias, causal rule or index map
  bool full = false;       // groups, gates and blends as well
  double amplitude = 1.0;  // of the query: large ones make large logits
};

inline Layout some_layout(Random& r) {
  return r.pick<Layout>(
      {Layout::heads_first, Layout::tokens_first, Layout::spread, Layout::channels_strided, Layout::offset});
}
// Layouts whose channels lie side by side, as the gradient of the query is allocated.
inline Layout dense_layout(Random& r) {
  return r.pick<Layout>({Layout::heads_first, Layout::tokens_first, Layout::spread});
}

inline Mix make_mix(Random& r, const Wish& wish, int64_t batch, int64_t heads, int64_t tokens) {
  Mix mix;
  const int64_t others = batch == 0 ? 1 : r.chance(50) ? batch : 1 + r.below(3);
  mix.other = Array(wish.dtype, {others, heads, tokens, wish.key_dim}, some_layout(r));
  mix.other.randomize(r);
  if (others != batch && others != 1)
    for (int64_t b = 0; b < batch; ++b) mix.index.push_back(r.below(others));
  mix.weight = r.pick<double>({0.0, 0.25, 0.75, 1.0});
  if (r.chance(40)) {
    mix.weights = Array(r.chance(50) ? wish.dtype : DType::f32, {batch, heads, tokens}, Layout::heads_first,
                        {r.chance(50), r.chance(50), r.chance(50), false});
    mix.weights.each([&](int64_t b, int64_t h, int64_t t, int64_t d) {
      mix.weights.set(b, h, t, d, r.pick<double>({0.0, 1.0, 0.5, std::fabs(r.uniform())}));
    });
  }
  return mix;
}

inline Source make_source(Random& r, const Wish& wish, int64_t length) {
  Source s;
  s.length = length;
  s.batch = wish.batch;
  if (!wish.plain && r.chance(30)) s.batch = 1;
  if (!wish.plain && r.chance(30)) {
    s.batch = 1 + r.below(3);
    for (int64_t b = 0; b < wish.batch; ++b) s.index.push_back(r.below(s.batch));
  }
  if (s.batch == 0) s.batch = 1;
  if (s.index.empty() && s.batch != 1 && s.batch != wish.batch) s.batch = 1;
  s.key = Array(wish.dtype, {s.batch, wish.kv_heads, length, wish.key_dim}, some_layout(r));
  s.value = Array(wish.dtype, {s.batch, wish.kv_heads, length, wish.value_dim}, some_layout(r));
  s.key_tangent = Array(wish.dtype, s.key.shape(), some_layout(r));
  s.value_tangent = Array(wish.dtype, s.value.shape(), some_layout(r));
  for (Array* x : {&s.key, &s.value, &s.key_tangent, &s.value_tangent}) x->randomize(r);
  s.scale = 1.0 / std::sqrt((double)wish.key_dim);
  if (wish.plain) return s;
  s.scale *= r.pick<double>({1.0, 1.0, 1.5, 0.5, 0.0, -1.0});
  s.causal = r.pick<Causal>({Causal::none, Causal::none, Causal::upper_left, Causal::lower_right});
  const std::vector<int64_t> full{wish.batch, wish.heads, wish.queries, length};
  if (r.chance(40) && length > 0) {
    std::vector<bool> reduced{r.chance(50), r.chance(50), r.chance(30), r.chance(30)};
    s.bias = Array(r.chance(50) ? wish.dtype : DType::f32, full, some_layout(r), reduced);
    s.bias.randomize(r, 2.0);
    s.bias_tangent = Array(s.bias.dtype(), full, Layout::heads_first, reduced);
    s.bias_tangent.randomize(r);
    if (r.chance(40))
      s.bias.each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
        if (r.chance(10)) s.bias.set(a, b, c, d, minus_infinity());
      });
  }
  if (r.chance(50)) {
    std::vector<int64_t> shape = full;
    for (int d = 0; d < 4; ++d)
      if (r.chance(d < 2 ? 50 : 20)) shape[(size_t)d] = 1;
    s.mask.make(shape, r.chance(30) ? 2 : 1);
    const int kind = (int)r.below(3);
    const int64_t block = r.pick<int64_t>({16, 48, 96});
    if (!s.mask.held.empty())
      for (int64_t b = 0; b < shape[0]; ++b)
        for (int64_t h = 0; h < shape[1]; ++h)
          for (int64_t i = 0; i < shape[2]; ++i)
            for (int64_t j = 0; j < shape[3]; ++j)
              s.mask.at(b, h, i, j) = kind == 0   ? (uint8_t)(r.chance(70) ? r.pick<int>({1, 255}) : 0)
                                      : kind == 1 ? (uint8_t)((i / 32 + j / block) % 2)
                                                  : (uint8_t)(i % 5 != 0);
  }
  return s;
}

inline Problem make_problem(uint64_t seed, const Wish& wish) {
  Random r(seed);
  Problem p;
  p.shape = {wish.batch, wish.heads, wish.kv_heads, wish.queries, wish.key_dim, wish.value_dim, wish.dtype};
  const std::vector<int64_t> rows{wish.batch, wish.heads, wish.queries, wish.key_dim};
  p.query = Array(wish.dtype, rows, some_layout(r));
  p.query.randomize(r, wish.amplitude);
  p.query_tangent = Array(wish.dtype, rows, some_layout(r));
  p.query_tangent.randomize(r);
  p.grad_out = p.like_output(wish.dtype, wish.value_dim, some_layout(r));
  p.grad_out.randomize(r);
  if (r.chance(70)) {
    p.grad_lse = p.like_output(statistics_of(wish.dtype), 1, Layout::heads_first);
    p.grad_lse.randomize(r);
  }
  for (const int64_t length : wish.lengths) p.sources.push_back(make_source(r, wish, length));
  if (wish.full) {
    const int groups = 1 + (int)r.below((int64_t)wish.lengths.size());
    p.gates.resize((size_t)groups);
    for (size_t s = 0; s < p.sources.size(); ++s) p.sources[s].group = (int)s < groups ? (int)s : (int)r.below(groups);
    for (Gate& gate : p.gates) {
      gate.value = r.pick<double>({1.0, 0.5, 0.0, -0.25});
      if (r.chance(40)) {
        gate.tensor = Array(r.chance(50) ? wish.dtype : DType::f32, {wish.batch, wish.heads, wish.queries},
                            Layout::heads_first, {r.chance(50), r.chance(50), r.chance(50), false});
        gate.tensor.randomize(r);
      }
    }
    if (r.chance(60)) p.mix = make_mix(r, wish, wish.batch, wish.heads, wish.queries);
    for (Source& s : p.sources)
      if (r.chance(40)) s.mix = make_mix(r, wish, s.batch, wish.kv_heads, s.length);
  }
  char text[200];
  std::snprintf(text, sizeof text, "attention case %llu %s B%lld H%lld/%lld N%lld M%lld%s D%lld Dv%lld",
                (unsigned long long)seed, name_of(wish.dtype), (long long)wish.batch, (long long)wish.heads,
                (long long)wish.kv_heads, (long long)wish.queries, (long long)wish.lengths[0],
                wish.lengths.size() > 1 ? "+" : "", (long long)wish.key_dim, (long long)wish.value_dim);
  p.name = text;
  return p;
}

// ---- running the kernels -------------------------------------------------------------------------------------------

// Calls run(arguments) for a forward pass into `f`.
template <class F>
inline auto with_forward_arguments(const Problem& p, Forward* f, bool with_lse, const F& run) {
  const auto sources = p.views();
  std::vector<transfuse::Weight> gates;
  for (const Gate& gate : p.gates) {
    transfuse::Weight w;
    w.view = gate.tensor.view();
    w.value = gate.value;
    gates.push_back(w);
  }
  transfuse::AttentionForward args{};
  args.shape = p.shape;
  args.query = p.query.view();
  args.query_blend = p.mix.view();
  args.sources = sources.data();
  args.source_count = (int)sources.size();
  args.group_count = (int)gates.size();
  args.gates = gates.data();
  args.out = f->out.mutable_view();
  args.lse = with_lse ? f->lse.data() : nullptr;
  return run(args);
}

inline Forward run_forward(const Problem& p, const transfuse::Parallel& parallel, Layout layout, bool with_lse) {
  Forward f{p.like_output(p.shape.dtype, p.shape.value_dim, layout),
            p.like_output(statistics_of(p.shape.dtype), 1, Layout::heads_first)};
  with_forward_arguments(p, &f, with_lse, [&](const transfuse::AttentionForward& args) {
    transfuse::attention_kernels().forward(args, parallel);
  });
  return f;
}

inline std::vector<transfuse::SourceTangent> tangent_views(const Problem& p) {
  std::vector<transfuse::SourceTangent> views;
  for (const Source& s : p.sources)
    views.push_back({s.key_tangent.view(), s.value_tangent.view(), s.bias_tangent.view()});
  return views;
}

inline Tangents run_tangent(const Problem& p, const Forward& f, const transfuse::Parallel& parallel, Layout layout) {
  Tangents t{p.like_output(p.shape.dtype, p.shape.value_dim, layout),
             p.like_output(statistics_of(p.shape.dtype), 1, Layout::heads_first)};
  const auto sources = p.views();
  const auto tangents = tangent_views(p);
  transfuse::AttentionTangent args{};
  args.shape = p.shape;
  args.query = p.query.view();
  args.query_tangent = p.query_tangent.view();
  args.sources = sources.data();
  args.tangents = tangents.data();
  args.source_count = (int)sources.size();
  args.out = f.out.view();
  args.lse = f.lse.data();
  args.out_tangent = t.out.mutable_view();
  args.lse_tangent = t.lse.data();
  transfuse::attention_kernels().tangent(args, parallel);
  return t;
}

// With tangents: of the Jacobian-vector product.
inline Gradients run_backward(const Problem& p, const Forward& f, const Tangents* t,
                              const transfuse::Parallel& parallel, Layout layout) {
  const DType wide = statistics_of(p.shape.dtype);
  Gradients g;
  g.query = p.like_output(wide, p.shape.key_dim, layout);
  g.query.fill(0.0);  // added to
  const auto sources = p.views();
  const auto tangents = tangent_views(p);
  std::vector<transfuse::SourceGradient> gradients(sources.size());
  for (const Source& s : p.sources) {
    g.keys.emplace_back(p.shape.dtype, s.key.shape(), layout);  // NaN until written
    g.values.emplace_back(p.shape.dtype, s.value.shape(), layout);
    g.biases.emplace_back();
    if (!s.bias.exists()) continue;
    std::vector<bool> reduced;
    for (int d = 0; d < 4; ++d) reduced.push_back(s.bias.stride(d) == 0);
    g.biases.back() = Array(wide, s.bias.shape(), Layout::heads_first, reduced);
    g.biases.back().fill(0.0);
  }
  for (size_t i = 0; i < sources.size(); ++i)
    gradients[i] = {g.keys[i].mutable_view(), g.values[i].mutable_view(), g.biases[i].mutable_view()};
  transfuse::AttentionBackward args{};
  args.shape = p.shape;
  args.query = p.query.view();
  args.sources = sources.data();
  args.source_count = (int)sources.size();
  args.out = f.out.view();
  args.grad_out = p.grad_out.view();
  args.lse = f.lse.data();
  args.grad_lse = p.grad_lse.exists() ? p.grad_lse.data() : nullptr;
  args.grad_query = g.query.mutable_view();
  args.gradients = gradients.data();
  if (t != nullptr) {
    args.query_tangent = p.query_tangent.view();
    args.tangents = tangents.data();
    args.out_tangent = t->out.view();
    args.lse_tangent = t->lse.data();
  }
  transfuse::attention_kernels().backward(args, parallel);
  return g;
}

inline void check_gradients(const Problem& p, const Gradients& got, const Gradients& want, double band,
                            const std::string& what) {
  check_close(got.query, want.query, 1.0, band, what + " query");
  check(got.query.gaps_untouched(), what + " query gaps");
  for (size_t i = 0; i < p.sources.size(); ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    check_close(got.keys[i], want.keys[i], 1.0, band, what + " key" + at);
    check_close(got.values[i], want.values[i], 1.0, band, what + " value" + at);
    check(got.keys[i].gaps_untouched() && got.values[i].gaps_untouched(), what + " key and value gaps" + at);
    if (want.biases[i].exists()) check_close(got.biases[i], want.biases[i], 1.0, band, what + " bias" + at);
  }
}
inline bool same_gradients(const Gradients& x, const Gradients& y) {
  bool same = x.query.same_bytes(y.query);
  for (size_t i = 0; i < x.keys.size(); ++i)
    same = same && x.keys[i].same_bytes(y.keys[i]) && x.values[i].same_bytes(y.values[i]) &&
           (!x.biases[i].exists() || x.biases[i].same_bytes(y.biases[i]));
  return same;
}

// One rounding of every stored number, and the rounding of a logit, which moves its probability by as much.
inline double band_of(const Problem& p) {
  const double store = epsilon(p.shape.dtype), accumulate = epsilon(statistics_of(p.shape.dtype));
  const double logit = largest_logit(p);
  bool blended = p.mix.other.exists();
  for (const Source& s : p.sources) blended = blended || s.mix.other.exists();
  // A blended row is rounded to the storage type before products of bfloat16 pairs.
  return 4.0 * store + 8.0 * accumulate * (4.0 + logit) + (blended ? 2.0 * store * logit : 0.0);
}

inline void check_forward(const Problem& p, uint64_t seed) {
  Random r(seed + 1);
  const Layout layout = some_layout(r);
  const bool single = p.gates.size() == 1;
  const Forward want = naive_forward(p);
  const Forward got = run_forward(p, transfuse::serial_parallel(), layout, single);
  const double band = band_of(p);
  check_close(got.out, want.out, 1.0, band, p.name + " out");
  check(got.out.gaps_untouched(), p.name + " out gaps");
  if (single) check_close(got.lse, want.lse, 1.0, band_of(p), p.name + " lse");
  const Forward threaded = run_forward(p, transfuse::std_thread_parallel(3), layout, single);
  check(threaded.out.same_bytes(got.out), p.name + " out: 3 threads give other bits");
}

inline void check_all_directions(const Problem& p, uint64_t seed) {
  check_forward(p, seed);
  Random r(seed + 2);
  const Layout layout = dense_layout(r);
  const auto serial = transfuse::serial_parallel(), threads = transfuse::std_thread_parallel(3);
  const double band = 6.0 * band_of(p);
  const Forward f = run_forward(p, serial, layout, true);

  Gradients want;
  naive_derivatives(p, false, nullptr, &want);
  const Gradients got = run_backward(p, f, nullptr, serial, layout);
  check_gradients(p, got, want, band, p.name + " backward");
  check(same_gradients(got, run_backward(p, f, nullptr, threads, layout)),
        p.name + " backward: 3 threads give other bits");

  Tangents want_t;
  naive_derivatives(p, true, &want_t, &want);
  const Tangents t = run_tangent(p, f, serial, layout);
  check_close(t.out, want_t.out, 1.0, band, p.name + " jvp out");
  check_close(t.lse, want_t.lse, 1.0, band, p.name + " jvp lse");
  check(t.out.gaps_untouched(), p.name + " jvp out gaps");
  const Tangents t3 = run_tangent(p, f, threads, layout);
  check(t3.out.same_bytes(t.out) && t3.lse.same_bytes(t.lse), p.name + " jvp: 3 threads give other bits");

  const Gradients second = run_backward(p, f, &t, serial, layout);
  check_gradients(p, second, want, 2.0 * band, p.name + " jvp backward");
  check(same_gradients(second, run_backward(p, f, &t, threads, layout)),
        p.name + " jvp backward: 3 threads give other bits");
}

// ---- the cases -----------------------------------------------------------------------------------------------------

inline void check_naive_loops() {
  Wish wish;
  wish.dtype = DType::f64;
  wish.heads = 4;
  wish.queries = 3;
  wish.key_dim = wish.value_dim = 3;
  wish.lengths = {4, 3};
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    Problem p = make_problem(seed, wish);
    // The objective needs lse everywhere: no row may be without keys.
    for (Source& s : p.sources) {
      s.mask = Mask{};
      s.causal = Causal::none;
      if (!s.bias.exists()) continue;
      // In double, so that a small step is not rounded away.
      std::vector<bool> reduced;
      for (int d = 0; d < 4; ++d) reduced.push_back(s.bias.stride(d) == 0);
      s.bias = Array(DType::f64, s.bias.shape(), Layout::heads_first, reduced);
      s.bias.fill(0.3);
    }
    if (!p.grad_lse.exists()) {
      p.grad_lse = p.like_output(DType::f64, 1, Layout::heads_first);
      p.grad_lse.fill(0.5);
    }
    for (const bool second : {false, true}) {
      Gradients g;
      naive_derivatives(p, second, nullptr, &g);
      const std::string what = p.name + (second ? " naive second" : " naive first");
      check_derivative_of(p, p.query, g.query, second, what + " query");
      for (size_t i = 0; i < p.sources.size(); ++i) {
        check_derivative_of(p, p.sources[i].key, g.keys[i], second, what + " key");
        check_derivative_of(p, p.sources[i].value, g.values[i], second, what + " value");
        if (p.sources[i].bias.exists()) check_derivative_of(p, p.sources[i].bias, g.biases[i], second, what + " bias");
      }
    }
  }
}

inline void attention_selftest(int cases) {
  check_naive_loops();
  uint64_t seed = 1000;
  const std::vector<DType> dtypes{DType::f32, DType::bf16, DType::f16, DType::f64};
  for (const DType dtype : dtypes) {
    // Widths around every vector and panel boundary, keys and queries around every tile.
    for (const int64_t width :
         {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 47, 48, 49, 64, 80, 96, 97, 128, 160, 255, 256}) {
      Wish wish;
      wish.dtype = dtype;
      wish.plain = width % 2 == 0;
      wish.batch = wish.heads = wish.kv_heads = 1;
      wish.queries = 9;
      wish.lengths = {11};
      wish.key_dim = width;
      wish.value_dim = 257 - width;
      check_all_directions(make_problem(++seed, wish), seed);
    }
    for (const int64_t tokens : {1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 95, 96, 97, 191, 192, 193, 513}) {
      Wish wish;
      wish.dtype = dtype;
      wish.plain = tokens % 2 == 0;
      wish.batch = wish.heads = wish.kv_heads = 1;
      wish.key_dim = wish.value_dim = 5;
      wish.queries = tokens;
      wish.lengths = {tokens < 100 ? 200 - tokens : 17};
      check_all_directions(make_problem(++seed, wish), seed);
      wish.queries = 3;
      wish.lengths = {tokens, 1};
      check_all_directions(make_problem(++seed, wish), seed);
    }
    // Nothing to do, nothing to attend to, one key.
    for (int empty = 0; empty < 6; ++empty) {
      Wish wish;
      wish.dtype = dtype;
      wish.key_dim = 8;
      wish.value_dim = 4;
      wish.plain = empty % 2 == 0;
      if (empty == 0) wish.batch = 0;
      if (empty == 1) wish.heads = 0;
      if (empty == 2) wish.queries = 0;
      if (empty == 3) wish.lengths = {0};
      if (empty == 4) wish.lengths = {0, 5};
      if (empty == 5) wish.lengths = {1};
      check_all_directions(make_problem(++seed, wish), seed);
    }
    // Logits in the hundreds.
    for (int i = 0; i < 2; ++i) {
      Wish wish;
      wish.dtype = dtype;
      wish.amplitude = 200.0;
      check_forward(make_problem(++seed, wish), seed);
    }
    // Everything at once, drawn.
    for (int i = 0; i < cases; ++i) {
      Random r(++seed);
      Wish wish;
      wish.dtype = dtype;
      wish.full = i % 2 == 0;
      wish.batch = 1 + r.below(3);
      wish.kv_heads = 1 + r.below(2);
      wish.heads = wish.kv_heads * (1 + r.below(2));
      wish.queries = r.pick<int64_t>({1, 3, 31, 33, 64, 70, 100});
      wish.key_dim = r.pick<int64_t>({1, 3, 8, 16, 20, 24, 40, 64, 80, 100});
      wish.value_dim = r.chance(50) ? wish.key_dim : r.pick<int64_t>({1, 5, 16, 33, 48});
      wish.lengths.clear();
      const int64_t sources = 1 + r.below(3);
      for (int64_t s = 0; s < sources; ++s) wish.lengths.push_back(r.pick<int64_t>({0, 1, 2, 16, 31, 77, 96, 97, 130}));
      const Problem p = make_problem(seed, wish);
      wish.full ? check_forward(p, seed) : check_all_directions(p, seed);
    }
  }
}

}  // namespace selftest
