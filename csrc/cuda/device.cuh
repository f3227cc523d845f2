// What all kernels share.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels.h"

namespace atlas_kernels {

constexpr int kWarp = 32;

// Two neighbouring elements in one word, the first in its low half.
template <typename T>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ float2 widen(uint32_t word) {
    // A bfloat16 is the upper half of a float: one instruction each, where the intrinsic takes two.
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  static __device__ __forceinline__ uint32_t narrow(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

template <>
struct Pair<__half> {
  static __device__ __forceinline__ float2 widen(uint32_t word) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
  static __device__ __forceinline__ uint32_t narrow(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

__host__ __device__ __forceinline__ int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

__host__ __device__ __forceinline__ const void* advance(const void* p, int64_t count, Dtype dtype) {
  return static_cast<const char*>(p) + count * size_of(dtype);
}

// The coefficients of a block, which all its elements share: as `compose_tile` asks for them where
// deltas are floating-point, and where they are packed.
struct OfBlock {
  static constexpr bool kGathers = false;
  const float* first;
  int64_t stride;
  __device__ __forceinline__ auto operator()(int i) const {
    return [value = first[i * stride]](int, int) { return value; };
  }
  __device__ __forceinline__ auto next(float scale) {
    const float factor = *first * scale;
    first += stride;
    return [factor](int, int, float unit) { return factor * unit; };
  }
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, distance);
  }
  return value;
}

// Vectors that share one barrier in the backward.
constexpr int kGroup = 32;

// Two of them, so that one barrier per group is enough: a warp overwrites a group's sums only after
// the next group's barrier, which every reader reaches after reading.
template <int kWarps>
using WarpSums = float[2][kWarps][kGroup];

// partials[i * stride] = the sum of `dot(i)` over a block of kWarps warps, for every vector i.
template <int kUnroll, int kWarps, typename Dot>
__device__ __forceinline__ void sum_over_block(int num_vectors, const Dot& dot,
                                               WarpSums<kWarps>& warp_sums, float* partials,
                                               int64_t stride) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int turn = 0;
  for (int first = 0; first < num_vectors; first += kGroup) {
    const int group = min(kGroup, num_vectors - first);
#pragma unroll(kUnroll)
    for (int i = 0; i < group; ++i) {
      const float sum = warp_sum(dot(first + i));
      if (lane == 0) warp_sums[turn][warp][i] = sum;
    }
    __syncthreads();
    const int i = threadIdx.x;
    if (i < group) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += warp_sums[turn][w][i];
      partials[(first + i) * stride] = sum;
    }
    turn ^= 1;
  }
}

// The kernel that `pick` instantiates for a run-time dtype, or number of bits.
template <typename Pick>
auto for_dtype(Dtype dtype, const Pick& pick) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return pick(std::integral_constant<Dtype, Dtype::kBFloat16>{});
    case Dtype::kFloat16:
      return pick(std::integral_constant<Dtype, Dtype::kFloat16>{});
    default:
      return pick(std::integral_constant<Dtype, Dtype::kFloat32>{});
  }
}

template <typename Pick>
auto for_bits(int bits, const Pick& pick) {
  switch (bits) {
    case 1:
      return pick(std::integral_constant<int, 1>{});
    case 2:
      return pick(std::integral_constant<int, 2>{});
    case 3:
      return pick(std::integral_constant<int, 3>{});
    case 4:
      return pick(std::integral_constant<int, 4>{});
    default:
      return pick(std::integral_constant<int, 8>{});
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t num_blocks, int num_threads,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Both stages of an arena's gradient: partial sums of every tile, then their sums over blocks.
template <typename AnyBank>
cudaError_t arena_stages(void (*kernel)(AnyBank, float*), int num_threads, const AnyBank& bank,
                         const int32_t* block_tile, float* partials, float* coef_grad,
                         cudaStream_t stream) {
  if (bank.num_vectors * bank.num_tiles > 0) {
    const cudaError_t error = launch(kernel, bank.num_tiles, num_threads, stream, bank, partials);
    if (error != cudaSuccess) return error;
  }
  return arena_total(bank, block_tile, partials, coef_grad, stream);
}

}  // namespace atlas_kernels
