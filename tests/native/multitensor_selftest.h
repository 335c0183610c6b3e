// Self-test of the kernels on lists of tensors: naive loops over the same lists, and threads.
#pragma once

#include <algorithm>

#include "check.h"
#include "transfuse/multitensor.h"

namespace selftest {

// Lists of tensors of mixed types and sizes, each in memory of its own that ends with its last element.
struct Tensors {
  std::vector<Array> arrays;
  std::vector<transfuse::Flat> flats;

  Tensors(Random& r, const std::vector<int64_t>& sizes, int64_t lists, const std::vector<DType>& types, bool zero) {
    for (int64_t i = 0; i < lists; ++i)
      for (const int64_t size : sizes) {
        arrays.emplace_back(types[(size_t)i % types.size()], std::vector<int64_t>{size});
        if (zero)
          arrays.back().fill(0.0);
        else
          arrays.back().randomize(r);
      }
    for (const Array& a : arrays) flats.push_back({a.data(), a.dtype()});
  }
  double at(int64_t tensor, int64_t e) const { return arrays[(size_t)tensor].get(e, 0, 0); }
};

inline bool same(const Tensors& a, const Tensors& b) {
  for (size_t i = 0; i < a.arrays.size(); ++i)
    if (!a.arrays[i].same_bytes(b.arrays[i])) return false;
  return true;
}

inline uint32_t naive_mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Partition of element i, by ids of one block or by a key.
inline int64_t naive_part(const std::vector<uint8_t>* ids, int64_t key, int64_t i, int64_t count) {
  if (ids != nullptr) return (*ids)[(size_t)i];
  const uint32_t high = naive_mix((uint32_t)(i >> 32) + naive_mix((uint32_t)((uint64_t)key >> 32)));
  const uint32_t bits = naive_mix((uint32_t)i ^ naive_mix((uint32_t)key ^ high));
  return ((bits >> 16) * (uint64_t)count) >> 16;
}

// The kernels under test. Those of other devices run twice for two numbers of threads, in another order of their own.
struct ListKernels {
  const transfuse::MultitensorKernels& lists;
  const transfuse::MultitensorSumKernels& sums;
  std::string name;
};

inline void check_combination(const ListKernels& kernels, uint64_t number, const std::vector<int64_t>& sizes, int lists,
                              DType first, DType type, int mode, int parts) {
  Random r(number);
  const int64_t blocks = (int64_t)sizes.size();
  const std::string name = kernels.name + "lincomb " + std::to_string(number);
  Tensors base(r, sizes, 1, {first}, false), deltas(r, sizes, lists, {type, first}, false);
  Tensors out(r, sizes, 1, {first}, true), again(r, sizes, 1, {first}, true);
  std::vector<double> c((size_t)(lists * blocks * parts)), sums(c.size()), sums3(c.size());
  for (double& x : c) x = r.uniform();
  std::vector<std::vector<uint8_t>> ids;
  std::vector<const void*> pointers;
  std::vector<int64_t> keys;
  for (const int64_t size : sizes) {
    ids.emplace_back((size_t)size);
    for (uint8_t& x : ids.back()) x = (uint8_t)r.below(parts + 2);  // some beyond the last
    keys.push_back((int64_t)r.next());
  }
  for (const auto& x : ids) pointers.push_back(x.data());
  transfuse::LincombArgs args;
  args.blocks = blocks, args.size = sizes.data(), args.lists = lists;
  args.base = number % 2 == 0 ? base.flats.data() : nullptr;
  args.deltas = deltas.flats.data(), args.coefficients = c.data(), args.partition.count = parts;
  if (mode == 1) args.partition.ids = pointers.data();
  if (mode == 2) args.partition.keys = keys.data();
  transfuse::BlockDotsArgs dots;
  dots.blocks = blocks, dots.size = sizes.data(), dots.lists = lists, dots.grads = base.flats.data();
  dots.deltas = deltas.flats.data(), dots.partition = args.partition;
  for (const bool threads : {false, true}) {
    const auto parallel = threads ? transfuse::std_thread_parallel(3) : transfuse::serial_parallel();
    args.out = (threads ? again : out).flats.data();
    dots.sums = (threads ? sums3 : sums).data();
    kernels.lists.lincomb(args, parallel);
    kernels.lists.block_dots(dots, parallel);
  }
  check(same(out, again) && sums == sums3, name + ": 3 threads give other bits");
  const double eps = epsilon(first == DType::f64 || type == DType::f64 ? DType::f64 : DType::f32);
  double worst = 0, worst_sum = 0;
  std::vector<double> naive(c.size());
  for (int64_t j = 0; j < blocks; ++j)
    for (int64_t e = 0; e < sizes[(size_t)j]; ++e) {
      double sum = args.base != nullptr ? base.at(j, e) : 0;
      const int64_t p = mode == 0 ? 0 : naive_part(mode == 1 ? &ids[(size_t)j] : nullptr, keys[(size_t)j], e, parts);
      for (int64_t k = 0; k < lists && p < parts; ++k) {
        const double x = deltas.at(k * blocks + j, e);
        sum += c[(size_t)((k * blocks + j) * parts + p)] * x;
        naive[(size_t)((k * blocks + j) * parts + p)] += x * base.at(j, e);
      }
      worst = std::fmax(worst, std::fabs(out.at(j, e) - sum));
    }
  for (size_t i = 0; i < c.size(); ++i) worst_sum = std::fmax(worst_sum, std::fabs(sums[i] - naive[i]));
  check(worst <= (lists + 2) * (epsilon(first) + 4 * eps), name + ": off by " + std::to_string(worst));
  check(worst_sum <= 200 * 2049 * eps, name + ": sums off by " + std::to_string(worst_sum));
}

inline void check_reductions(const ListKernels& list_kernels, uint64_t number, const std::vector<int64_t>& sizes,
                             int lists, DType type) {
  Random r(number);
  const int64_t blocks = (int64_t)sizes.size();
  const std::string name = list_kernels.name + "lists " + std::to_string(number);
  Tensors x(r, sizes, lists, {type}, false), w(r, sizes, lists, {type}, false);
  for (Array& a : w.arrays)
    a.each([&](int64_t i, int64_t, int64_t, int64_t) { a.set(i, 0, 0, 0, std::fabs(a.get(i, 0, 0))); });
  const double eps = epsilon(transfuse::item_size(type) == 8 ? DType::f64 : DType::f32);
  std::vector<double> gram((size_t)(lists * lists)), gram3(gram.size()), norms((size_t)blocks), norms3(norms);
  std::vector<double> c((size_t)(2 * lists)), floors((size_t)lists, 0.1), values((size_t)lists), values3(values);
  for (double& v : c) v = std::fabs(r.uniform()) + 0.1;
  if (lists > 1) c[1] = 0;
  Tensors mean(r, sizes, 2, {type}, true), mean3(r, sizes, 2, {type}, true);
  Tensors elected(r, sizes, 1, {type}, true), elected3(r, sizes, 1, {type}, true);
  Tensors moved = x, kept(r, sizes, 1, {type}, true);
  for (size_t i = 0; i < moved.arrays.size(); ++i) moved.flats[i].ptr = moved.arrays[i].data();
  int64_t total = 0, refused = 0;
  for (const int64_t size : sizes) total += size;
  const int64_t rank = total * 3 / 5;
  for (const bool threads : {false, true}) {
    const auto parallel = threads ? transfuse::std_thread_parallel(3) : transfuse::serial_parallel();
    const auto& kernels = list_kernels.sums;
    transfuse::GramArgs g;
    g.blocks = blocks, g.size = sizes.data(), g.lists = lists, g.x = x.flats.data();
    g.products = (threads ? gram3 : gram).data();
    kernels.gram(g, parallel);
    transfuse::NormArgs n;
    n.blocks = blocks, n.size = sizes.data(), n.x = x.flats.data(), n.scale = w.flats.data();
    n.order = (int)(number % 3), n.sums = (threads ? norms3 : norms).data();
    kernels.norm(n, parallel);
    transfuse::RatioArgs m;
    m.blocks = blocks, m.size = sizes.data(), m.models = lists, m.settings = 2, m.thetas = x.flats.data();
    m.weights = w.flats.data(), m.out = (threads ? mean3 : mean).flats.data(), m.coefficients = c.data();
    m.floors = floors.data(), m.refused = &refused;
    list_kernels.lists.ratio(m, parallel);
    for (int64_t k = 0; k < lists && total > 0; ++k) {
      transfuse::SelectArgs s;
      s.blocks = blocks, s.size = sizes.data(), s.x = x.flats.data() + k * blocks, s.rank = rank;
      s.value = (threads ? values3 : values).data() + k;
      kernels.select(s, parallel);
    }
    transfuse::ElectArgs e;
    e.blocks = blocks, e.size = sizes.data(), e.lists = lists, e.deltas = x.flats.data();
    e.out = (threads ? elected3 : elected).flats.data(), e.thresholds = values.data();
    kernels.elect(e, parallel);
  }
  transfuse::PerturbArgs p;
  p.blocks = blocks, p.size = sizes.data(), p.x = moved.flats.data(), p.grads = w.flats.data();
  p.backup = kept.flats.data(), p.factor = 0.5, p.adaptive = true;
  list_kernels.sums.perturb(p, transfuse::std_thread_parallel(3));
  check(gram == gram3 && norms == norms3 && values == values3 && same(mean, mean3) && same(elected, elected3),
        name + ": 3 threads give other bits");
  check(refused == 0, name + ": weights refused");
  std::vector<double> products(gram.size());
  std::vector<std::vector<double>> sizes_of((size_t)lists);
  bool means = true, signs = true, ascent = true;
  double worst_norm = 0;
  for (int64_t j = 0; j < blocks; ++j) {
    double sum = 0;
    for (int64_t e = 0; e < sizes[(size_t)j]; ++e) {
      const auto at = [&](const Tensors& t, int64_t k) { return t.at(k * blocks + j, e); };
      for (int64_t k = 0; k < lists; ++k) {
        sizes_of[(size_t)k].push_back(std::fabs(at(x, k)));
        for (int64_t l = 0; l < lists; ++l) products[(size_t)(k * lists + l)] += at(x, k) * at(x, l);
      }
      const double scaled = std::fabs(at(x, 0) * at(w, 0));
      sum = number % 3 == 2 ? sum + scaled * scaled : number % 3 == 1 ? sum + scaled : std::fmax(sum, scaled);
      for (int64_t s = 0; s < 2; ++s) {
        double above = 0, below = 0;
        for (int64_t k = 0; k < lists; ++k) {
          const double f = c[(size_t)(s * lists + k)] * std::fmax(at(w, k), 0.1);
          above += f * at(x, k), below += f;
        }
        means = means && std::fabs(mean.at(s * blocks + j, e) - above / below) <= epsilon(type) + 20 * eps;
      }
      double all = 0, agreed = 0;
      int64_t count = 0;
      for (int64_t k = 0; k < lists; ++k) all += std::fabs(at(x, k)) >= values[(size_t)k] ? at(x, k) : 0;
      for (int64_t k = 0; k < lists; ++k)
        if (std::fabs(at(x, k)) >= values[(size_t)k] && at(x, k) * all > 0) agreed += at(x, k), ++count;
      const double want = count > 0 ? agreed / (double)count : 0;
      // A sum that cancels to rounding may elect either sign.
      signs = signs && (std::fabs(all) < 1e-6 || std::fabs(elected.at(j, e) - want) <= epsilon(type) + 20 * eps);
      const double start = at(x, 0), step = start + 0.5 * start * start * at(w, 0);
      ascent = ascent && std::fabs(moved.at(j, e) - step) <= epsilon(type) * 2 + 8 * eps && kept.at(j, e) == start;
    }
    worst_norm = std::fmax(worst_norm, std::fabs(norms[(size_t)j] - sum));
  }
  double worst = 0;
  for (size_t i = 0; i < gram.size(); ++i) worst = std::fmax(worst, std::fabs(gram[i] - products[i]));
  check(worst <= 400 * 1025 * eps, name + ": Gram matrix off by " + std::to_string(worst));
  check(worst_norm <= 1e-9, name + ": norms off by " + std::to_string(worst_norm));
  check(means, name + ": weighted means off");
  check(signs, name + ": elected means off");
  check(ascent, name + ": perturbation or copy off");
  for (int64_t k = 0; k < lists && total > 0; ++k) {
    std::sort(sizes_of[(size_t)k].begin(), sizes_of[(size_t)k].end());
    check(values[(size_t)k] == sizes_of[(size_t)k][(size_t)rank], name + ": another number selected");
  }
}

inline void multitensor_selftest() {
  const std::vector<DType> types = {DType::f32, DType::bf16, DType::f16, DType::f64};
  const std::vector<std::vector<int64_t>> sizes = {{1}, {3, 0, 2049}, {17, 33000, 1, 64}, {5, 4096}};
  const ListKernels kernels{transfuse::multitensor_kernels(), transfuse::multitensor_sum_kernels(), ""};
  uint64_t number = 0;
  for (const DType type : types)
    for (const int lists : {1, 2, 3, 5, 9}) {
      const auto& size = sizes[number % sizes.size()];
      check_combination(kernels, number, size, lists, types[(number / 3) % 4], type, (int)(number % 3),
                        number % 3 == 0 ? 1 : 5);
      check_reductions(kernels, number, size, lists > 5 ? 6 : lists, type);
      ++number;
    }
}

}  // namespace selftest
