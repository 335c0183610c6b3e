// Self-test of the attention kernel for compute capability 9.0, emulated: the naive loops of attention_naive.h. What an
// emulation can show of its copies, barriers and products is said in cuda_emulation/hopper_instructions.h.
#pragma once

#include "attention_selftest.h"
#include "cuda_emulation/fibers.h"

namespace selftest {

// The same numbers as copies of tiles can read them.
inline Array laid_out(const Array& x, Layout layout) {
  Array y(x.dtype(), x.shape(), layout);
  x.each([&](int64_t a, int64_t b, int64_t c, int64_t d) { y.set(a, b, c, d, x.get(a, b, c, d)); });
  return y;
}

inline Problem make_tiled_problem(uint64_t seed, const Wish& wish) {
  Problem p = make_problem(seed, wish);
  Random r(seed + 3);
  const auto layout = [&] { return r.pick<Layout>({Layout::heads_first, Layout::tokens_first}); };
  p.mix = Mix{};
  p.query = laid_out(p.query, layout());
  for (Source& s : p.sources) {
    s.mix = Mix{};
    s.key = laid_out(s.key, layout());
    s.value = laid_out(s.value, layout());
  }
  return p;
}

inline const char* forward_on_cuda(const Problem& p, Forward* f, bool with_lse) {
  return with_forward_arguments(p, f, with_lse, [](const transfuse::AttentionForward& args) {
    return transfuse::attention_forward_cuda(args, nullptr);
  });
}

inline void check_forward_on_cuda(const Problem& p, uint64_t seed) {
  const Layout layout = seed % 2 == 0 ? Layout::heads_first : Layout::tokens_first;
  const bool single = p.gates.size() == 1;
  const Forward want = naive_forward(p);
  const auto run = [&](emulation::Order order) {
    Forward f{p.like_output(p.shape.dtype, p.shape.value_dim, layout),
              p.like_output(DType::f32, 1, Layout::heads_first)};
    emulation::set_order(order);
    const char* error = forward_on_cuda(p, &f, single);
    check(error == nullptr, "cuda " + p.name + ": " + (error == nullptr ? "" : error));
    return f;
  };
  const Forward got = run(emulation::Order::forward);
  check_close(got.out, want.out, 1.0, band_of(p), "cuda " + p.name + " out");
  check(got.out.gaps_untouched(), "cuda " + p.name + " out gaps");
  if (single) check_close(got.lse, want.lse, 1.0, band_of(p), "cuda " + p.name + " lse");
  const Forward again = run(emulation::Order::shuffled);
  check(again.out.same_bytes(got.out), "cuda " + p.name + ": depends on the order of threads and copies");
  emulation::set_order(emulation::Order::forward);
}

inline void check_attention_refusals() {
  Wish wish;
  wish.dtype = DType::bf16;
  wish.plain = true;
  wish.batch = wish.heads = wish.kv_heads = 1;
  wish.queries = 3;
  const auto refuses = [&](Problem p, const char* what) {
    Forward f{p.like_output(p.shape.dtype, p.shape.value_dim, Layout::heads_first),
              p.like_output(DType::f32, 1, Layout::heads_first)};
    check(forward_on_cuda(p, &f, true) != nullptr, std::string("cuda attention takes ") + what);
  };
  wish.key_dim = 44;
  refuses(make_tiled_problem(1, wish), "a head dim of 44");
  wish.key_dim = 136;
  refuses(make_tiled_problem(1, wish), "a head dim of 136");
  wish.key_dim = 40;
  Problem unaligned = make_tiled_problem(1, wish);
  unaligned.query = laid_out(unaligned.query, Layout::offset);
  refuses(unaligned, "an unaligned query");
  wish.lengths = std::vector<int64_t>(9, 2);
  refuses(make_tiled_problem(1, wish), "nine sources");
  wish.lengths = {2};
  wish.dtype = DType::f32;
  refuses(make_tiled_problem(1, wish), "float32");
}

inline void attention_cuda_selftest() {
  uint64_t seed = 100;
  const auto run = [&](const Wish& wish) {
    ++seed;
    check_forward_on_cuda(make_tiled_problem(seed, wish), seed);
  };
  // Head dims of every plan, and between them; rows and keys around the edges of tiles.
  struct Size {
    int64_t key_dim, value_dim, queries, length;
  };
  for (const Size& s : std::vector<Size>{{40, 40, 130, 129},
                                         {64, 64, 64, 300},
                                         {72, 80, 5, 65},
                                         {128, 128, 65, 257},
                                         {8, 24, 1, 1},
                                         {96, 16, 128, 128}}) {
    Wish wish;
    wish.dtype = seed % 2 == 0 ? DType::bf16 : DType::f16;
    wish.batch = 1;
    wish.heads = 1 + (int64_t)(seed % 2);
    wish.kv_heads = 1;
    wish.queries = s.queries;
    wish.key_dim = s.key_dim;
    wish.value_dim = s.value_dim;
    wish.lengths = {s.length};
    wish.plain = true;
    run(wish);
  }
  // Several sources, index maps, masks, biases, the causal rule, shared keys; one group, and several with gates.
  for (int i = 0; i < 12; ++i) {
    Wish wish;
    wish.dtype = i % 2 == 0 ? DType::bf16 : DType::f16;
    wish.batch = 2;
    wish.heads = 2;
    wish.kv_heads = 1 + i / 2 % 2;
    wish.queries = i % 3 == 0 ? 70 : 9;
    wish.key_dim = wish.value_dim = i % 4 == 0 ? 64 : i % 4 == 3 ? 88 : 40;
    wish.lengths = i % 3 == 1 ? std::vector<int64_t>{77, 4, 0, 130} : std::vector<int64_t>{70, 16};
    wish.full = i % 2 == 1 || i % 4 == 2;
    wish.amplitude = i % 5 == 0 ? 20.0 : 1.0;
    run(wish);
  }
  // More blocks of queries than a grid has, and key heads shared by two.
  {
    Wish wish;
    wish.dtype = DType::bf16;
    wish.batch = 2;
    wish.heads = 4;
    wish.kv_heads = 2;
    wish.queries = 5;
    wish.key_dim = wish.value_dim = 16;
    wish.lengths = {3};
    wish.plain = true;
    run(wish);
  }
  // The last source of a group, where the group's gate is kept, hides from the first 128 queries.
  {
    Wish wish;
    wish.dtype = DType::f16;
    wish.batch = wish.heads = wish.kv_heads = 1;
    wish.queries = 150;
    wish.key_dim = wish.value_dim = 8;
    wish.lengths = {2, 6, 4};
    wish.plain = true;
    Problem p = make_tiled_problem(++seed, wish);
    p.sources[1].causal = Causal::lower_right;
    p.sources[2].group = 1;
    p.gates = {Gate{}, Gate{}};
    p.gates[0].value = 0.25;
    p.gates[1].value = -3.0;
    check_forward_on_cuda(p, seed);
  }
  // What random numbers do not meet.
  {
    Wish wish;
    wish.dtype = DType::bf16;
    wish.batch = wish.heads = wish.kv_heads = 2;
    wish.queries = 3;
    wish.key_dim = wish.value_dim = 16;
    wish.lengths = {5, 4};
    wish.plain = true;
    // Keys and values of one head and batch entry for all; a scale that is 0 in float32.
    Problem p = make_tiled_problem(++seed, wish);
    for (Array* x : {&p.sources[0].key, &p.sources[0].value}) {
      Random r(seed);
      *x = Array(wish.dtype, x->shape(), Layout::heads_first, {true, true, false, false});
      x->randomize(r);
    }
    p.sources[1].scale = 1e-50;
    check_forward_on_cuda(p, seed);
    // A gate of 0 keeps out what is not finite.
    p = make_tiled_problem(++seed, wish);
    p.sources[1].group = 1;
    p.sources[1].value.fill(std::numeric_limits<double>::infinity());
    p.gates = {Gate{}, Gate{}};
    p.gates[1].tensor = Array(DType::f32, {2, 2, 3}, Layout::heads_first);
    p.gates[1].tensor.fill(0.0);
    check_forward_on_cuda(p, seed);
  }
  // Nothing to attend to, and no queries.
  Wish wish;
  wish.dtype = DType::bf16;
  wish.plain = true;
  wish.lengths = {0};
  run(wish);
  wish.lengths = {3};
  wish.queries = 0;
  run(wish);
  check_attention_refusals();
}

}  // namespace selftest
