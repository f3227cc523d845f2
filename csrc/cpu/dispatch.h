// Which instruction set runs.
#pragma once

#include "kernels.h"

namespace atlas {

// The kernels of the best instruction set of this machine, or of the one that
// ATLAS_KERNELS_CPU_CAPABILITY names: "baseline", "avx2" or "avx512".
const Kernels& kernels();

}  // namespace atlas
