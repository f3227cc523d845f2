// What the operators (ops.cpp) ask of the kernels (`.cu` files): plain C++, so that either side,
// and the tests' CPU shim, compiles without the other's headers.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace atlas_kernels {

enum class Dtype : uint8_t { kFloat32, kBFloat16, kFloat16 };

// One tensor's elements in device memory; no `data` means no such block.
struct Operand {
  const void* data;
  Dtype dtype;
};

// Elements per tile; `ops/layout.py` explains the number.
constexpr int kTile = 4096;

// As many bytes of arguments as a launch can carry since CUDA 12.1.
constexpr int kMaxArgumentBytes = 32764;
constexpr int kTableBlocks = 160;
constexpr int kTableDeltas = 3072;

// The tensors of one list-form launch: blocks [first_block, first_block + num_blocks) and vectors
// [first_vector, first_vector + num_vectors). It travels as a kernel argument, so a CUDA graph
// holds its own copy and no copy can be stale.
struct Table {
  const void* source[kTableBlocks];  // base, or gradient
  void* target[kTableBlocks];        // composed block; unused for a gradient
  int64_t numel[kTableBlocks];
  const void* delta[kTableDeltas];  // [num_blocks, num_vectors]
  const float* coef;                // [all vectors, all blocks]
  float* partials;                  // [num_vectors, tiles of this launch]
  float* coef_grad;                 // [all vectors, all blocks]
  int64_t all_blocks;
  int64_t first_block;
  int64_t first_vector;
  int32_t num_blocks;
  int32_t num_vectors;
  int32_t first_tile[kTableBlocks + 1];
  Dtype source_dtype[kTableBlocks];
  Dtype target_dtype[kTableBlocks];
  Dtype delta_dtype[kTableDeltas];
};
static_assert(sizeof(Table) <= kMaxArgumentBytes, "the table must fit into a launch");

// The tables of a bank, as in `ops/layout.py`.
struct Tiling {
  const int32_t* tile_block;
  const int64_t* tile_offset;
  int64_t num_tiles;
  int64_t num_blocks;
  int64_t num_vectors;
};

struct Bank : Tiling {
  Operand source;  // base, or gradient [P]
  Operand deltas;  // [N * P], tile-interleaved
};

// Deltas as in `codecs/packed.py`, tile-interleaved. Source and words start at multiples of 16
// bytes, and so does what is composed.
struct PackedBank : Tiling {
  Operand source;
  const uint32_t* words;   // [N * P * bits / 32]
  const uint16_t* scales;  // [N * P / 128], bfloat16
  int bits;
};

// Groups of a block's elements, as in `ops/groups.py`: each has its own coefficients.
struct Groups {
  const int32_t* tile_key;
  int num_groups;
};

// Tiles of a block whose partial sums are one, as in `ops/layout.py`.
struct Chunks {
  const int32_t* chunk_tile;
  const int32_t* block_chunk;
  int64_t num_chunks;
};

// The blocks and vectors of a list-form call.
struct List {
  const Operand* source;  // [num_blocks], base or gradient
  const int64_t* numel;   // [num_blocks]
  const Operand* deltas;  // [num_vectors, num_blocks]
  int64_t num_blocks;
  int64_t num_vectors;
};

// All of them enqueue on `stream` and return at once. Nothing is launched where there is no work.

cudaError_t arena_compose(const Bank& bank, const float* coef, void* composed, cudaStream_t stream);
cudaError_t arena_compose(const PackedBank& bank, const float* coef, void* composed,
                          cudaStream_t stream);

// `partials`: num_vectors * num_tiles floats.
cudaError_t arena_coef_grad(const Bank& bank, const int32_t* block_tile, float* partials,
                            float* coef_grad, cudaStream_t stream);
cudaError_t arena_coef_grad(const PackedBank& bank, const int32_t* block_tile, float* partials,
                            float* coef_grad, cudaStream_t stream);

// The second stage of both: a block's sum over the partials of its tiles.
cudaError_t arena_total(const Tiling& tiling, const int32_t* block_tile, const float* partials,
                        float* coef_grad, cudaStream_t stream);

// For a coefficient per group: `coef` is [num_vectors, num_blocks, num_groups].
cudaError_t arena_compose(const Bank& bank, const Groups& groups, const float* coef, void* composed,
                          cudaStream_t stream);
cudaError_t arena_compose(const PackedBank& bank, const Groups& groups, const float* coef,
                          void* composed, cudaStream_t stream);

// `partials`: num_chunks * num_vectors * num_groups floats.
cudaError_t arena_coef_grad(const Bank& bank, const Groups& groups, const Chunks& chunks,
                            float* partials, float* coef_grad, cudaStream_t stream);
cudaError_t arena_coef_grad(const PackedBank& bank, const Groups& groups, const Chunks& chunks,
                            float* partials, float* coef_grad, cudaStream_t stream);

// `scratch`: `compose_scratch` floats.
cudaError_t compose(const List& list, const float* coef, void* const* composed, float* scratch,
                    cudaStream_t stream);
int64_t compose_scratch(const List& list);

// `partials`: `coef_grad_scratch` floats.
cudaError_t coef_grad(const List& list, float* partials, float* coef_grad, cudaStream_t stream);
int64_t coef_grad_scratch(const List& list);

}  // namespace atlas_kernels
