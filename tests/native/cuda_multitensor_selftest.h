// Self-test of the CUDA kernels on lists of tensors, emulated: the naive loops of multitensor_selftest.h, then what
// those do not meet. Selection and election have no CUDA kernel; the CPU's stand in.
#pragma once

#include <memory>

#include "cuda_emulation/fibers.h"
#include "multitensor_selftest.h"

namespace selftest {

// Blocks and threads in another order where another number of threads is asked for.
template <class Args, int64_t (*kMemory)(const Args&), const char* (*kStart)(const Args&, void*, void*)>
inline void run_lists_on_cuda(const Args& args, const transfuse::Parallel& parallel) {
  emulation::set_order(parallel.threads > 1 ? emulation::Order::shuffled : emulation::Order::forward);
  const size_t words = (size_t)kMemory(args);
  std::unique_ptr<double[]> memory(new double[words]);
  for (size_t i = 0; i < words; ++i) memory[i] = std::numeric_limits<double>::quiet_NaN();
  const char* error = kStart(args, memory.get(), nullptr);
  check(error == nullptr, std::string("cuda lists: ") + (error == nullptr ? "" : error));
}

inline const char* perturb_with_own_factor(const transfuse::PerturbArgs& args, void* memory, void* stream) {
  return transfuse::perturb_cuda(args, &args.factor, memory, stream);
}

// Tensors that do not begin at a multiple of 16 bytes, more of them than one launch carries, absent ones, NaN.
inline void check_lists_specials(const ListKernels& kernels, DType dtype) {
  const std::string what = std::string("cuda lists ") + name_of(dtype);
  const double eps = epsilon(statistics_of(dtype));
  Random random(3);
  const int64_t blocks = 97;
  std::vector<Array> arrays;
  std::vector<transfuse::Flat> x;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < 3 * blocks; ++i) {
    const int64_t size = i % blocks % 7;
    arrays.emplace_back(dtype, std::vector<int64_t>{1, 1, 1, size}, i % 2 == 0 ? Layout::offset : Layout::heads_first);
    arrays.back().randomize(random);
    if (i < blocks) sizes.push_back(size);
  }
  for (size_t i = 0; i < arrays.size(); ++i) x.push_back({arrays[i].data(), dtype});
  x[(size_t)(2 * blocks + 5)].ptr = nullptr;  // as if it were zeros
  const auto at = [&](int64_t k, int64_t j, int64_t e) {
    const size_t i = (size_t)(k * blocks + j);
    return x[i].ptr == nullptr ? 0.0 : arrays[i].get(0, 0, 0, e);
  };
  double products[9], again[9], want[9] = {};
  transfuse::GramArgs gram;
  gram.blocks = blocks, gram.size = sizes.data(), gram.lists = 3, gram.x = x.data();
  gram.products = products;
  kernels.sums.gram(gram, transfuse::serial_parallel());
  gram.products = again;
  kernels.sums.gram(gram, transfuse::std_thread_parallel(3));
  for (int64_t j = 0; j < blocks; ++j)
    for (int64_t e = 0; e < sizes[(size_t)j]; ++e)
      for (int p = 0; p < 9; ++p) want[p] += at(p / 3, j, e) * at(p % 3, j, e);
  double worst = 0;
  for (int p = 0; p < 9; ++p) worst = std::fmax(worst, std::fabs(products[p] - want[p]));
  check(worst <= 16 * eps * want[0], what + ": Gram matrix off by " + std::to_string(worst));
  check(std::memcmp(products, again, sizeof products) == 0, what + ": the order of threads matters");

  // A largest magnitude that is NaN stays; a copy is the same bits.
  arrays[3].set(0, 0, 0, 1, std::numeric_limits<double>::quiet_NaN());
  std::vector<double> sums((size_t)blocks);
  transfuse::NormArgs norm;
  norm.blocks = blocks, norm.size = sizes.data(), norm.x = x.data(), norm.order = 0, norm.sums = sums.data();
  kernels.sums.norm(norm, transfuse::serial_parallel());
  check(std::isnan(sums[3]) && sums[0] == 0.0 && sums[1] == std::fabs(arrays[1].get(0, 0, 0, 0)), what + ": largest");
  transfuse::CopyArgs copy;
  copy.blocks = blocks, copy.size = sizes.data(), copy.to = x.data() + blocks, copy.from = x.data();
  kernels.sums.copy(copy, transfuse::serial_parallel());
  bool same_bits = true, gaps = true;
  for (size_t j = 0; j < (size_t)blocks; ++j) {
    const Array &from = arrays[j], &to = arrays[j + (size_t)blocks];
    const size_t bytes = (size_t)(sizes[j] * transfuse::item_size(dtype));
    same_bits = same_bits && (bytes == 0 || std::memcmp(from.data(), to.data(), bytes) == 0);
    gaps = gaps && to.gaps_untouched();
  }
  check(same_bits && gaps, what + ": copy");
}

