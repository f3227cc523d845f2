// The bank form of the operators in atlas_kernels/ops.py: the arenas of atlas_kernels/layout.py.
#include <torch/csrc/stable/library.h>

#include "common.h"
#include "dispatch.h"
#include "memory.h"
#include "parallel.h"

namespace atlas {
namespace {

class Bank {
 public:
  // `wide` is the base or its gradient.
  Bank(TensorRef wide, TensorRef deltas, const Tensor& tile_offset, int64_t num_vectors)
      : num_vectors_(num_vectors),
        tiles_(tile_offset.numel() - 1),
        wide_(wide.data()),
        wide_dtype_(wide.dtype()),
        deltas_(deltas.data()),
        delta_dtype_(deltas.dtype()),
        offset_(tile_offset.const_data_ptr<int64_t>()) {
    STD_TORCH_CHECK(wide.is_contiguous() && deltas.is_contiguous() && tile_offset.is_contiguous(),
                    "arenas and tables must be contiguous");
    STD_TORCH_CHECK(deltas.numel() == num_vectors * wide.numel(),
                    "expected deltas of shape [N * P] for arenas of shape [P]");
    STD_TORCH_CHECK(tiles_ >= 0 && offset_[0] == 0 && offset_[tiles_] == wide.numel(),
                    "tile_offset does not fit the arenas");
    for (int64_t t = 0; t < tiles_; ++t) {
      const int64_t length = offset_[t + 1] - offset_[t];
      STD_TORCH_CHECK(length >= 0 && length <= kTile, "tile ", t, " has ", length, " elements");
    }
  }

  int64_t tiles() const { return tiles_; }
  DType dtype() const { return wide_dtype_; }

  // Calls work(base or gradient, rows of the tile, tile, first element, elements) for every tile,
  // in parallel. coef_of(i, tile) is a row's coefficient.
  template <class CoefOf, class Work>
  void for_each_tile(const CoefOf& coef_of, const Work& work) const {
    for_tiles(tiles_, offset_[tiles_] * (1 + num_vectors_), [&](int64_t first, int64_t last) {
      std::vector<Row> rows(num_vectors_);
      for (int64_t t = first; t < last; ++t) {
        const int64_t start = offset_[t];
        const int64_t length = offset_[t + 1] - start;
        for (int64_t i = 0; i < num_vectors_; ++i) {
          const int64_t offset = num_vectors_ * start + i * length;
          rows[i] = {deltas_ + offset * size_of(delta_dtype_), coef_of(i, t), delta_dtype_, i};
        }
        work(wide_ + start * size_of(wide_dtype_), rows, t, start, length);
      }
    });
  }

 private:
  int64_t num_vectors_, tiles_;
  const char* wide_;
  DType wide_dtype_;
  const char* deltas_;
  DType delta_dtype_;
  const int64_t* offset_;
};

Tensor bank_compose(const Tensor& base, const Tensor& deltas, const Tensor& coef,
                    const Tensor& tile_block, const Tensor& tile_offset) {
  check_float32(coef.scalar_type());
  STD_TORCH_CHECK(coef.dim() == 2 && coef.is_contiguous(),
                  "expected contiguous coef of shape (N, B)");
  const Bank bank(base, deltas, tile_offset, coef.size(0));
  STD_TORCH_CHECK(tile_block.numel() == bank.tiles() && tile_block.is_contiguous(),
                  "tile_block does not fit tile_offset");
  const int64_t output = base.numel() * size_of(bank.dtype());
  expect_outputs(output);
  Tensor composed = empty_output(base);
  char* out = static_cast<char*>(composed.mutable_data_ptr());
  const bool stream = output >= kStream;
  const Kernels& kernel = kernels();
  const int64_t num_blocks = coef.size(1);
  const float* coefs = coef.const_data_ptr<float>();
  const int32_t* block = tile_block.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(
      std::all_of(block, block + bank.tiles(), [=](int32_t b) { return b >= 0 && b < num_blocks; }),
      "tile_block does not fit coef");
  bank.for_each_tile(
      [&](int64_t i, int64_t tile) { return coefs[i * num_blocks + block[tile]]; },
      [&](const char* wide, const std::vector<Row>& rows, int64_t, int64_t start, int64_t length) {
        kernel.compose_tile(wide, out + start * size_of(bank.dtype()), bank.dtype(), rows.data(),
                            rows.size(), length, stream);
      });
  return composed;
}

Tensor bank_coef_grad(const Tensor& grad, const Tensor& deltas, const Tensor& /*tile_block*/,
                      const Tensor& tile_offset, const Tensor& block_tile, int64_t num_vectors,
                      ScalarType dtype) {
  check_float32(dtype);
  const Bank bank(grad, deltas, tile_offset, num_vectors);
  STD_TORCH_CHECK(block_tile.is_contiguous(), "tables must be contiguous");
  const int32_t* first_tile = block_tile.const_data_ptr<int32_t>();
  const std::vector<int64_t> tiles(first_tile, first_tile + block_tile.numel());
  STD_TORCH_CHECK(!tiles.empty() && tiles[0] == 0 && tiles.back() == bank.tiles() &&
                      std::is_sorted(tiles.begin(), tiles.end()),
                  "block_tile does not fit tile_offset");
  std::vector<float> partials(bank.tiles() * num_vectors);
  const Kernels& kernel = kernels();
  bank.for_each_tile(
      [](int64_t, int64_t) { return 0.0f; },
      [&](const char* wide, const std::vector<Row>& rows, int64_t tile, int64_t, int64_t length) {
        kernel.dot_tile(wide, bank.dtype(), rows.data(), rows.size(), length,
                        partials.data() + tile * num_vectors);
      });
  return sum_tiles(grad, partials, tiles, num_vectors);
}

}  // namespace
}  // namespace atlas

STABLE_TORCH_LIBRARY_IMPL(atlas_kernels_cpp, CPU, m) {
  m.impl("bank_compose", TORCH_BOX(&atlas::bank_compose));
  m.impl("bank_coef_grad", TORCH_BOX(&atlas::bank_coef_grad));
}
