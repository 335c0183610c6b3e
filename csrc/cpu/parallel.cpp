#include "transfuse/parallel.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace transfuse {
namespace {

std::atomic<bool> g_forked{false};
struct ForkWatch {
  ForkWatch() {
    pthread_atfork(nullptr, nullptr, [] { g_forked.store(true); });
  }
} g_fork_watch;

struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
};
thread_local Scratch t_scratch;

struct Tasks {
  std::atomic<int64_t> next{0};
  int64_t count;
  void (*body)(void*, int64_t);
  void* context;
};

void drain(void* raw, int) {
  Tasks& tasks = *static_cast<Tasks*>(raw);
  for (;;) {
    const int64_t i = tasks.next.fetch_add(1, std::memory_order_relaxed);
    if (i >= tasks.count) return;
    tasks.body(tasks.context, i);
  }
}

void run_serial(const Parallel*, int workers, void (*worker)(void*, int), void* context) {
  for (int i = 0; i < workers; ++i) worker(context, i);
}

void run_std_threads(const Parallel*, int workers, void (*worker)(void*, int), void* context) {
  std::vector<std::thread> threads;
  for (int i = 1; i < workers; ++i) threads.emplace_back(worker, context, i);
  worker(context, 0);
  for (auto& t : threads) t.join();
}

}  // namespace

bool forked_child() { return g_forked.load(); }

void parallel_tasks(const Parallel& parallel, int64_t count, void (*body)(void*, int64_t), void* context) {
  if (count <= 0) return;
  Tasks tasks;
  tasks.count = count;
  tasks.body = body;
  tasks.context = context;
  int workers = parallel.threads;
  if (workers > count) workers = (int)count;
  if (workers <= 1) {
    drain(&tasks, 0);
  } else {
    parallel.run(&parallel, workers, drain, &tasks);
  }
}

void* thread_scratch(size_t bytes) {
  if (bytes > t_scratch.size) {
    std::free(t_scratch.data);
    t_scratch.data = nullptr;
    t_scratch.size = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    t_scratch.data = std::aligned_alloc(4096, rounded);
    if (t_scratch.data == nullptr) throw std::bad_alloc();
    t_scratch.size = rounded;
  }
  return t_scratch.data;
}

Parallel serial_parallel() { return Parallel{1, run_serial}; }
Parallel std_thread_parallel(int threads) { return Parallel{threads, run_std_threads}; }

}  // namespace transfuse