// More coefficients than fit in shared memory, by ids of two bytes, some of them none of them.
inline void check_many_parts(const ListKernels& kernels, DType dtype) {
  const int64_t size = 700, parts = 300;
  Random random(7);
  Array g(dtype, {size}), d(dtype, {size});
  g.randomize(random), d.randomize(random);
  std::vector<uint16_t> ids((size_t)size);
  for (uint16_t& id : ids) id = (uint16_t)random.below(parts + 40);
  const transfuse::Flat grads{g.data(), dtype}, deltas{d.data(), dtype};
  const void* pointer = ids.data();
  std::vector<double> sums((size_t)parts), want((size_t)parts);
  transfuse::BlockDotsArgs a;
  a.blocks = 1, a.size = &size, a.lists = 1, a.grads = &grads, a.deltas = &deltas;
  a.partition.count = (int)parts, a.partition.ids = &pointer, a.partition.wide = true, a.sums = sums.data();
  kernels.lists.block_dots(a, transfuse::serial_parallel());
  for (int64_t e = 0; e < size; ++e)
    if (ids[(size_t)e] < parts) want[ids[(size_t)e]] += g.get(e, 0, 0) * d.get(e, 0, 0);
  double worst = 0;
  for (size_t q = 0; q < want.size(); ++q) worst = std::fmax(worst, std::fabs(want[q] - sums[q]));
  check(worst <= 20 * epsilon(statistics_of(dtype)), std::string("cuda parts ") + name_of(dtype));
}

// Weights that are refused are counted; a model of coefficient 0 leaves no trace.
inline void check_refused(const ListKernels& kernels, DType dtype, int models) {
  const int64_t size = 9;
  std::vector<Array> x, w;
  Array out(dtype, {size});
  std::vector<transfuse::Flat> thetas, weights;
  for (int k = 0; k < models; ++k)
    x.emplace_back(dtype, std::vector<int64_t>{size}), w.emplace_back(dtype, x[0].shape());
  for (int k = 0; k < models; ++k) {
    if (k != 1) x[(size_t)k].fill(k + 1.0);  // that of model 1 is NaN
    w[(size_t)k].fill(0.5);
    thetas.push_back({x[(size_t)k].data(), dtype}), weights.push_back({w[(size_t)k].data(), dtype});
  }
  w[0].set(2, 0, 0, 0, -1.0), w[0].set(3, 0, 0, 0, std::numeric_limits<double>::infinity());
  w[1].set(8, 0, 0, 0, std::numeric_limits<double>::quiet_NaN());
  std::vector<double> c((size_t)models, 0.0), floors((size_t)models, 0.0);
  c[0] = 2.0;
  const transfuse::Flat to{out.data(), dtype};
  int64_t refused = -1;
  transfuse::RatioArgs a;
  a.blocks = 1, a.size = &size, a.models = models, a.settings = 1, a.thetas = thetas.data();
  a.weights = weights.data(), a.out = &to, a.coefficients = c.data(), a.floors = floors.data(), a.refused = &refused;
  kernels.lists.ratio(a, transfuse::serial_parallel());
  const bool first = out.get(0, 0, 0) == 1.0 && out.get(2, 0, 0) == 1.0 && out.get(8, 0, 0) == 1.0;
  check(refused == 3 && first, std::string("cuda ratio ") + name_of(dtype) + ": refused " + std::to_string(refused));
}

inline void multitensor_cuda_selftest() {
  using namespace transfuse;
  const MultitensorKernels lists{run_lists_on_cuda<LincombArgs, lincomb_cuda_memory, lincomb_cuda>,
                                 run_lists_on_cuda<BlockDotsArgs, block_dots_cuda_memory, block_dots_cuda>,
                                 run_lists_on_cuda<RatioArgs, ratio_cuda_memory, ratio_cuda>};
  const MultitensorSumKernels sums{run_lists_on_cuda<GramArgs, gram_cuda_memory, gram_cuda>,
                                   run_lists_on_cuda<NormArgs, norm_cuda_memory, norm_cuda>,
                                   run_lists_on_cuda<PerturbArgs, perturb_cuda_memory, perturb_with_own_factor>,
                                   run_lists_on_cuda<CopyArgs, copy_cuda_memory, copy_cuda>,
                                   multitensor_sum_kernels().select,
                                   multitensor_sum_kernels().elect};
  const ListKernels kernels{lists, sums, "cuda "};
  const std::vector<DType> types = {DType::f32, DType::bf16, DType::f16, DType::f64};
  // The last two are more than a chunk, and chunks of several rounds.
  const std::vector<std::vector<int64_t>> sizes = {{1}, {3, 0, 2049}, {17, 1, 64, 5, 9, 8}, {5, 4100, 1}, {21003, 70}};
  uint64_t number = 0;
  for (const DType type : types) {
    for (const int count : {1, 2, 5, 9}) {
      const auto& size = sizes[2 * number % sizes.size()];
      check_combination(kernels, number, size, count, types[(number / 3) % 4], type, (int)(number % 3),
                        number % 3 == 0 ? 1 : 5);
      check_reductions(kernels, number, size, count > 5 ? 6 : count, type);
      ++number;
    }
    check_lists_specials(kernels, type);
    check_many_parts(kernels, type);
    check_refused(kernels, type, 2);
    check_refused(kernels, type, 5);
  }
}

}  // namespace selftest
