// The second moment of image patches: S = sum over patches p of x_p x_p^T, without forming a patch.
//
// Entry ((c, i, j), (c', i', j')) sums X[c, y + i, x + j] X[c', y + i', x + j'] over the corners (y, x) of all patches:
// the correlation of two channels at the distance (i' - i, j' - j), over a window that starts at (i, j). Entries of one
// distance whose windows lie on one lattice (strides leave several) differ at the borders of the window alone. So a
// correlation is summed once over what all its windows have in common, and border rows and columns are kept apart and
// added where they belong; nothing is subtracted.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

struct PatchGramArgs {
  DType dtype = DType::f32;
  const void* x = nullptr;
  int64_t size[5] = {0};    // groups, batch, channels, height, width
  int64_t stride[5] = {0};  // elements
  // Of the patches, down and across; they fit, so that there is at least one in each direction.
  int64_t kernel[2] = {1, 1}, step[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1}, count[2] = {0, 0};
  void* out = nullptr;  // (groups, n, n) with n = channels kernel[0] kernel[1]; float, double for f64
};

struct PatchGramKernels {
  void (*run)(const PatchGramArgs&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const PatchGramKernels& patch_gram_kernels();

}  // namespace transfuse
