// See kernels.h. ATLAS_CAPABILITY is the namespace of the instruction set compiled for.
#include "kernels.h"

#include "dense.h"
#include "groups.h"
#include "packed.h"

namespace atlas {
namespace ATLAS_CAPABILITY {
namespace {

void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace

extern const Kernels kernels = {
    compose_tile,   dot_tile, packed_compose_tile, packed_dot_tile, group_compose_tile,
    group_dot_tile, fence};

}  // namespace ATLAS_CAPABILITY
}  // namespace atlas
