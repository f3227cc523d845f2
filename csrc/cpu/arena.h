// What the operators on arenas share: the walk over the tiles of atlas_kernels/ops/layout.py.
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
        dtype_(wide.dtype<DType>()),
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

  Tile tile(int64_t t) const {
    const int64_t start = offset_[t];
    return {t, start, offset_[t + 1] - start, wide_ + start * size_of(dtype_)};
  }

  // Calls work(tile) for every tile, in parallel, on copies of `work`: what it holds is a thread's
  // own.
  template <class Work>
  void for_each_tile(const Work& work) const {
    for_tiles(tiles_, offset_[tiles_] * (1 + num_vectors_), [&](int64_t first, int64_t last) {
      Work own = work;
      for (int64_t t = first; t < last; ++t) own(tile(t));
    });
  }

 private:
  int64_t num_vectors_, tiles_;
  const char* wide_;
  DType dtype_;
  const int64_t* offset_;
};

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

// The entries of tile_block, checked.
inline const int32_t* blocks_of(const Tensor& tile_block, const Arena& arena, int64_t num_blocks) {
  STD_TORCH_CHECK(tile_block.numel() == arena.tiles() && tile_block.is_contiguous(),
                  "tile_block does not fit tile_offset");
  const int32_t* block = tile_block.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(std::all_of(block, block + arena.tiles(),
                              [=](int32_t b) { return b >= 0 && b < num_blocks; }),
                  "tile_block does not fit coef");
  return block;
}

// The entries of a table of ranges that cover [0, end) in order.
inline std::vector<int64_t> bounds_of(const Tensor& table, int64_t end, const char* message) {
  STD_TORCH_CHECK(table.is_contiguous(), "tables must be contiguous");
  const int32_t* first = table.const_data_ptr<int32_t>();
  const std::vector<int64_t> bounds(first, first + table.numel());
  STD_TORCH_CHECK(!bounds.empty() && bounds[0] == 0 && bounds.back() == end &&
                      std::is_sorted(bounds.begin(), bounds.end()),
                  message);
  return bounds;
}

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
  const int32_t* block = blocks_of(tile_block, arena, num_blocks);
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
  const auto tiles = bounds_of(block_tile, arena.tiles(), "block_tile does not fit tile_offset");
  std::vector<float> partials(arena.tiles() * num_vectors);
  float* results = partials.data();
  const DType wide = arena.dtype();
  arena.for_each_tile(
      [=](const Tile& tile) mutable { kernel(tile, wide, results + tile.index * num_vectors); });
  return sum_tiles(grad, partials, tiles, num_vectors);
}

}  // namespace atlas
