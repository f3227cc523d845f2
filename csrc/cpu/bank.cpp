// The bank form of the operators in atlas_kernels/ops/schema.py, with floating-point deltas.
#include <torch/csrc/stable/library.h>

#include "arena.h"

namespace atlas {
namespace {

// Deltas [N * P] of an arena of P elements.
class Deltas {
 public:
  Deltas(TensorRef deltas, int64_t num_vectors, int64_t numel)
      : data_(deltas.data()), dtype_(deltas.dtype<DType>()), rows_(num_vectors) {
    STD_TORCH_CHECK(deltas.is_contiguous(), "arenas and tables must be contiguous");
    STD_TORCH_CHECK(deltas.numel() == num_vectors * numel,
                    "expected deltas of shape [N * P] for arenas of shape [P]");
  }

  // Of one tile, until the next call.
  std::vector<Row>& rows(const Tile& tile) {
    const int64_t count = rows_.size();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = count * tile.start + i * tile.length;
      rows_[i] = {data_ + offset * size_of(dtype_), 0.0f, dtype_, i};
    }
    return rows_;
  }

 private:
  const char* data_;
  DType dtype_;
  std::vector<Row> rows_;
};

Tensor bank_compose(const Tensor& base, const Tensor& deltas, const Tensor& coef,
                    const Tensor& tile_block, const Tensor& tile_offset) {
  const auto compose = kernels().compose_tile;
  return compose_arena(
      base, coef, tile_block, tile_offset, 1,
      [=, source = Deltas(deltas, coef.size(0), base.numel())](
          const Tile& tile, DType dtype, const float* column, void* out, bool stream) mutable {
        std::vector<Row>& rows = source.rows(tile);
        for (Row& row : rows) row.coef = column[row.vector];
        compose(tile.wide, out, dtype, rows.data(), rows.size(), tile.length, stream);
      });
}

Tensor bank_coef_grad(const Tensor& grad, const Tensor& deltas, const Tensor& /*tile_block*/,
                      const Tensor& tile_offset, const Tensor& block_tile, int64_t num_vectors,
                      ScalarType dtype) {
  const auto dot = kernels().dot_tile;
  return dot_arena(grad, tile_offset, block_tile, num_vectors, dtype, 1,
                   [=, source = Deltas(deltas, num_vectors, grad.numel())](
                       const Tile& tile, DType wide, float* result) mutable {
                     const std::vector<Row>& rows = source.rows(tile);
                     dot(tile.wide, wide, rows.data(), rows.size(), tile.length, result);
                   });
}

}  // namespace
}  // namespace atlas

STABLE_TORCH_LIBRARY_IMPL(atlas_kernels_cpp, CPU, m) {
  m.impl("bank_compose", TORCH_BOX(&atlas::bank_compose));
  m.impl("bank_coef_grad", TORCH_BOX(&atlas::bank_coef_grad));
}
