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

using ComposeKernel = void (*)(PackedBank, const float*, void*);
using PartialsKernel = void (*)(PackedBank, float*);

ComposeKernel compose_of(int bits) {
  switch (bits) {
    case 1:
      return packed_compose_kernel<1>;
    case 2:
      return packed_compose_kernel<2>;
    case 3:
      return packed_compose_kernel<3>;
    case 4:
      return packed_compose_kernel<4>;
    default:
      return packed_compose_kernel<8>;
  }
}

PartialsKernel partials_of(int bits) {
  switch (bits) {
    case 1:
      return packed_partials_kernel<1>;
    case 2:
      return packed_partials_kernel<2>;
    case 3:
      return packed_partials_kernel<3>;
    case 4:
      return packed_partials_kernel<4>;
    default:
      return packed_partials_kernel<8>;
  }
}

}  // namespace

cudaError_t packed_compose(const PackedBank& bank, const float* coef, void* composed,
                           cudaStream_t stream) {
  if (bank.num_tiles == 0) return cudaSuccess;
  return launch(compose_of(bank.bits), bank.num_tiles, kPackedThreads, stream, bank, coef,
                composed);
}

cudaError_t packed_coef_grad(const PackedBank& bank, const int32_t* block_tile, float* partials,
                             float* coef_grad, cudaStream_t stream) {
  if (bank.num_vectors * bank.num_tiles > 0) {
    const cudaError_t error =
        launch(partials_of(bank.bits), bank.num_tiles, kPackedThreads, stream, bank, partials);
    if (error != cudaSuccess) return error;
  }
  return bank_total(bank, block_tile, partials, coef_grad, stream);
}

}  // namespace atlas_kernels
