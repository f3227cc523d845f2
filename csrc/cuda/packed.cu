// The kernels for packed deltas.

#include "packed.cuh"

namespace atlas_kernels {
namespace {

template <int kBits>
__global__ void __launch_bounds__(kPackedThreads, kPackedBlocksPerMultiprocessor)
    packed_compose_kernel(const PackedBank bank, const float* coef, void* composed) {
  const Spot at = spot_of(bank, blockIdx.x);
  if (!at.exists) return;
  const OfBlock coefs = {coef + bank.tile_block[blockIdx.x], bank.num_blocks};
  compose_tile<kBits>(bank, at, coefs, composed);
}

template <int kBits>
__global__ void __launch_bounds__(kPackedThreads, kPackedBlocksPerMultiprocessor)
    packed_partials_kernel(const PackedBank bank, float* partials) {
  __shared__ WarpSums<kPackedWarps> warp_sums;
  const Spot at = spot_of(bank, blockIdx.x);
  Rows<kBits> rows(bank, at);

  Planes grad;
  load(bank.source, at, grad);
  const auto dot = [&](int) {
    const Row<kBits> row = rows.next();
    float sum = 0.0f;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      float part = 0.0f;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        part = fmaf(grad[plane][lane], row.codes.level(plane, lane), part);
      }
      sum = fmaf(inverse_power(Codes<kBits>::shift(plane)), part, sum);
    }
    return at.exists ? sum * row.scale : 0.0f;
  };
  sum_over_block<Rows<kBits>::kUnroll>(static_cast<int>(bank.num_vectors), dot, warp_sums,
                                       partials + blockIdx.x, bank.num_tiles);
}

}  // namespace

cudaError_t arena_compose(const PackedBank& bank, const float* coef, void* composed,
                          cudaStream_t stream) {
  if (bank.num_tiles == 0) return cudaSuccess;
  const auto kernel =
      for_bits(bank.bits, [](auto bits) { return packed_compose_kernel<decltype(bits)::value>; });
  return launch(kernel, bank.num_tiles, kPackedThreads, stream, bank, coef, composed);
}

cudaError_t arena_coef_grad(const PackedBank& bank, const int32_t* block_tile, float* partials,
                            float* coef_grad, cudaStream_t stream) {
  const auto kernel =
      for_bits(bank.bits, [](auto bits) { return packed_partials_kernel<decltype(bits)::value>; });
  return arena_stages(kernel, kPackedThreads, bank, block_tile, partials, coef_grad, stream);
}

}  // namespace atlas_kernels
