// The bank form of the operators in atlas_kernels/ops.py, with packed deltas.
#include <torch/csrc/stable/library.h>

#include "arena.h"

namespace atlas {
namespace {

// Words [N * P * bits / 32] and scales [N * P / kGroup] of an arena of P elements.
class Packed {
 public:
  Packed(const Tensor& words, const Tensor& scales, int64_t bits, int64_t num_vectors,
         int64_t numel)
      : bits_(bits), num_vectors_(num_vectors) {
    STD_TORCH_CHECK((bits >= 1 && bits <= 4) || bits == 8, "expected 1, 2, 3, 4 or 8 bits, got ",
                    bits);
    STD_TORCH_CHECK(
        words.scalar_type() == ScalarType::Int && scales.scalar_type() == ScalarType::BFloat16,
        "expected words in int32 and scales in bfloat16");
    STD_TORCH_CHECK(words.is_contiguous() && scales.is_contiguous(),
                    "arenas and tables must be contiguous");
    STD_TORCH_CHECK(words.numel() * 32 == num_vectors * numel * bits,
                    "expected words of shape [N * P * bits / 32] for arenas of shape [P]");
    STD_TORCH_CHECK(scales.numel() * kGroup == num_vectors * numel,
                    "expected scales of shape [N * P / ", kGroup, "] for arenas of shape [P]");
    words_ = static_cast<const uint32_t*>(words.const_data_ptr());
    scales_ = static_cast<const uint16_t*>(scales.const_data_ptr());
  }

  int64_t unit() const { return unit_of(bits_); }

  PackedRows rows(const Tile& tile) const {
    const int64_t start = num_vectors_ * tile.start;
    return {words_ + start * bits_ / 32, scales_ + start / kGroup, bits_, num_vectors_};
  }

 private:
  int64_t bits_, num_vectors_;
  const uint32_t* words_;
  const uint16_t* scales_;
};

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
