// Self-test of counter-based noise: Philox and Box-Muller written naively, one number at a time.
#pragma once

#include "check.h"
#include "transfuse/nes.h"

namespace selftest {

inline void naive_philox(uint64_t seed, uint64_t sample, uint64_t block, uint32_t* c) {
  c[0] = (uint32_t)block, c[1] = (uint32_t)(block >> 32), c[2] = (uint32_t)sample, c[3] = (uint32_t)(sample >> 32);
  uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = (uint64_t)c[0] * 0xD2511F53u, second = (uint64_t)c[2] * 0xCD9E8D57u;
    const uint32_t next[4] = {(uint32_t)(second >> 32) ^ c[1] ^ low, (uint32_t)second,
                              (uint32_t)(first >> 32) ^ c[3] ^ high, (uint32_t)first};
    std::memcpy(c, next, sizeof next);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

inline double naive_noise(uint64_t seed, uint64_t sample, int64_t at) {
  uint32_t c[4];
  const int64_t group = at / 64, word = at % 64 / 16, j = at % 16;
  naive_philox(seed, sample, (uint64_t)(16 * group + j), c);
  const uint32_t* pair = c + word / 2 * 2;
  const double radius = std::sqrt(-2.0 * std::log(((double)pair[0] + 0.5) * 0x1p-32));
  const double angle = 6.283185307179586477 * ((double)pair[1] * 0x1p-32);
  return radius * (word % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

inline void check_nes(uint64_t number, DType dtype, int64_t count, int64_t samples, bool masked) {
  Random r(number);
  const std::string name = std::string("nes ") + name_of(dtype) + " " + std::to_string(count) + " x " +
                           std::to_string(samples) + (masked ? " masked" : "");
  Array x(dtype, {1, 1, 1, count}), out(dtype, {2 * samples, 1, 1, count}), out3 = out;
  Array sum(statistics_of(dtype), {1, 1, 1, count}), sum3 = sum;
  x.randomize(r);
  std::vector<uint8_t> mask((size_t)count);
  for (uint8_t& m : mask) m = r.chance(40);
  if (count > 200) std::fill(mask.begin() + 64, mask.begin() + 192, 0);
  std::vector<double> weights;
  for (int64_t s = 0; s < samples; ++s) weights.push_back(r.chance(20) ? 0.0 : r.uniform());
  transfuse::NesArgs args;
  args.dtype = dtype;
  args.count = count;
  args.x = x.data();
  args.mask = masked ? mask.data() : nullptr;
  args.seed = r.next();
  args.start = (int64_t)(r.next() >> 2);
  args.samples = samples;
  args.sigma = 0.25;
  args.weights = weights.data();
  for (const bool threads : {false, true}) {
    const auto parallel = threads ? transfuse::std_thread_parallel(3) : transfuse::serial_parallel();
    args.out = (threads ? out3 : out).data();
    args.sum = (threads ? sum3 : sum).data();
    transfuse::nes_kernels().perturb(args, parallel);
    transfuse::nes_kernels().gradient(args, parallel);
  }
  check(out3.same_bytes(out) && sum3.same_bytes(sum), name + ": 3 threads give other bits");
  const double work = epsilon(statistics_of(dtype)), store = epsilon(dtype);
  bool fine = true, outside = true;
  for (int64_t i = 0; i < count; ++i) {
    const bool live = !masked || mask[(size_t)i] != 0;
    double total = 0.0;
    for (int64_t s = 0; s < samples; ++s) {
      const double xi = live ? naive_noise(args.seed, (uint64_t)(args.start + s), i) : 0.0;
      total += weights[(size_t)s] * xi;
      const double plus = x.get(0, 0, 0, i) + 0.25 * xi, minus = x.get(0, 0, 0, i) - 0.25 * xi;
      fine = fine && std::fabs(out.get(s, 0, 0, i) - plus) <= store * (1.0 + std::fabs(plus)) + 8.0 * work;
      fine = fine && std::fabs(out.get(samples + s, 0, 0, i) - minus) <= store * (1.0 + std::fabs(minus)) + 8.0 * work;
    }
    fine = fine && std::fabs(sum.get(0, 0, 0, i) - total) <= 32.0 * work * (double)(samples + 1);
    if (!live) outside = outside && sum.get(0, 0, 0, i) == 0.0 && out.get(0, 0, 0, i) == x.get(0, 0, 0, i);
  }
  check(fine, name + ": other numbers than the definition");
  check(outside, name + ": noise outside the mask");
}

inline void nes_selftest() {
  uint64_t number = 90000;
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (const int64_t count : {1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1023, 1025, 9001})
      for (const bool masked : {false, true}) check_nes(++number, dtype, count, 3, masked);
}

}  // namespace selftest
