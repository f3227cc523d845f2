// What the operators on arenas share: the walk over the tiles of atlas_kernels/layout.py.
#pragma once

#include "common.h"
#include "dispatch.h"
#include "memory.h"
#include "parallel.h"

namespace atlas {

struct Tile {
  int64_t index;
  int64_t start, length;  // elements
  const char* wide;       // of the base or its gradient
};

class Arena {
 public:
  // `wide` is the base or its gradient. A tile must be a multiple of `unit` elements.
  Arena(TensorRef wide, const Tensor& tile_offset, int64_t num_vectors, int64_t unit)
      : num_vectors_(num_vectors),
        tiles_(tile_offset.numel() - 1),
        wide_(wide.data()),
        dtype_(wide.dtype()),
        offset_(tile_offset.const_data_ptr<int64_t>()) {
    STD_TORCH_CHECK(wide.is_contiguous() && tile_offset.is_contiguous(),
                    "arenas and tables must be contiguous");
    STD_TORCH_CHECK(tiles_ >= 0 && offset_[0] == 0 && offset_[tiles_] == wide.numel(),
                    "tile_offset does not fit the arenas");
    for (int64_t t = 0; t < tiles_; ++t) {
      const int64_t length = offset_[t + 1] - offset_[t];
      STD_TORCH_CHECK(length >= 0 && length <= kTile && length % unit == 0, "tile ", t, " has ",
                      length, " elements");
    }
  }

  int64_t tiles() const { return tiles_; }
  DType dtype() const { return dtype_; }

  // Calls work(tile) for every tile, in parallel, on copies of `work`: what it holds is a thread's
  // own.
  template <class Work>
  void for_each_tile(const Work& work) const {
    for_tiles(tiles_, offset_[tiles_] * (1 + num_vectors_), [&](int64_t first, int64_t last) {
      Work own = work;
      for (int64_t t = first; t < last; ++t) {
        const int64_t start = offset_[t];
        own(Tile{t, start, offset_[t + 1] - start, wide_ + start * size_of(dtype_)});
      }
    });
  }

 private:
  int64_t num_vectors_, tiles_;
  const char* wide_;
  DType dtype_;
  const int64_t* offset_;
};

// Calls kernel(tile, dtype, coefficients of its block, where the result goes, stream) for every
// tile; returns the composed arena.
template <class Kernel>
Tensor compose_arena(const Tensor& base, const Tensor& coef, const Tensor& tile_block,
                     const Tensor& tile_offset, int64_t unit, Kernel kernel) {
  check_float32(coef.scalar_type());
  STD_TORCH_CHECK(coef.dim() == 2 && coef.is_contiguous(),
                  "expected contiguous coef of shape (N, B)");
  const int64_t num_vectors = coef.size(0), num_blocks = coef.size(1);
  const Arena arena(base, tile_offset, num_vectors, unit);
  STD_TORCH_CHECK(tile_block.numel() == arena.tiles() && tile_block.is_contiguous(),
                  "tile_block does not fit tile_offset");
  const int32_t* block = tile_block.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(std::all_of(block, block + arena.tiles(),
                              [=](int32_t b) { return b >= 0 && b < num_blocks; }),
                  "tile_block does not fit coef");
  const DType dtype = arena.dtype();
  const int64_t output = base.numel() * size_of(dtype);
  expect_outputs(output);
  Tensor composed = empty_output(base);
  char* out = static_cast<char*>(composed.mutable_data_ptr());
  const bool stream = output >= kStream;
  const float* coefs = coef.const_data_ptr<float>();
  arena.for_each_tile([=, column = std::vector<float>(num_vectors)](const Tile& tile) mutable {
    for (int64_t i = 0; i < num_vectors; ++i) column[i] = coefs[i * num_blocks + block[tile.index]];
    kernel(tile, dtype, column.data(), out + tile.start * size_of(dtype), stream);
  });
  return composed;
}

// Calls kernel(tile, dtype, where the N results go) for every tile; returns their sums (N, B).
template <class Kernel>
Tensor dot_arena(const Tensor& grad, const Tensor& tile_offset, const Tensor& block_tile,
                 int64_t num_vectors, ScalarType dtype, int64_t unit, Kernel kernel) {
  check_float32(dtype);
  const Arena arena(grad, tile_offset, num_vectors, unit);
  STD_TORCH_CHECK(block_tile.is_contiguous(), "tables must be contiguous");
  const int32_t* first_tile = block_tile.const_data_ptr<int32_t>();
  const std::vector<int64_t> tiles(first_tile, first_tile + block_tile.numel());
  STD_TORCH_CHECK(!tiles.empty() && tiles[0] == 0 && tiles.back() == arena.tiles() &&
                      std::is_sorted(tiles.begin(), tiles.end()),
                  "block_tile does not fit tile_offset");
  std::vector<float> partials(arena.tiles() * num_vectors);
  float* results = partials.data();
  const DType wide = arena.dtype();
  arena.for_each_tile(
      [=](const Tile& tile) mutable { kernel(tile, wide, results + tile.index * num_vectors); });
  return sum_tiles(grad, partials, tiles, num_vectors);
}

}  // namespace atlas
