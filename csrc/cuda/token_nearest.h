// What the two searches for cosine neighbours share: token_nearest.cu for every type and layout, on CUDA cores, and
// token_nearest_half.cu for 16-bit numbers in whole packs, on tensor cores.
#pragma once

#include "device.h"
#include "transfuse/token_merging.h"

namespace transfuse {

// Inverse norms of the vectors, 0 for those that count as zero or hold a NaN or an infinity.
template <class A>
struct InverseNorms {
  const A *rows, *columns;
  int64_t column_stride;  // between batch entries; rows' are contiguous
};

__device__ inline bool masked(const NearestArgs& n, int64_t b, int64_t j) {
  return n.mask != nullptr && n.mask[b * n.mask_stride[0] + j * n.mask_stride[1]] == 0;
}

// Whether the search on tensor cores takes these arguments.
bool takes_nearest_half(const NearestArgs&);
// Numbers of 4 bytes that it needs as working memory.
int64_t nearest_half_working(const NearestArgs&);
cudaError_t search_nearest_half(const NearestArgs&, const InverseNorms<float>&, void* working, cudaStream_t);

}  // namespace transfuse
