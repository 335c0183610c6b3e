// What the CPU and the CUDA registration of the ops on lists of tensors share: checks, and calls as the kernels take
// them.
//
// Lists of T lists of m tensors come one list after the other. Empty lists stand for absent ones.
#pragma once

#include <utility>

#include "torch_glue.h"
#include "transfuse/multitensor.h"

namespace transfuse {

// Tensors as the kernels read them; copies of those that are not contiguous live as long as this does.
class __attribute__((visibility("hidden"))) Lists {
 public:
  // All tensors are on the device of `home`.
  explicit Lists(const Tensor& home) : device_(home.device()), on_cpu_(home.is_cpu()) {}
  // The first list decides the number of elements of each block; `blocks` may be 0 before it comes.
  void add(const TensorList& tensors, const char* name, bool may_be_absent = false) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& t = tensors[i];
      STD_TORCH_CHECK(holds(t), name, "[", i, "] must be on the device of the first tensor");
      Flat flat;
      flat.dtype = dtype_of(t, name);
      const int64_t want = sizes_[i % sizes_.size()], got = t.numel();
      STD_TORCH_CHECK(got == want || (may_be_absent && got == 0), name, "[", i, "] must have ", want, " elements, got ",
                      got);
      if (got > 0) flat.ptr = contiguous(t);
      flats_.push_back(flat);
    }
  }
  void set_sizes(const TensorList& like, size_t blocks) {
    STD_TORCH_CHECK(blocks <= like.size(), "lists must have ", blocks, " tensors, got ", like.size());
    for (size_t j = 0; j < blocks; ++j) sizes_.push_back(like[j].numel());
  }
  void set_sizes(std::vector<int64_t> sizes) { sizes_ = std::move(sizes); }

  // Whether a tensor is on the device; lists have hundreds of them, and the CPU is asked for in one call.
  bool holds(const Tensor& t) const { return on_cpu_ ? t.is_cpu() : t.device() == device_; }
  int64_t blocks() const { return (int64_t)sizes_.size(); }
  const int64_t* sizes() const { return sizes_.data(); }
  const Flat* flats() const { return flats_.data(); }
  int64_t count() const { return (int64_t)flats_.size(); }

  const void* contiguous(const Tensor& t) {
    if (t.is_contiguous()) return t.const_data_ptr();
    std::vector<int64_t> shape;
    for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
    Tensor copy = new_empty(t, shape, t.scalar_type());
    torch::stable::copy_(copy, t);
    copies_.push_back(copy);
    return copies_.back().const_data_ptr();
  }

 private:
  torch::stable::Device device_;
  bool on_cpu_;
  std::vector<int64_t> sizes_;
  std::vector<Flat> flats_;
  TensorList copies_;
};

// Number of lists that `count` tensors are, for m blocks.
inline int64_t lists_of(size_t count, size_t blocks, const char* name) {
  STD_TORCH_CHECK(blocks > 0 && count > 0 && count % blocks == 0, name, " must be a positive multiple of ", blocks,
                  " tensors, got ", count);
  return (int64_t)(count / blocks);
}

// Contiguous tensors with the shapes of others, as results.
inline TensorList results_like(const TensorList& like, size_t blocks, Lists& flats) {
  TensorList results;
  for (size_t j = 0; j < blocks; ++j) {
    const Tensor& t = like[j];
    if (t.is_contiguous()) {
      results.push_back(torch::stable::empty_like(t));
    } else {
      std::vector<int64_t> shape;
      for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
      results.push_back(new_empty(t, shape, t.scalar_type()));
    }
  }
  flats.add(results, "results");
  return results;
}

// Tensors that are written where they lie.
inline void add_written(Lists& lists, const TensorList& tensors, const char* name) {
  for (size_t i = 0; i < tensors.size(); ++i)
    STD_TORCH_CHECK(tensors[i].is_contiguous(), name, "[", i, "] must be contiguous");
  lists.add(tensors, name);
}

inline void check_table(const Tensor& t, const Tensor& home, const std::vector<int64_t>& shape, const char* name) {
  check_shape(t, shape, name);
  STD_TORCH_CHECK(t.device() == home.device() && t.scalar_type() == ScalarType::Double && t.is_contiguous(), name,
                  " must be a contiguous float64 tensor on the device of the others");
}

struct __attribute__((visibility("hidden"))) PartitionOf {
  Partition partition;
  std::vector<const void*> pointers;
  Lists copies;

