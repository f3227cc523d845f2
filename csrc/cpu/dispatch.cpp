#include "dispatch.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace atlas {
namespace {

struct Capability {
  const char* name;
  bool supported;
  const Kernels* kernels;
};

const Kernels& choose() {
  const Capability capabilities[] = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl"),
       &avx512::kernels},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"), &avx2::kernels},
#endif
      {"baseline", true, &baseline::kernels},
  };
  const char* requested = std::getenv("ATLAS_KERNELS_CPU_CAPABILITY");
  for (const Capability& capability : capabilities) {
    if (requested == nullptr ? capability.supported : capability.name == std::string(requested)) {
      STD_TORCH_CHECK(capability.supported, "ATLAS_KERNELS_CPU_CAPABILITY=", requested,
                      ": this machine has no such instructions");
      return *capability.kernels;
    }
  }
  STD_TORCH_CHECK(false, "ATLAS_KERNELS_CPU_CAPABILITY=", requested,
                  ": expected baseline, avx2 or avx512");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace atlas
