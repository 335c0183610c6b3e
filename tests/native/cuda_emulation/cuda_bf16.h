// Stands in for the CUDA toolkit's header of this name (see cuda_runtime.h here).
#pragma once

#include "storage.h"

using __nv_bfloat16 = emulation::Half<transfuse::DType::bf16>;
inline float __bfloat162float(__nv_bfloat16 x) { return emulation::to_float(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return emulation::from_float<transfuse::DType::bf16>(x); }
