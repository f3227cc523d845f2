// The operators of atlas_kernels/ops/schema.py with coefficients by groups of elements.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "arena.h"

namespace atlas {
namespace {

// Deltas of an arena of P elements: [N * P] in floating point, or packed.
class Stored {
 public:
  Stored(const Tensor& deltas, const std::optional<Tensor>& scales, int64_t bits,
         int64_t num_vectors, int64_t numel)
      : num_vectors_(num_vectors) {
    if (scales.has_value()) {
      packed_.emplace(deltas, *scales, bits, num_vectors, numel);
      return;
    }
    const TensorRef dense(deltas);
    STD_TORCH_CHECK(bits == 0, "expected scales of deltas of ", bits, " bits");
    STD_TORCH_CHECK(dense.is_contiguous(), "arenas and tables must be contiguous");
    STD_TORCH_CHECK(dense.numel() == num_vectors * numel,
                    "expected deltas of shape [N * P] for arenas of shape [P]");
    data_ = dense.data();
    dtype_ = dense.dtype<DType>();
  }

  int64_t unit() const { return packed_ ? packed_->unit() : kLanes; }

  StoredRows rows(const Tile& tile) const {
    if (packed_) {
      const PackedRows rows = packed_->rows(tile);
      return {rows.words, rows.scales, rows.bits, DType::kFloat32, num_vectors_};
    }
    return {data_ + num_vectors_ * tile.start * size_of(dtype_), nullptr, 0, dtype_, num_vectors_};
  }

 private:
  int64_t num_vectors_;
  std::optional<Packed> packed_;
  const char* data_ = nullptr;
  DType dtype_ = DType::kFloat32;
};

const uint32_t* keys_of(const Tensor& tile_key, const Arena& arena) {
  STD_TORCH_CHECK(tile_key.numel() == arena.tiles() && tile_key.is_contiguous(),
                  "tile_key does not fit tile_offset");
  return reinterpret_cast<const uint32_t*>(tile_key.const_data_ptr<int32_t>());
}

void check_groups(int64_t groups) {
  STD_TORCH_CHECK(groups >= 1 && groups <= kTile, "expected 1 to ", kTile, " groups, got ", groups);
}

Tensor partition_compose(const Tensor& base, const Tensor& deltas,
                         const std::optional<Tensor>& scales, int64_t bits, const Tensor& coef,
                         const Tensor& tile_block, const Tensor& tile_offset,
                         const Tensor& tile_key) {
  check_float32(coef.scalar_type());
  STD_TORCH_CHECK(coef.dim() == 3 && coef.is_contiguous(),
                  "expected contiguous coef of shape (N, B, K)");
  const int64_t num_vectors = coef.size(0), num_blocks = coef.size(1), groups = coef.size(2);
  check_groups(groups);
  const Stored stored(deltas, scales, bits, num_vectors, base.numel());
  const Arena arena(base, tile_offset, num_vectors, stored.unit());
  const int32_t* block = blocks_of(tile_block, arena, num_blocks);
  const uint32_t* keys = keys_of(tile_key, arena);
  const float* coefs = coef.const_data_ptr<float>();
  const int64_t size = size_of(arena.dtype());
  expect_outputs(base.numel() * size);
  Tensor composed = empty_output(base);
  char* out = static_cast<char*>(composed.mutable_data_ptr());
  const auto compose = kernels().partition_compose_tile;
  arena.for_each_tile([&](const Tile& tile) {
    const GroupedCoef its{coefs + block[tile.index] * groups, num_blocks * groups, groups};
    compose(tile.wide, out + tile.start * size, arena.dtype(), stored.rows(tile), its,
            keys[tile.index], tile.length);
  });
  return composed;
}

// sums[k] = the sum over the slots of group k.
void sum_slots(const float* by_slot, int64_t groups, float* sums) {
  for (int64_t k = 0, s = 0; k < groups; ++k) {
    double sum = 0.0;
    for (; s * groups < (k + 1) * kTile; ++s) sum += by_slot[s];
    sums[k] = sum;
  }
}

Tensor partition_coef_grad(const Tensor& grad, const Tensor& deltas,
                           const std::optional<Tensor>& scales, int64_t bits,
                           const Tensor& tile_offset, const Tensor& tile_key,
                           const Tensor& chunk_tile, const Tensor& block_chunk, int64_t num_vectors,
                           int64_t groups, ScalarType dtype) {
  check_float32(dtype);
  check_groups(groups);
  const Stored stored(deltas, scales, bits, num_vectors, grad.numel());
  const Arena arena(grad, tile_offset, num_vectors, stored.unit());
  const uint32_t* keys = keys_of(tile_key, arena);
  const auto tiles = bounds_of(chunk_tile, arena.tiles(), "chunk_tile does not fit tile_offset");
  const int64_t num_chunks = tiles.size() - 1;
  const auto chunks = bounds_of(block_chunk, num_chunks, "block_chunk does not fit chunk_tile");
  const int64_t num_blocks = chunks.size() - 1;
  const auto dot = kernels().partition_dot_tile;

  // Few chunks are shared out vector by vector: enough parts for all threads to end together.
  const int64_t wanted = 4 * int64_t{torch::stable::get_num_threads()};
  const int64_t parts = std::clamp<int64_t>(wanted / std::max<int64_t>(num_chunks, 1), 1,
                                            std::max<int64_t>(num_vectors, 1));
  std::vector<float> partials(num_chunks * num_vectors * groups);
  for_tiles(num_chunks * parts, grad.numel() * num_vectors, [&](int64_t from, int64_t to) {
    std::vector<float> by_slot;
    for (int64_t part = from; part < to; ++part) {
      const int64_t chunk = part / parts, first = part % parts * num_vectors / parts;
      const int64_t count = (part % parts + 1) * num_vectors / parts - first;
      by_slot.assign(count * kTile, 0.0f);
      for (int64_t t = tiles[chunk]; t < tiles[chunk + 1]; ++t) {
        const Tile tile = arena.tile(t);
        dot(tile.wide, arena.dtype(), stored.rows(tile), first, count, keys[t], tile.length,
            by_slot.data());
      }
      float* sums = partials.data() + (chunk * num_vectors + first) * groups;
      for (int64_t i = 0; i < count; ++i) {
        sum_slots(by_slot.data() + i * kTile, groups, sums + i * groups);
      }
    }
  });

  Tensor result = new_empty(grad, {num_vectors, num_blocks, groups}, aoti_torch_dtype_float32());
  float* out = result.mutable_data_ptr<float>();
  std::vector<double> sums(num_vectors * groups);
  for (int64_t b = 0; b < num_blocks; ++b) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t c = chunks[b]; c < chunks[b + 1]; ++c) {
      const float* its = partials.data() + c * num_vectors * groups;
      for (int64_t j = 0; j < num_vectors * groups; ++j) sums[j] += its[j];
    }
    for (int64_t i = 0; i < num_vectors; ++i) {
      for (int64_t k = 0; k < groups; ++k) {
        out[(i * num_blocks + b) * groups + k] = sums[i * groups + k];
      }
    }
  }
  return result;
}

}  // namespace
}  // namespace atlas

STABLE_TORCH_LIBRARY_IMPL(atlas_kernels_cpp, CPU, m) {
  m.impl("partition_compose", TORCH_BOX(&atlas::partition_compose));
  m.impl("partition_coef_grad", TORCH_BOX(&atlas::partition_coef_grad));
}
