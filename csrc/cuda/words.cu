// See words.h.
#include "words.h"

#include <algorithm>
#include <cstring>

namespace transfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = 500;  // that fit in the arguments of a launch, 4 KiB on every architecture

struct Upload {
  uint64_t* to;
  int count;
  uint64_t words[kWords];
};

__global__ void __launch_bounds__(kThreads) upload_kernel(const Upload u) {
  for (int i = (int)threadIdx.x; i < u.count; i += kThreads) u.to[i] = u.words[i];
}

}  // namespace

cudaError_t upload_words(uint64_t* to, const uint64_t* words, size_t count, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (size_t begin = 0; begin < count && error == cudaSuccess; begin += kWords) {
    Upload u = {};
    u.to = to + begin;
    u.count = (int)std::min<size_t>(kWords, count - begin);
    std::memcpy(u.words, words + begin, (size_t)u.count * 8);
    error = launch(upload_kernel, 1, kThreads, stream, u);
  }
  return error;
}

}  // namespace transfuse
