// The kernels for coefficients of groups, which `ops/groups.py` defines.
//
// Composition is that of the other kernels, but for coefficients that are gathered: a thread
// computes the groups of its elements once and looks them up for every vector. For the gradient a
// block of threads walks through the tiles of a chunk and adds products up by slot, in shared
// memory: within a tile no two elements have the same slot, so no two threads meet, and the order
// is fixed.

#include "dense.cuh"
#include "packed.cuh"

namespace atlas_kernels {
namespace {

constexpr int kSlotBits = 12;
static_assert(1 << kSlotBits == kTile, "a tile has as many slots as elements");
constexpr int kRounds = 4;

// The slots of a tile's elements.
class Slots {
 public:
  explicit __device__ __forceinline__ Slots(uint32_t key) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      factor_[round] = key | 1;
      addend_[round] = key >> kSlotBits;
      key = key * 0x2c1b3c6d + 0x297a2d39;
      key ^= key >> 15;
    }
  }

  // What lies above a slot's bits never reaches them: it is dropped once, at the end.
  __device__ __forceinline__ int operator()(uint32_t element) const {
    uint32_t slot = element;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      slot = slot * factor_[round] + addend_[round];
      slot ^= slot >> kSlotBits / 2 & ((1 << kSlotBits / 2) - 1);
    }
    return static_cast<int>(slot & (kTile - 1));
  }

 private:
  uint32_t factor_[kRounds];
  uint32_t addend_[kRounds];
};

// Per multiprocessor: at most 128 registers, for a thread of packed deltas remembers where each of
// its 32 elements belongs.
constexpr int kPackedGroupBlocks = 4;

// A number of each of a thread's elements.
using DenseNumbers = int[kPasses][kVector];
using PackedNumbers = int[kPlanes][kLanes];

__device__ __forceinline__ void find_slots(const Slots& slots, DenseNumbers& found) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const uint32_t first = (pass * kThreads + threadIdx.x) * kVector;
#pragma unroll
    for (int k = 0; k < kVector; ++k) found[pass][k] = slots(first + k);
  }
}

__device__ __forceinline__ void find_slots(const Slots& slots, const Spot& at,
                                           PackedNumbers& found) {
  const uint32_t first = at.group * kScaleGroup + at.column;
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      found[plane][lane] = slots(first + plane * kColumns + lane);
    }
  }
}

// The coefficients of a thread's elements, each that of its group.
template <int kRows, int kPerRow>
class OfGroups {
 public:
  static constexpr bool kGathers = true;

  __device__ __forceinline__ OfGroups(const int (&slots)[kRows][kPerRow], const Tiling& tiling,
                                      const Groups& groups, const float* coef)
      : first_(coef + static_cast<int64_t>(tiling.tile_block[blockIdx.x]) * groups.num_groups),
        stride_(tiling.num_blocks * groups.num_groups) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int k = 0; k < kPerRow; ++k) {
        const uint32_t group = slots[row][k] * groups.num_groups >> kSlotBits;
        offsets_[row][k] = group * sizeof(float);
      }
    }
  }

  __device__ __forceinline__ auto operator()(int i) const {
    return [this, coef = first_ + i * stride_](int row, int k) { return gather(coef, row, k); };
  }

  __device__ __forceinline__ auto next(float scale) {
    const float* coef = first_;
    first_ += stride_;
    return [this, coef, scale](int row, int k, float unit) {
      return gather(coef, row, k) * (scale * unit);
    };
  }

 private:
  __device__ __forceinline__ float gather(const float* coef, int row, int k) const {
    const char* bytes = reinterpret_cast<const char*>(coef) + offsets_[row][k];
    return __ldg(reinterpret_cast<const float*>(bytes));
  }

  const float* first_;
  int64_t stride_;
  // In bytes and unsigned: the compiler would keep any other index as an offset of 64 bits.
  uint32_t offsets_[kRows][kPerRow];
};

template <Dtype kDelta>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    group_compose_kernel(const Bank bank, const Groups groups, const float* coef, void* composed) {
  const Tile<Interleaved<kDelta>> tile = tile_of<kDelta>(bank, blockIdx.x);
  DenseNumbers slots;
  find_slots(Slots(groups.tile_key[blockIdx.x]), slots);
  const OfGroups coefs(slots, bank, groups, coef);
  const Dtype dtype = bank.source.dtype;
  void* target = const_cast<void*>(advance(composed, bank.tile_offset[blockIdx.x], dtype));
  if (is_full(tile) && is_aligned(target)) {
    compose_tile<true>(tile, coefs, target, dtype);
  } else {
    compose_tile<false>(tile, coefs, target, dtype);
  }
}

template <int kBits>
__global__ void __launch_bounds__(kPackedThreads, kPackedGroupBlocks)
    packed_group_compose_kernel(const PackedBank bank, const Groups groups, const float* coef,
                                void* composed) {
  const Spot at = spot_of(bank, blockIdx.x);
  if (!at.exists) return;
  PackedNumbers slots;
  find_slots(Slots(groups.tile_key[blockIdx.x]), at, slots);
  const OfGroups coefs(slots, bank, groups, coef);
  compose_tile<kBits>(bank, at, coefs, composed);
}