  PartitionOf(const TensorList& ids, const std::vector<int64_t>& keys, int64_t count, const Lists& blocks,
              const Tensor& home)
      : copies(home) {
    STD_TORCH_CHECK(count >= 1 && count <= 65536, "partitions must be in 1..65536, got ", count);
    partition.count = (int)count;
    if (!ids.empty()) {
      STD_TORCH_CHECK((int64_t)ids.size() == blocks.blocks() && keys.empty(), "ids must be ", blocks.blocks(),
                      " tensors, without keys, got ", ids.size());
      partition.wide = ids[0].scalar_type() == ScalarType::UInt16;
      for (size_t j = 0; j < ids.size(); ++j) {
        const bool fits = ids[j].scalar_type() == (partition.wide ? ScalarType::UInt16 : ScalarType::Byte);
        STD_TORCH_CHECK(blocks.holds(ids[j]) && fits && ids[j].numel() == blocks.sizes()[j], "ids[", j,
                        "] must be bytes, or all of them uint16, an id per element, on the device of the others");
        pointers.push_back(ids[j].numel() > 0 ? copies.contiguous(ids[j]) : nullptr);
      }
      partition.ids = pointers.data();
    } else if (!keys.empty()) {
      STD_TORCH_CHECK((int64_t)keys.size() == blocks.blocks(), "keys must be ", blocks.blocks(), " numbers, got ",
                      keys.size());
      partition.keys = keys.data();
    } else {
      STD_TORCH_CHECK(count == 1, "partitions: several need ids or keys");
    }
  }
};

inline void check_types(const TensorList& a, const TensorList& b, const char* name) {
  for (size_t i = 0; i < a.size(); ++i)
    STD_TORCH_CHECK(a[i].scalar_type() == b[i].scalar_type(), name, "[", i, "] must have the other's dtype");
}

// The ops over a launcher: `Run::check(tensor)` refuses other devices, the others compute; `home` is on the device.
template <class Run>
struct MultitensorOps {
  static TensorList lincomb(const TensorList& base, const TensorList& deltas, const Tensor& coefficients,
                            const TensorList& ids, const std::vector<int64_t>& keys) {
    STD_TORCH_CHECK(coefficients.dim() == 3, "coefficients must have 3 axes (lists, blocks, partitions)");
    const size_t blocks = (size_t)coefficients.size(1);
    const int64_t lists = lists_of(deltas.size(), blocks, "deltas");
    STD_TORCH_CHECK(base.empty() || base.size() == blocks, "base must be ", blocks, " tensors, got ", base.size());
    check_table(coefficients, deltas[0], {lists, (int64_t)blocks, coefficients.size(2)}, "coefficients");
    Run::check(deltas[0]);
    Lists from(deltas[0]), first(deltas[0]), to(deltas[0]);
    from.set_sizes(deltas, blocks), first.set_sizes(deltas, blocks), to.set_sizes(deltas, blocks);
    from.add(deltas, "deltas");
    first.add(base, "base");
    PartitionOf partition(ids, keys, coefficients.size(2), from, deltas[0]);
    TensorList results = results_like(base.empty() ? deltas : base, blocks, to);
    LincombArgs args;
    args.blocks = (int64_t)blocks;
    args.size = from.sizes();
    args.lists = (int)lists;
    args.base = base.empty() ? nullptr : first.flats();
    args.deltas = from.flats();
    args.out = to.flats();
    args.partition = partition.partition;
    args.coefficients = static_cast<const double*>(coefficients.const_data_ptr());
    Run::lincomb(args, deltas[0]);
    return results;
  }

  static Tensor block_dots(const TensorList& grads, const TensorList& deltas, const TensorList& ids,
                           const std::vector<int64_t>& keys, int64_t partitions) {
    const int64_t lists = lists_of(deltas.size(), grads.size(), "deltas");
    Run::check(grads[0]);
    Lists left(grads[0]), right(grads[0]);
    left.set_sizes(grads, grads.size()), right.set_sizes(grads, grads.size());
    left.add(grads, "grads");
    right.add(deltas, "deltas");
    PartitionOf partition(ids, keys, partitions, left, grads[0]);
    Tensor sums = new_empty(grads[0], {lists, left.blocks(), partitions}, ScalarType::Double);
    BlockDotsArgs args;
    args.blocks = left.blocks();
    args.size = left.sizes();
    args.lists = (int)lists;
    args.grads = left.flats();
    args.deltas = right.flats();
    args.partition = partition.partition;
    args.sums = static_cast<double*>(sums.mutable_data_ptr());
    Run::block_dots(args, grads[0]);
    return sums;
  }

