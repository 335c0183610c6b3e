// Attention kernels of one ISA level; compiled once per level (see CMakeLists.txt).
#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_tangent.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

extern const AttentionKernels kAttention;
const AttentionKernels kAttention = {attention_forward, attention_backward, attention_tangent};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
