// The kernels of the `cuda` backend and their launches.
//
// One block of threads serves one tile. Composition is bound by memory: what matters is that every
// stream moves 16 bytes per instruction and thread, and that enough of them are in flight. Sums
// follow an order that depends on shapes alone, so the same inputs give the same bits.

#include <algorithm>

#include "dense.cuh"

namespace atlas_kernels {
namespace {

// The deltas of one tile of a list: wherever the table says.
struct Listed {
  static constexpr int kUnroll = 1;
  const void* const* data;
  const Dtype* dtype;
  int64_t offset;
  __device__ __forceinline__ Operand operator()(int i) const {
    const void* p = data[i];
    return {p == nullptr ? nullptr : advance(p, offset, dtype[i]), dtype[i]};
  }
};

// The same where all deltas of a launch exist, are aligned, and have one dtype.
template <Dtype kDelta>
struct ListedAlike {
  static constexpr int kUnroll = unroll_of(kDelta);
  const void* const* data;
  int64_t offset;
  __device__ __forceinline__ Operand operator()(int i) const {
    return {advance(data[i], offset, kDelta), kDelta};
  }
};

// The block of the table that a tile belongs to: the last that starts at or before it.
__device__ __forceinline__ int find_block(const Table& table, int tile) {
  int low = 0;
  int high = table.num_blocks;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_tile[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// partials[i * stride] = <source, tau_i> over the tile.
template <bool kFull, typename Deltas>
__device__ __forceinline__ void dot_tile(const Tile<Deltas>& tile, WarpSums<kWarps>& warp_sums,
                                         float* partials, int64_t stride) {
  float grad[kPasses][kVector];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    load<kFull>(tile.source, pass, tile.length, grad[pass]);
  }
  const auto dot = [&](int i) {
    const Operand delta = tile.deltas(i);
    float sum = 0.0f;
    if (kFull || delta.data != nullptr) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        float values[kVector];
        load<kFull>(delta, pass, tile.length, values);
#pragma unroll
        for (int k = 0; k < kVector; ++k) sum = fmaf(grad[pass][k], values[k], sum);
      }
    }
    return sum;
  };
  sum_over_block<kFull ? Deltas::kUnroll : 1>(tile.num_vectors, dot, warp_sums, partials, stride);
}

// The sum of `count` partials, by one warp, the same on every lane.
__device__ __forceinline__ float sum_partials(const float* partials, int count) {
  double sum = 0.0;
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) sum += partials[i];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, distance);
  }
  return static_cast<float>(sum);
}

template <Dtype kDelta>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    arena_compose_kernel(const Bank bank, const float* coef, void* composed) {
  const Tile<Interleaved<kDelta>> tile = tile_of<kDelta>(bank, blockIdx.x);
  const OfBlock coefs = {coef + bank.tile_block[blockIdx.x], bank.num_blocks};
  const Dtype dtype = bank.source.dtype;
  void* target = const_cast<void*>(advance(composed, bank.tile_offset[blockIdx.x], dtype));
  if (is_full(tile) && is_aligned(target)) {
    compose_tile<true>(tile, coefs, target, dtype);
  } else {
    compose_tile<false>(tile, coefs, target, dtype);
  }
}

template <Dtype kDelta>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    arena_partials_kernel(const Bank bank, float* partials) {
  __shared__ WarpSums<kWarps> warp_sums;
  const Tile<Interleaved<kDelta>> tile = tile_of<kDelta>(bank, blockIdx.x);
  if (is_full(tile)) {
    dot_tile<true>(tile, warp_sums, partials + blockIdx.x, bank.num_tiles);
  } else {
    dot_tile<false>(tile, warp_sums, partials + blockIdx.x, bank.num_tiles);
  }
}

// One warp per vector and block.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    arena_total_kernel(const float* partials, const int32_t* block_tile, int64_t num_tiles,
                       int64_t num_blocks, int64_t count, float* coef_grad) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (index >= count) return;
  const int64_t i = index / num_blocks;
  const int64_t b = index % num_blocks;
  const int first = block_tile[b];
  const float sum = sum_partials(partials + i * num_tiles + first, block_tile[b + 1] - first);
  if (threadIdx.x % kWarp == 0) coef_grad[index] = sum;
}

// A list's tile, found from the table.
struct Place {
  int block;
  int64_t offset;
  int length;
  Operand source;
  const void* const* data;
  const Dtype* dtype;
};

__device__ __forceinline__ Place place_of(const Table& table) {
  const int tile = blockIdx.x;
  const int b = find_block(table, tile);
  const int64_t offset = static_cast<int64_t>(tile - table.first_tile[b]) * kTile;
  const int64_t rest = table.numel[b] - offset;
  const Dtype dtype = table.source_dtype[b];
  const int slot = b * table.num_vectors;
  return {b,
          offset,
          rest < kTile ? static_cast<int>(rest) : kTile,
          {advance(table.source[b], offset, dtype), dtype},
          table.delta + slot,
          table.delta_dtype + slot};
}

