// The op library: schemas live beside each op's registration; this file holds what they share.
#include "torch_glue.h"

namespace transfuse {
namespace {

void run_on_torch_pool(const Parallel*, int workers, void (*worker)(void*, int), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(context, (int)i);
  });
}

}  // namespace

Parallel torch_parallel() {
  if (forked_child()) return serial_parallel();
  return Parallel{(int)torch::stable::get_num_threads(), run_on_torch_pool};
}

}  // namespace transfuse