  static std::tuple<TensorList, Tensor> ratio(const TensorList& thetas, const TensorList& weights,
                                              const Tensor& coefficients, const std::vector<double>& floors) {
    STD_TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(1) > 0, "coefficients must be (settings, models)");
    const int64_t settings = coefficients.size(0), models = coefficients.size(1);
    STD_TORCH_CHECK((int64_t)floors.size() == models, "floors must be ", models, " numbers, got ", floors.size());
    STD_TORCH_CHECK(!thetas.empty() && thetas.size() % (size_t)models == 0 && weights.size() == thetas.size(),
                    "thetas and weights must be as many tensors, a positive multiple of ", models, ", got ",
                    thetas.size(), " and ", weights.size());
    const size_t blocks = thetas.size() / (size_t)models;
    Run::check(thetas[0]);
    check_table(coefficients, thetas[0], {settings, models}, "coefficients");
    Lists x(thetas[0]), w(thetas[0]), to(thetas[0]);
    x.set_sizes(thetas, blocks), w.set_sizes(thetas, blocks), to.set_sizes(thetas, blocks);
    x.add(thetas, "thetas");
    w.add(weights, "weights");
    TensorList results;
    for (int64_t s = 0; s < settings; ++s)
      for (const Tensor& t : results_like(thetas, blocks, to)) results.push_back(t);
    Tensor refused = new_empty(coefficients, {}, ScalarType::Long);
    RatioArgs args;
    args.blocks = (int64_t)blocks;
    args.size = x.sizes();
    args.models = (int)models;
    args.settings = (int)settings;
    args.thetas = x.flats();
    args.weights = w.flats();
    args.out = to.flats();
    args.coefficients = static_cast<const double*>(coefficients.const_data_ptr());
    args.floors = floors.data();
    args.refused = static_cast<int64_t*>(refused.mutable_data_ptr());
    Run::ratio(args, thetas[0]);
    return {std::move(results), std::move(refused)};
  }

  static Tensor gram(const TensorList& tensors, int64_t lists, const std::vector<int64_t>& sizes) {
    STD_TORCH_CHECK(
        lists >= 1 && lists <= 4096 && !sizes.empty() && (int64_t)tensors.size() == lists * (int64_t)sizes.size(),
        "tensors must be ", lists, " lists of ", sizes.size(), ", got ", tensors.size());
    Run::check(tensors[0]);
    Lists x(tensors[0]);
    x.set_sizes(sizes);
    x.add(tensors, "tensors", true);
    Tensor products = new_empty(tensors[0], {lists, lists}, ScalarType::Double);
    GramArgs args;
    args.blocks = x.blocks();
    args.size = x.sizes();
    args.lists = (int)lists;
    args.x = x.flats();
    args.products = static_cast<double*>(products.mutable_data_ptr());
    Run::gram(args, tensors[0]);
    return products;
  }

  static Tensor block_norms(const TensorList& tensors, const TensorList& scale, int64_t order) {
    STD_TORCH_CHECK(!tensors.empty() && (scale.empty() || scale.size() == tensors.size()),
                    "tensors must not be empty, and scale as many or none");
    STD_TORCH_CHECK(order >= 0 && order <= 2, "order must be 0 (largest), 1 or 2, got ", order);
    Run::check(tensors[0]);
    Lists x(tensors[0]), factor(tensors[0]);
    x.set_sizes(tensors, tensors.size()), factor.set_sizes(tensors, tensors.size());
    x.add(tensors, "tensors");
    factor.add(scale, "scale");
    Tensor sums = new_empty(tensors[0], {x.blocks()}, ScalarType::Double);
    NormArgs args;
    args.blocks = x.blocks();
    args.size = x.sizes();
    args.x = x.flats();
    args.scale = scale.empty() ? nullptr : factor.flats();
    args.order = (int)order;
    args.sums = static_cast<double*>(sums.mutable_data_ptr());
    Run::norm(args, tensors[0]);
    return sums;
  }

  static void perturb(const TensorList& params, const TensorList& grads, const TensorList& backup, const Tensor& factor,
                      bool adaptive) {
    STD_TORCH_CHECK(!params.empty() && grads.size() == params.size() && backup.size() == params.size(),
                    "params, grads and backup must be as many tensors, at least one");
    Run::check(params[0]);
    Lists x(params[0]), g(params[0]), kept(params[0]);
    x.set_sizes(params, params.size()), g.set_sizes(params, params.size()), kept.set_sizes(params, params.size());
    add_written(x, params, "params");
    g.add(grads, "grads");
    add_written(kept, backup, "backup");
    check_types(params, backup, "backup");
    PerturbArgs args;
    args.blocks = x.blocks();
    args.size = x.sizes();
    args.x = x.flats();
    args.grads = g.flats();
    args.backup = kept.flats();
    STD_TORCH_CHECK(
        factor.device() == params[0].device() && factor.numel() == 1 && factor.scalar_type() == ScalarType::Double,
        "factor must be one float64 number on the device of the params");
    args.adaptive = adaptive;
    Run::perturb(args, static_cast<const double*>(factor.const_data_ptr()), params[0]);
  }

  static void copy_lists(const TensorList& to, const TensorList& from) {
    STD_TORCH_CHECK(!to.empty() && to.size() == from.size(), "to and from must be as many tensors, at least one");
    Run::check(to[0]);
    Lists written(to[0]), read(to[0]);
    written.set_sizes(to, to.size()), read.set_sizes(to, to.size());
    add_written(written, to, "to");
    read.add(from, "from");
    check_types(to, from, "from");
    CopyArgs args;
    args.blocks = written.blocks();
    args.size = written.sizes();
    args.to = written.flats();
    args.from = read.flats();
    Run::copy(args, to[0]);
  }
};

}  // namespace transfuse
