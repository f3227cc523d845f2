// What the operators on arenas share: the walk over the tiles of atlas_kernels/ops/layout.py.
#pragma once

#include <optional>

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

// Deltas of an arena of P elements: [N * P] in floating point, or words [N * P * bits / 32] with
// scales [N * P / kGroup].
class Stored {
 public:
  Stored(TensorRef deltas, const std::optional<Tensor>& scales, int64_t bits, int64_t num_vectors,
         int64_t numel)
      : items_(deltas.data()), bits_(bits), num_vectors_(num_vectors) {
    STD_TORCH_CHECK(deltas.is_contiguous() && (!scales || scales->is_contiguous()),
                    "arenas and tables must be contiguous");
    if (!scales) {
      STD_TORCH_CHECK(bits == 0, "expected scales of deltas of ", bits, " bits");
      STD_TORCH_CHECK(deltas.numel() == num_vectors * numel,
                      "expected deltas of shape [N * P] for arenas of shape [P]");
      dtype_ = deltas.dtype<DType>();
      return;
    }
    STD_TORCH_CHECK((bits >= 1 && bits <= 4) || bits == 8, "expected 1, 2, 3, 4 or 8 bits, got ",
                    bits);
    STD_TORCH_CHECK(deltas.dtype_code() == aoti_torch_dtype_int32() &&
                        scales->scalar_type() == ScalarType::BFloat16,
                    "expected words in int32 and scales in bfloat16");
    STD_TORCH_CHECK(deltas.numel() * 32 == num_vectors * numel * bits,
                    "expected words of shape [N * P * bits / 32] for arenas of shape [P]");
    STD_TORCH_CHECK(scales->numel() * kGroup == num_vectors * numel,
                    "expected scales of shape [N * P / ", kGroup, "] for arenas of shape [P]");
    scales_ = static_cast<const uint16_t*>(scales->const_data_ptr());
  }

  bool packed() const { return bits_ != 0; }
  int64_t unit() const { return bits_ == 0 ? 1 : unit_of(bits_); }

  StoredRows rows(const Tile& tile) const {
    const int64_t start = num_vectors_ * tile.start;
    if (!packed()) return {items_ + start * size_of(dtype_), nullptr, 0, dtype_, num_vectors_};
    return {items_ + start * bits_ / 8, scales_ + start / kGroup, bits_, dtype_, num_vectors_};
  }

  PackedRows packed_rows(const Tile& tile) const {
    const StoredRows its = rows(tile);
    return {static_cast<const uint32_t*>(its.items), its.scales, its.bits, its.count};
  }

  // The same as one row per vector.
  void rows(const Tile& tile, std::vector<Row>& rows) const {
    const StoredRows its = this->rows(tile);
    rows.resize(num_vectors_);
    for (int64_t i = 0; i < num_vectors_; ++i) {
      const char* items = static_cast<const char*>(its.items);
      rows[i] = {items + i * tile.length * size_of(dtype_), 0.0f, dtype_, i};
    }
  }

 private:
  const char* items_;
  const uint16_t* scales_ = nullptr;
  DType dtype_ = DType::kFloat32;
  int64_t bits_, num_vectors_;
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

}  // namespace atlas
