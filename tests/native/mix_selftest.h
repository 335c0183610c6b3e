// Self-test of mix: naive loops in double against the kernels, in every storage type, aligned or not, threaded or not.
#pragma once

#include "check.h"
#include "transfuse/mix.h"

namespace selftest {

// Computes a call; `again` asks for the same in another order: by more threads, or by others first.
using MixRun = void (*)(const transfuse::MixArgs&, bool again);

inline void run_mix_on_cpu(const transfuse::MixArgs& args, bool again) {
  transfuse::mix_kernels().run(args, again ? transfuse::std_thread_parallel(3) : transfuse::serial_parallel());
}

inline void check_mix(uint64_t seed, DType dtype, int64_t batch, int64_t count, int inputs, int outputs, int pairs,
                      MixRun run = run_mix_on_cpu, const char* backend = "") {
  Random r(seed);
  const std::string name = std::string(backend) + "mix " + name_of(dtype) + " " + std::to_string(batch) + "x" +
                           std::to_string(count) + " " + std::to_string(inputs) + " inputs, case " +
                           std::to_string(seed);
  std::vector<Array> in, out, other;
  std::vector<bool> shared;
  transfuse::MixArgs args;
  args.dtype = dtype;
  args.batch = batch;
  args.count = count;
  args.inputs = inputs;
  args.outputs = outputs;
  args.pairs = pairs;
  for (int k = 0; k < inputs; ++k) {
    shared.push_back(r.chance(20));
    in.emplace_back(dtype, std::vector<int64_t>{shared.back() ? 1 : batch, 1, 1, count},
                    r.chance(50) ? Layout::offset : Layout::heads_first);
    in.back().randomize(r);
    args.in_stride[k] = shared.back() || batch == 1 ? 0 : count;
  }
  for (int j = 0; j < outputs; ++j) {
    const Layout layout = r.chance(50) ? Layout::offset : Layout::heads_first;
    out.emplace_back(dtype, std::vector<int64_t>{batch, 1, 1, count}, layout);
    other.emplace_back(dtype, std::vector<int64_t>{batch, 1, 1, count}, layout);
  }
  // Arrays have moved while there were more to come.
  for (int k = 0; k < inputs; ++k) args.in[k] = in[(size_t)k].data();
  for (int j = 0; j < outputs; ++j) args.out[j] = out[(size_t)j].data();
  const bool own = r.chance(50);
  std::vector<double> coefficients((size_t)((own ? batch : 1) * outputs * (inputs + 1)));
  for (double& c : coefficients) c = r.chance(20) ? 0.0 : 2.0 * r.uniform();
  args.coefficients = coefficients.data();
  args.coefficient_stride = own ? outputs * (inputs + 1) : 0;
  for (int p = 0; p < pairs; ++p)
    for (int side = 0; side < 2; ++side) args.pair[p][side] = (int)r.below(inputs + 1);
  if (pairs >= 3 && inputs >= 2 && r.chance(50)) {  // the sweep over two inputs
    const int moments[5][2] = {{0, 0}, {0, 1}, {1, 1}, {0, inputs}, {1, inputs}};
    for (int p = 0; p < std::min(pairs, 5); ++p)
      for (int side = 0; side < 2; ++side) args.pair[p][side] = moments[p][side];
  }
  std::vector<double> products((size_t)(batch * pairs) + 1, -7.0), again = products;
  args.products = products.data();
  run(args, false);

  const auto value = [&](int k, int64_t b, int64_t i) {
    return k == inputs ? 1.0 : in[(size_t)k].get(shared[(size_t)k] ? 0 : b, 0, 0, i);
  };
  const double store = epsilon(dtype), work = epsilon(statistics_of(dtype));
  for (int j = 0; j < outputs; ++j) {
    double worst = 0.0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < count; ++i) {
        const double* c = &coefficients[(size_t)((own ? b : 0) * outputs + j) * (size_t)(inputs + 1)];
        double want = c[inputs], size = std::fabs(want);
        for (int k = 0; k < inputs; ++k) {
          want += c[k] * value(k, b, i);
          size += std::fabs(c[k] * value(k, b, i));
        }
        const double error = std::fabs(out[(size_t)j].get(b, 0, 0, i) - want);
        const double band = store * std::fabs(want) + 4.0 * work * (size + 1e-3) + (dtype == DType::f16 ? 1e-7 : 0.0);
        if (!(error <= band)) worst = std::fmax(worst, std::isnan(error) ? 1e30 : error);
      }
    check(worst == 0.0, name + ": output " + std::to_string(j) + " is off by " + std::to_string(worst));
    check(out[(size_t)j].gaps_untouched(), name + ": written outside");
  }
  for (int64_t b = 0; b < batch; ++b)
    for (int p = 0; p < pairs; ++p) {
      double want = 0.0, size = 0.0;
      for (int64_t i = 0; i < count; ++i) {
        const double term = value(args.pair[p][0], b, i) * value(args.pair[p][1], b, i);
        want += term;
        size += std::fabs(term);
      }
      const double error = std::fabs(products[(size_t)(b * pairs + p)] - want);
      check(error <= 1e-13 * (size + 1e-300) || error <= 1e-12 * size, name + ": product " + std::to_string(p));
    }
  check(products.back() == -7.0, name + ": products written outside");

  for (int j = 0; j < outputs; ++j) args.out[j] = other[(size_t)j].data();
  args.products = again.data();
  run(args, true);
  bool same = std::memcmp(products.data(), again.data(), products.size() * sizeof(double)) == 0;
  for (int j = 0; j < outputs; ++j) same = same && out[(size_t)j].same_bytes(other[(size_t)j]);
  check(same, name + ": another order gives other bits");
}

inline void mix_selftest(int cases) {
  uint64_t seed = 50000;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    for (const int64_t count : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 1023, 1024, 1025, 16385, 40000}) {
      ++seed;
      check_mix(seed, dtype, 1 + (int64_t)(seed % 3), count, 3, 1, 5);
    }
    for (int inputs = 1; inputs <= 9; ++inputs) check_mix(++seed, dtype, 2, 77, inputs, 1 + inputs % 3, inputs % 4);
    for (int i = 0; i < cases; ++i) {
      Random r(++seed);
      check_mix(seed, dtype, 1 + r.below(5), 1 + r.below(3000), 1 + (int)r.below(8), (int)r.below(4), (int)r.below(7));
    }
    // Long enough for results that bypass the cache.
    check_mix(++seed, dtype, 1, 1100003, 2, 1, 0);
  }
}

}  // namespace selftest