// Vectors that a block of threads serves: for each a tile's slots in 16 KB of shared memory.
constexpr int kVectorsAtOnce = 2;

using SlotSums = float[kVectorsAtOnce][kTile];

// What a block of threads serves: vectors [first, first + count) of one chunk.
struct Share {
  int64_t chunk;
  int first;
  int count;
};

// Neighbours have the same chunk, whose gradient then comes from memory once.
__device__ __forceinline__ Share share_of(const Tiling& tiling) {
  const int64_t shares = ceil_div(tiling.num_vectors, kVectorsAtOnce);
  const int first = static_cast<int>(blockIdx.x % shares) * kVectorsAtOnce;
  const int rest = static_cast<int>(tiling.num_vectors) - first;
  return {blockIdx.x / shares, first, min(kVectorsAtOnce, rest)};
}

// sums[slots[row][k]] += factors[row][k] * values(row, k), whose slots are distinct.
template <int kRows, int kPerRow, typename Values>
__device__ __forceinline__ void add_products(const int (&slots)[kRows][kPerRow],
                                             const float (&factors)[kRows][kPerRow],
                                             const Values& values, float (&sums)[kTile]) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float added[kPerRow];
#pragma unroll
    for (int k = 0; k < kPerRow; ++k) {
      added[k] = fmaf(factors[row][k], values(row, k), sums[slots[row][k]]);
    }
#pragma unroll
    for (int k = 0; k < kPerRow; ++k) sums[slots[row][k]] = added[k];
  }
}

// Elements beyond a short tile add zeros.
template <bool kFull, typename Deltas>
__device__ __forceinline__ void add_tile(const Tile<Deltas>& tile, const Slots& map,
                                         const Share& share, SlotSums& sums) {
  float grad[kPasses][kVector];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    load<kFull>(tile.source, pass, tile.length, grad[pass]);
  }
  DenseNumbers slots;
  find_slots(map, slots);
#pragma unroll
  for (int v = 0; v < kVectorsAtOnce; ++v) {
    if (v >= share.count) break;
    const Operand delta = tile.deltas(share.first + v);
    float values[kPasses][kVector];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      load<kFull>(delta, pass, tile.length, values[pass]);
    }
    add_products(slots, grad, [&](int pass, int k) { return values[pass][k]; }, sums[v]);
  }
}

template <int kBits>
__device__ __forceinline__ void add_tile(const PackedBank& bank, const Spot& at, const Slots& map,
                                         const Share& share, SlotSums& sums) {
  if (!at.exists) return;
  Rows<kBits> rows(bank, at);
  rows.skip(share.first);
  Planes grad;
  load(bank.source, at, grad);
  PackedNumbers slots;
  find_slots(map, at, slots);
#pragma unroll
  for (int v = 0; v < kVectorsAtOnce; ++v) {
    if (v >= share.count) break;
    const Row<kBits> row = rows.next();
    const auto value = [&](int plane, int lane) {
      const float unit = inverse_power(Codes<kBits>::shift(plane));
      return row.scale * unit * row.codes.level(plane, lane);
    };
    add_products(slots, grad, value, sums[v]);
  }
}

// target[g] = the sum over the slots of group g. As many threads share a group as there are slots
// for all of them.
__device__ __forceinline__ void sum_groups(const float (&sums)[kTile], int num_groups,
                                           float* target) {
  int width = kWarp;
  while (width * num_groups > kTile) width /= 2;
  const int lane = static_cast<int>(threadIdx.x) % width;
  const int at_once = static_cast<int>(blockDim.x) / width;
  // All threads take the same number of turns, as shuffles ask for.
  for (int turn = 0; turn < num_groups; turn += at_once) {
    const int group = turn + static_cast<int>(threadIdx.x) / width;
    float sum = 0.0f;
    if (group < num_groups) {
      const int end = ((group + 1) * kTile + num_groups - 1) / num_groups;
      for (int slot = (group * kTile + num_groups - 1) / num_groups + lane; slot < end;
           slot += width) {
        sum += sums[slot];
      }
    }
    for (int distance = width / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, distance);
    }
    if (lane == 0 && group < num_groups) target[group] = sum;
  }
}

// partials[chunk, i, g], of this block's share. `add(tile, share)` adds a tile's products up.
template <typename Add>
__device__ __forceinline__ void sum_chunk(const Tiling& tiling, const Groups& groups,
                                          const Chunks& chunks, const Add& add, SlotSums& sums,
                                          float* partials) {
  const Share share = share_of(tiling);
  for (int slot = threadIdx.x; slot < kTile; slot += blockDim.x) {
#pragma unroll
    for (int v = 0; v < kVectorsAtOnce; ++v) sums[v][slot] = 0.0f;
  }
  const int end = chunks.chunk_tile[share.chunk + 1];
  for (int tile = chunks.chunk_tile[share.chunk]; tile < end; ++tile) {
    // Another thread may have had this one's slots.
    __syncthreads();
    add(tile, share);
  }
  __syncthreads();
  for (int v = 0; v < share.count; ++v) {
    const int64_t row = share.chunk * tiling.num_vectors + share.first + v;
    sum_groups(sums[v], groups.num_groups, partials + row * groups.num_groups);
  }
}

