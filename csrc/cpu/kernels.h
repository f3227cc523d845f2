// One tile of the composition and of its coefficient gradient, for every instruction set.
//
// kernels.cpp is compiled once per instruction set and must give the same bits each time: products
// are rounded before they are added, task vectors are added in order, and a dot product always has
// kLanes partial sums. Its translation units include nothing but what is here: an inline function
// of the standard library, emitted there with AVX-512 instructions, could be the copy the linker
// keeps.
#pragma once

#include <stdint.h>

namespace atlas {

// Elements; the same as TILE in atlas_kernels/layout.py.
constexpr int64_t kTile = 4096;
constexpr int64_t kLanes = 16;

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A tile's share of one task vector. `data` may lie at any address.
struct Row {
  const void* data;
  float coef;  // compose_tile only
  DType dtype;
  int64_t vector;  // dot_tile only: where the result goes
};

struct Kernels {
  // out[e] = base[e] + sum over rows of coef * data[e], for e < length <= kTile. `stream` writes
  // around the caches where the address allows.
  void (*compose_tile)(const void* base, void* out, DType dtype, const Row* rows, int64_t num_rows,
                       int64_t length, bool stream);
  // result[row.vector] = sum over e < length <= kTile of grad[e] * data[e], for every row.
  void (*dot_tile)(const void* grad, DType dtype, const Row* rows, int64_t num_rows, int64_t length,
                   float* result);
  // Orders streamed stores before everything that follows.
  void (*fence)();
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace atlas
