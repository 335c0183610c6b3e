// Tables of numbers and addresses that kernels read: their way to the device, and finding a place in one.
#pragma once

#include "device.h"

namespace transfuse {

// Brings words of the host into device memory, as arguments of small kernels: those are part of a recorded CUDA graph,
// while a copy from the host would have to be waited for, or its memory kept for as long as the graph.
cudaError_t upload_words(uint64_t* to, const uint64_t* words, size_t count, cudaStream_t stream);

// The last i in [0, count) with start[i] <= number, where start[0] <= number, found by the 32 lanes of a warp together.
__device__ inline int64_t find_segment(const int64_t* start, int64_t count, int64_t number) {
  int64_t first = 0, last = count;  // it is in [first, last)
  while (last - first > 1) {
    const int64_t step = (last - first + kWarp - 1) / kWarp, probe = first + (int64_t)(threadIdx.x % kWarp) * step;
    const int below = __popc(__ballot_sync(0xffffffffu, probe < last && start[probe] <= number));
    first += (below - 1) * step;
    last = first + step < last ? first + step : last;
  }
  return first;
}

}  // namespace transfuse
