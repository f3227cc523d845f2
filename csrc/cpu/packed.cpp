// The bank form of the operators in atlas_kernels/ops/schema.py, with packed deltas.
#include <torch/csrc/stable/library.h>

#include "arena.h"

namespace atlas {
namespace {

Tensor packed_compose(const Tensor& base, const Tensor& words, const Tensor& scales, int64_t bits,
                      const Tensor& coef, const Tensor& tile_block, const Tensor& tile_offset) {
  const Packed source(words, scales, bits, coef.size(0), base.numel());
  const auto compose = kernels().packed_compose_tile;
  return compose_arena(
      base, coef, tile_block, tile_offset, source.unit(),
      [=](const Tile& tile, DType dtype, const float* column, void* out, bool stream) {
        compose(tile.wide, out, dtype, source.rows(tile), column, tile.length, stream);
      });
}

Tensor packed_coef_grad(const Tensor& grad, const Tensor& words, const Tensor& scales, int64_t bits,
                        const Tensor& /*tile_block*/, const Tensor& tile_offset,
                        const Tensor& block_tile, int64_t num_vectors, ScalarType dtype) {
  const Packed source(words, scales, bits, num_vectors, grad.numel());
  const auto dot = kernels().packed_dot_tile;
  return dot_arena(grad, tile_offset, block_tile, num_vectors, dtype, source.unit(),
                   [=](const Tile& tile, DType wide, float* result) {
                     dot(tile.wide, wide, source.rows(tile), tile.length, result);
                   });
}

}  // namespace
}  // namespace atlas

STABLE_TORCH_LIBRARY_IMPL(atlas_kernels_cpp, CPU, m) {
  m.impl("packed_compose", TORCH_BOX(&atlas::packed_compose));
  m.impl("packed_coef_grad", TORCH_BOX(&atlas::packed_coef_grad));
}
