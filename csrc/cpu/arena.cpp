// The arena form of the operators in atlas_kernels/ops/schema.py.
#include "arena.h"

#include <torch/csrc/stable/library.h>

namespace atlas {
namespace {

const uint32_t* keys_of(const Tensor& tile_key, const Arena& arena) {
  STD_TORCH_CHECK(tile_key.numel() == arena.tiles() && tile_key.is_contiguous(),
                  "tile_key does not fit tile_offset");
  return reinterpret_cast<const uint32_t*>(tile_key.const_data_ptr<int32_t>());
}

void check_groups(int64_t groups) {
  STD_TORCH_CHECK(groups >= 1 && groups <= kTile, "expected 1 to ", kTile, " groups, got ", groups);
}

// `coef`: (N, B), or (N, B, K) with a `tile_key`.
Tensor arena_compose(const Tensor& base, const Tensor& deltas, const std::optional<Tensor>& scales,
                     int64_t bits, const Tensor& tile_block, const Tensor& tile_offset,
                     const Tensor& /*block_tile*/, const Tensor& /*chunk_tile*/,
                     const Tensor& /*block_chunk*/, const std::optional<Tensor>& tile_key,
                     const Tensor& coef) {
  check_float32(coef.scalar_type());
  STD_TORCH_CHECK(coef.dim() == (tile_key ? 3 : 2) && coef.is_contiguous(),
                  "expected contiguous coef of shape ", tile_key ? "(N, B, K)" : "(N, B)");
  const int64_t num_vectors = coef.size(0), num_blocks = coef.size(1);
  const int64_t groups = tile_key ? coef.size(2) : 1;
  check_groups(groups);
  const Stored stored(deltas, scales, bits, num_vectors, base.numel());
  const Arena arena(base, tile_offset, num_vectors,
                    tile_key ? std::max(stored.unit(), kLanes) : stored.unit());
  const int32_t* block = blocks_of(tile_block, arena, num_blocks);
  const uint32_t* keys = tile_key ? keys_of(*tile_key, arena) : nullptr;
  const float* coefs = coef.const_data_ptr<float>();
  const DType dtype = arena.dtype();
  const int64_t output = base.numel() * size_of(dtype);
  expect_outputs(output);
  Tensor composed = empty_output(base);
  char* out = static_cast<char*>(composed.mutable_data_ptr());
  const bool stream = output >= kStream;
  const Kernels& kernel = kernels();
  const bool packed = stored.packed();
  arena.for_each_tile([=, rows = std::vector<Row>(),
                       column = std::vector<float>(num_vectors)](const Tile& tile) mutable {
    void* target = out + tile.start * size_of(dtype);
    if (keys) {
      const GroupedCoef its{coefs + block[tile.index] * groups, num_blocks * groups, groups};
      kernel.group_compose_tile(tile.wide, target, dtype, stored.rows(tile), its, keys[tile.index],
                                tile.length);
      return;
    }
    for (int64_t i = 0; i < num_vectors; ++i) column[i] = coefs[i * num_blocks + block[tile.index]];
    if (packed) {
      kernel.packed_compose_tile(tile.wide, target, dtype, stored.packed_rows(tile), column.data(),
                                 tile.length, stream);
      return;
    }
    stored.rows(tile, rows);
    for (Row& row : rows) row.coef = column[row.vector];
    kernel.compose_tile(tile.wide, target, dtype, rows.data(), num_vectors, tile.length, stream);
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

// (N, B, K): slot by slot over the tiles of a chunk, then over groups, then over chunks.
Tensor group_coef_grad(const Tensor& grad, const Stored& stored, const Arena& arena,
                       const Tensor& tile_key, const Tensor& chunk_tile, const Tensor& block_chunk,
                       int64_t num_vectors, int64_t groups) {
  check_groups(groups);
  const uint32_t* keys = keys_of(tile_key, arena);
  const auto tiles = bounds_of(chunk_tile, arena.tiles(), "chunk_tile does not fit tile_offset");
  const int64_t num_chunks = tiles.size() - 1;
  const auto chunks = bounds_of(block_chunk, num_chunks, "block_chunk does not fit chunk_tile");
  const int64_t num_blocks = chunks.size() - 1;
  const auto dot = kernels().group_dot_tile;

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

Tensor arena_coef_grad(const Tensor& grad, const Tensor& deltas,
                       const std::optional<Tensor>& scales, int64_t bits,
                       const Tensor& /*tile_block*/, const Tensor& tile_offset,
                       const Tensor& block_tile, const Tensor& chunk_tile,
                       const Tensor& block_chunk, const std::optional<Tensor>& tile_key,
                       int64_t num_vectors, int64_t groups, ScalarType dtype) {
  check_float32(dtype);
  const Stored stored(deltas, scales, bits, num_vectors, grad.numel());
  const Arena arena(grad, tile_offset, num_vectors,
                    tile_key ? std::max(stored.unit(), kLanes) : stored.unit());
  if (tile_key) {
    return group_coef_grad(grad, stored, arena, *tile_key, chunk_tile, block_chunk, num_vectors,
                           groups);
  }
  const auto tiles = bounds_of(block_tile, arena.tiles(), "block_tile does not fit tile_offset");
  std::vector<float> partials(arena.tiles() * num_vectors);
  float* results = partials.data();
  const DType wide = arena.dtype();
  const Kernels& kernel = kernels();
  const bool packed = stored.packed();
  arena.for_each_tile([=, rows = std::vector<Row>()](const Tile& tile) mutable {
    float* result = results + tile.index * num_vectors;
    if (packed) {
      kernel.packed_dot_tile(tile.wide, wide, stored.packed_rows(tile), tile.length, result);
      return;
    }
    stored.rows(tile, rows);
    kernel.dot_tile(tile.wide, wide, rows.data(), num_vectors, tile.length, result);
  });
  return sum_tiles(grad, partials, tiles, num_vectors);
}

}  // namespace
}  // namespace atlas

STABLE_TORCH_LIBRARY_IMPL(atlas_kernels_cpp, CPU, m) {
  m.impl("arena_compose", TORCH_BOX(&atlas::arena_compose));
  m.impl("arena_coef_grad", TORCH_BOX(&atlas::arena_coef_grad));
}