template <Dtype kDelta>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    group_partials_kernel(const Bank bank, const Groups groups, const Chunks chunks,
                          float* partials) {
  __shared__ SlotSums sums;
  const auto add = [&](int64_t number, const Share& share) {
    const Tile<Interleaved<kDelta>> tile = tile_of<kDelta>(bank, number);
    const Slots slots(groups.tile_key[number]);
    if (is_full(tile)) {
      add_tile<true>(tile, slots, share, sums);
    } else {
      add_tile<false>(tile, slots, share, sums);
    }
  };
  sum_chunk(bank, groups, chunks, add, sums, partials);
}

template <int kBits>
__global__ void __launch_bounds__(kPackedThreads, kPackedGroupBlocks)
    packed_group_partials_kernel(const PackedBank bank, const Groups groups, const Chunks chunks,
                                 float* partials) {
  __shared__ SlotSums sums;
  const auto add = [&](int64_t tile, const Share& share) {
    const Slots slots(groups.tile_key[tile]);
    add_tile<kBits>(bank, spot_of(bank, tile), slots, share, sums);
  };
  sum_chunk(bank, groups, chunks, add, sums, partials);
}

// One thread per vector, block and group. `row`: partial sums of one chunk.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    group_total_kernel(const float* partials, const int32_t* block_chunk, int64_t num_blocks,
                       int64_t num_groups, int64_t row, int64_t count, float* coef_grad) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t block = index / num_groups % num_blocks;
  const int64_t vector = index / num_groups / num_blocks;
  const float* column = partials + vector * num_groups + index % num_groups;
  const int end = block_chunk[block + 1];
  double sum = 0.0;
#pragma unroll(8)
  for (int64_t chunk = block_chunk[block]; chunk < end; ++chunk) sum += column[chunk * row];
  coef_grad[index] = static_cast<float>(sum);
}

// Both stages of the gradient.
template <typename AnyBank>
cudaError_t group_stages(void (*kernel)(AnyBank, Groups, Chunks, float*), int num_threads,
                         const AnyBank& bank, const Groups& groups, const Chunks& chunks,
                         float* partials, float* coef_grad, cudaStream_t stream) {
  const int64_t row = bank.num_vectors * groups.num_groups;
  const int64_t count = row * bank.num_blocks;
  if (count == 0) return cudaSuccess;
  if (chunks.num_chunks > 0) {
    const int64_t shares = chunks.num_chunks * ceil_div(bank.num_vectors, kVectorsAtOnce);
    const cudaError_t error =
        launch(kernel, shares, num_threads, stream, bank, groups, chunks, partials);
    if (error != cudaSuccess) return error;
  }
  return launch(group_total_kernel, ceil_div(count, kThreads), kThreads, stream, partials,
                chunks.block_chunk, bank.num_blocks, static_cast<int64_t>(groups.num_groups), row,
                count, coef_grad);
}

}  // namespace

cudaError_t arena_compose(const Bank& bank, const Groups& groups, const float* coef, void* composed,
                          cudaStream_t stream) {
  if (bank.num_tiles == 0) return cudaSuccess;
  const auto kernel = for_dtype(
      bank.deltas.dtype, [](auto dtype) { return group_compose_kernel<decltype(dtype)::value>; });
  return launch(kernel, bank.num_tiles, kThreads, stream, bank, groups, coef, composed);
}

cudaError_t arena_compose(const PackedBank& bank, const Groups& groups, const float* coef,
                          void* composed, cudaStream_t stream) {
  if (bank.num_tiles == 0) return cudaSuccess;
  const auto kernel = for_bits(
      bank.bits, [](auto bits) { return packed_group_compose_kernel<decltype(bits)::value>; });
  return launch(kernel, bank.num_tiles, kPackedThreads, stream, bank, groups, coef, composed);
}

cudaError_t arena_coef_grad(const Bank& bank, const Groups& groups, const Chunks& chunks,
                            float* partials, float* coef_grad, cudaStream_t stream) {
  const auto kernel = for_dtype(
      bank.deltas.dtype, [](auto dtype) { return group_partials_kernel<decltype(dtype)::value>; });
  return group_stages(kernel, kThreads, bank, groups, chunks, partials, coef_grad, stream);
}

cudaError_t arena_coef_grad(const PackedBank& bank, const Groups& groups, const Chunks& chunks,
                            float* partials, float* coef_grad, cudaStream_t stream) {
  const auto kernel = for_bits(
      bank.bits, [](auto bits) { return packed_group_partials_kernel<decltype(bits)::value>; });
  return group_stages(kernel, kPackedThreads, bank, groups, chunks, partials, coef_grad, stream);
}

}  // namespace atlas_kernels
