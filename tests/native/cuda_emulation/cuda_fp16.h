// Stands in for the CUDA toolkit's header of this name (see cuda_runtime.h here).
#pragma once

#include "storage.h"

using __half = emulation::Half<transfuse::DType::f16>;
inline float __half2float(__half x) { return emulation::to_float(x); }
inline __half __float2half_rn(float x) { return emulation::from_float<transfuse::DType::f16>(x); }