// `kAlike`: every operand of the launch is aligned and every delta has the dtype `kDelta`.
template <bool kAlike, Dtype kDelta>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    compose_kernel(const __grid_constant__ Table table) {
  const Place at = place_of(table);
  const int64_t first = table.first_vector * table.all_blocks + table.first_block + at.block;
  const OfBlock coefs = {table.coef + first, table.all_blocks};
  const Dtype dtype = table.target_dtype[at.block];
  void* target = const_cast<void*>(advance(table.target[at.block], at.offset, dtype));
  if (kAlike && at.length == kTile) {
    const Tile<ListedAlike<kDelta>> tile = {
        at.source, {at.data, at.offset}, table.num_vectors, at.length};
    compose_tile<true>(tile, coefs, target, dtype);
  } else {
    const Tile<Listed> tile = {
        at.source, {at.data, at.dtype, at.offset}, table.num_vectors, at.length};
    compose_tile<false>(tile, coefs, target, dtype);
  }
}

template <bool kAlike, Dtype kDelta>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    partials_kernel(const __grid_constant__ Table table) {
  const Place at = place_of(table);
  __shared__ WarpSums<kWarps> warp_sums;
  float* partials = table.partials + blockIdx.x;
  if (kAlike && at.length == kTile) {
    const Tile<ListedAlike<kDelta>> tile = {
        at.source, {at.data, at.offset}, table.num_vectors, at.length};
    dot_tile<true>(tile, warp_sums, partials, gridDim.x);
  } else {
    const Tile<Listed> tile = {
        at.source, {at.data, at.dtype, at.offset}, table.num_vectors, at.length};
    dot_tile<false>(tile, warp_sums, partials, gridDim.x);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    total_kernel(const __grid_constant__ Table table) {
  const int index = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (index >= table.num_vectors * table.num_blocks) return;
  const int i = index / table.num_blocks;
  const int b = index % table.num_blocks;
  const int first = table.first_tile[b];
  const int64_t num_tiles = table.first_tile[table.num_blocks];
  const float sum =
      sum_partials(table.partials + i * num_tiles + first, table.first_tile[b + 1] - first);
  if (threadIdx.x % kWarp == 0) {
    table.coef_grad[(table.first_vector + i) * table.all_blocks + table.first_block + b] = sum;
  }
}

using TableKernel = void (*)(Table);

TableKernel compose_of(bool alike, Dtype delta) {
  if (!alike) return compose_kernel<false, Dtype::kFloat32>;
  return for_dtype(delta, [](auto dtype) { return compose_kernel<true, decltype(dtype)::value>; });
}

TableKernel partials_of(bool alike, Dtype delta) {
  if (!alike) return partials_kernel<false, Dtype::kFloat32>;
  return for_dtype(delta, [](auto dtype) { return partials_kernel<true, decltype(dtype)::value>; });
}

// How many blocks and vectors one launch takes: whole blocks, unless one alone is too many vectors.
int64_t vectors_per_launch(const List& list) {
  return std::min<int64_t>(list.num_vectors, kTableDeltas);
}

int64_t blocks_per_launch(const List& list) {
  const int64_t vectors = std::max<int64_t>(1, vectors_per_launch(list));
  return std::min<int64_t>(kTableBlocks, kTableDeltas / vectors);
}

// Fills in everything but targets and results. Returns whether the launch's operands are alike.
bool fill(const List& list, int64_t first_block, int64_t first_vector, Table& table) {
  table.all_blocks = list.num_blocks;
  table.first_block = first_block;
  table.first_vector = first_vector;
  table.num_blocks =
      static_cast<int32_t>(std::min(blocks_per_launch(list), list.num_blocks - first_block));
  table.num_vectors =
      static_cast<int32_t>(std::min(vectors_per_launch(list), list.num_vectors - first_vector));
  table.first_tile[0] = 0;
  bool alike = true;
  const Dtype dtype = list.num_vectors > 0 ? list.deltas[first_block].dtype : Dtype::kFloat32;
  for (int b = 0; b < table.num_blocks; ++b) {
    const int64_t block = first_block + b;
    table.source[b] = list.source[block].data;
    table.source_dtype[b] = list.source[block].dtype;
    table.numel[b] = list.numel[block];
    table.first_tile[b + 1] =
        table.first_tile[b] + static_cast<int32_t>(ceil_div(list.numel[block], kTile));
    alike = alike && is_aligned(table.source[b]);
    for (int i = 0; i < table.num_vectors; ++i) {
      const Operand& delta = list.deltas[(first_vector + i) * list.num_blocks + block];
      const int slot = b * table.num_vectors + i;
      table.delta[slot] = delta.data;
      table.delta_dtype[slot] = delta.dtype;
      alike = alike && delta.data != nullptr && is_aligned(delta.data) && delta.dtype == dtype;
    }
  }
  return alike;
}

}  // namespace

cudaError_t arena_compose(const Bank& bank, const float* coef, void* composed,
                          cudaStream_t stream) {
  if (bank.num_tiles == 0) return cudaSuccess;
  const auto kernel = for_dtype(
      bank.deltas.dtype, [](auto dtype) { return arena_compose_kernel<decltype(dtype)::value>; });
  return launch(kernel, bank.num_tiles, kThreads, stream, bank, coef, composed);
}

cudaError_t arena_coef_grad(const Bank& bank, const int32_t* block_tile, float* partials,
                            float* coef_grad, cudaStream_t stream) {
  const auto kernel = for_dtype(
      bank.deltas.dtype, [](auto dtype) { return arena_partials_kernel<decltype(dtype)::value>; });
  return arena_stages(kernel, kThreads, bank, block_tile, partials, coef_grad, stream);
}

cudaError_t arena_total(const Tiling& tiling, const int32_t* block_tile, const float* partials,
                        float* coef_grad, cudaStream_t stream) {
  const int64_t count = tiling.num_vectors * tiling.num_blocks;
  if (count == 0) return cudaSuccess;
  return launch(arena_total_kernel, ceil_div(count, kWarps), kThreads, stream, partials, block_tile,
                tiling.num_tiles, tiling.num_blocks, count, coef_grad);
}

int64_t compose_scratch(const List& list) {
  if (list.num_vectors <= kTableDeltas || list.num_blocks == 0) return 0;
  return *std::max_element(list.numel, list.numel + list.num_blocks);
}

cudaError_t compose(const List& list, const float* coef, void* const* composed, float* scratch,
                    cudaStream_t stream) {
  Table table;
  table.coef = coef;
  for (int64_t block = 0; block < list.num_blocks; block += blocks_per_launch(list)) {
    int64_t vector = 0;
    do {
      bool alike = fill(list, block, vector, table);
      const bool last = vector + table.num_vectors == list.num_vectors;
      for (int b = 0; b < table.num_blocks; ++b) {
        // More vectors than a launch takes: the sum waits in float32, so that it rounds once.
        if (vector > 0) {
          table.source[b] = scratch;
          table.source_dtype[b] = Dtype::kFloat32;
        }
        table.target[b] = last ? composed[block + b] : scratch;
        table.target_dtype[b] = last ? list.source[block + b].dtype : Dtype::kFloat32;
        alike = alike && is_aligned(table.target[b]);
      }
      const int64_t num_tiles = table.first_tile[table.num_blocks];
      if (num_tiles > 0) {
        const cudaError_t error =
            launch(compose_of(alike, table.delta_dtype[0]), num_tiles, kThreads, stream, table);
        if (error != cudaSuccess) return error;
      }
      vector += table.num_vectors;
    } while (vector < list.num_vectors);
  }
  return cudaSuccess;
}

int64_t coef_grad_scratch(const List& list) {
  int64_t most = 0;
  int64_t tiles = 0;
  for (int64_t block = 0; block < list.num_blocks; ++block) {
    if (block % blocks_per_launch(list) == 0) tiles = 0;
    tiles += ceil_div(list.numel[block], kTile);
    most = std::max(most, tiles);
  }
  return most * vectors_per_launch(list);
}

cudaError_t coef_grad(const List& list, float* partials, float* coef_grad, cudaStream_t stream) {
  Table table;
  table.partials = partials;
  table.coef_grad = coef_grad;
  for (int64_t block = 0; block < list.num_blocks; block += blocks_per_launch(list)) {
    for (int64_t vector = 0; vector < list.num_vectors; vector += vectors_per_launch(list)) {
      const bool alike = fill(list, block, vector, table);
      const int64_t num_tiles = table.first_tile[table.num_blocks];
      if (num_tiles > 0) {
        const cudaError_t error =
            launch(partials_of(alike, table.delta_dtype[0]), num_tiles, kThreads, stream, table);
        if (error != cudaSuccess) return error;
      }
      const int64_t count = static_cast<int64_t>(table.num_vectors) * table.num_blocks;
      const cudaError_t error =
          launch(total_kernel, ceil_div(count, kWarps), kThreads, stream, table);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace atlas_kernels

// What keeps the current GPU from running this binary, in CUDA's words; null if nothing does. Its
// driver may be older than the toolkit that built it, or its architecture not among those it has.
extern "C" __attribute__((visibility("default"))) const char* atlas_kernels_cuda_error() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(
      &attributes, reinterpret_cast<const void*>(atlas_kernels::arena_total_kernel));
  if (error == cudaSuccess) return nullptr;
  static_cast<void>(cudaGetLastError());  // or the next caller finds it
  return cudaGetErrorString(error);
}
