// How a kernel runs tasks: the caller lends the threads (torch's pool from an op, std::thread from a test), so the
// kernels own no pool, honour torch.set_num_threads, and never start a second OpenMP runtime in the process.
#pragma once

#include <cstddef>
#include <cstdint>

namespace transfuse {

struct Parallel {
  int threads;
  // Runs worker(context, 0..workers-1), possibly at the same time; returns when all are done.
  void (*run)(const Parallel* self, int workers, void (*worker)(void*, int), void* context);
};

// Runs body(i) for i in [0, count): workers take the next index from a counter, so uneven tasks balance.
// Every task writes its own outputs, hence results do not depend on the number of threads.
void parallel_tasks(const Parallel& parallel, int64_t count, void (*body)(void*, int64_t), void* context);

template <class F>
inline void for_each_task(const Parallel& parallel, int64_t count, const F& body) {
  parallel_tasks(
      parallel, count, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Working memory of the calling thread, 64-byte aligned, valid until the next call from the same thread.
// It grows to the largest request and is released when the thread ends.
void* thread_scratch(size_t bytes);

Parallel serial_parallel();
Parallel std_thread_parallel(int threads);

// True in a process forked after this library was loaded: torch's thread pool does not survive a fork, and entering
// it would hang, so kernels run serially there.
bool forked_child();

}  // namespace transfuse
