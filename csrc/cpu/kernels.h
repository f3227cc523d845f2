// One tile of the composition and of its coefficient gradient, for every instruction set.
//
// kernels.cpp is compiled once per instruction set and must give the same bits each time: products
// are rounded before they are added, task vectors are added in order, and a dot product always has
// kLanes partial sums. Its translation units include nothing of the standard library but
// <stdint.h>: an inline function, emitted there with AVX-512 instructions, could be the copy the
// linker keeps.
#pragma once

#include <stdint.h>

namespace atlas {

// Elements; the same as TILE in atlas_kernels/ops/layout.py.
constexpr int64_t kTile = 4096;
// Packed elements under one scale; the same as GROUP in atlas_kernels/codecs/packed.py.
constexpr int64_t kGroup = 128;
constexpr int64_t kLanes = 16;

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// Elements that codes of so many bits are packed in; `alignment` in atlas_kernels/codecs/packed.py.
constexpr int64_t unit_of(int64_t bits) {
  return bits == 1 || bits == 3 ? 512 : bits == 2 ? 256 : kGroup;
}

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A tile's share of one task vector. `data` may lie at any address.
struct Row {
  const void* data;
  float coef;  // compose_tile only
  DType dtype;
  int64_t vector;  // dot_tile only: where the result goes
};

// A tile of packed task vectors: the words and the scales of one after those of the other. In a
// bank, what follows the last belongs to the next tile.
struct PackedRows {
  const uint32_t* words;
  const uint16_t* scales;  // bfloat16
  int64_t bits;            // of a code: 1, 2, 3, 4 or 8
  int64_t count;
};

// A tile of task vectors of either kind, one after the other.
struct StoredRows {
  const void* items;       // floating-point elements, or words
  const uint16_t* scales;  // of words
  int64_t bits;            // of a code; 0 for floating point
  DType dtype;             // of floating-point elements
  int64_t count;
};

// Coefficients of a block: those of vector i, for `groups` groups of elements that the key of a
// tile decides (see atlas_kernels/ops/groups.py), begin at i * stride.
struct GroupedCoef {
  const float* data;
  int64_t stride;
  int64_t groups;  // at most kTile
};

struct Kernels {
  // out[e] = base[e] + sum over rows of coef * data[e], for e < length <= kTile. `stream` writes
  // around the caches where the address allows.
  void (*compose_tile)(const void* base, void* out, DType dtype, const Row* rows, int64_t num_rows,
                       int64_t length, bool stream);
  // result[row.vector] = sum over e < length <= kTile of grad[e] * data[e], for every row.
  void (*dot_tile)(const void* grad, DType dtype, const Row* rows, int64_t num_rows, int64_t length,
                   float* result);
  // The same for packed rows and a `length` of whole units:
  // out[e] = base[e] + sum over rows i of (coef[i] * scale) * level.
  void (*packed_compose_tile)(const void* base, void* out, DType dtype, const PackedRows& rows,
                              const float* coef, int64_t length, bool stream);
  // result[i] = sum over groups of scale * (sum over the group of grad[e] * level).
  void (*packed_dot_tile)(const void* grad, DType dtype, const PackedRows& rows, int64_t length,
                          float* result);
  // For either kind and a `length` of whole lanes or units:
  // out[e] = base[e] + sum over rows i of coef[i, group(e)] * data[e].
  void (*group_compose_tile)(const void* base, void* out, DType dtype, const StoredRows& rows,
                             const GroupedCoef& coef, uint32_t key, int64_t length);
  // by_slot[i * kTile + slot(e)] += grad[e] * data[e] of row first + i, for all i < count.
  void (*group_dot_tile)(const void* grad, DType dtype, const StoredRows& rows, int64_t first,
                         int64_t count, uint32_t key, int64_t length, float* by_slot);
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
