// Tiles of floating-point elements: how threads share them, load, compose and store them.

#pragma once

#include "device.cuh"

namespace atlas_kernels {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
// Consecutive elements of a thread: 16 bytes of a 16-bit dtype.
constexpr int kVector = 8;
constexpr int kPasses = kTile / (kThreads * kVector);
// At most 80 registers per thread, which lets the compiler ask for 96 to 128 bytes before it uses
// any. Room for a fourth block would halve that and more (32 to 96; sm_100, from the machine code).
constexpr int kBlocksPerMultiprocessor = 3;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

__device__ __forceinline__ void narrow(float value, float* target) { *target = value; }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* target) {
  *target = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void narrow(float value, __half* target) {
  *target = __float2half_rn(value);
}

// Read once, so first to leave the caches (evict-first).
__device__ __forceinline__ void load_wide(const float* p, float (&values)[kVector]) {
  const float4* wide = reinterpret_cast<const float4*>(p);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float4 four = __ldcs(wide + k);
    values[4 * k] = four.x;
    values[4 * k + 1] = four.y;
    values[4 * k + 2] = four.z;
    values[4 * k + 3] = four.w;
  }
}

template <typename T>
__device__ __forceinline__ void load_wide(const T* p, float (&values)[kVector]) {
  const uint4 four = __ldcs(reinterpret_cast<const uint4*>(p));
  const uint32_t words[] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int k = 0; k < kVector / 2; ++k) {
    const float2 pair = Pair<T>::widen(words[k]);
    values[2 * k] = pair.x;
    values[2 * k + 1] = pair.y;
  }
}

// No hint: whatever comes next reads the composed weights.
__device__ __forceinline__ void store_wide(float* p, const float (&values)[kVector]) {
  float4* wide = reinterpret_cast<float4*>(p);
  wide[0] = make_float4(values[0], values[1], values[2], values[3]);
  wide[1] = make_float4(values[4], values[5], values[6], values[7]);
}

template <typename T>
__device__ __forceinline__ void store_wide(T* p, const float (&values)[kVector]) {
  *reinterpret_cast<uint4*>(p) =
      make_uint4(Pair<T>::narrow(values[0], values[1]), Pair<T>::narrow(values[2], values[3]),
                 Pair<T>::narrow(values[4], values[5]), Pair<T>::narrow(values[6], values[7]));
}

__host__ __device__ __forceinline__ bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
}

// `kFull`: the tile is full and aligned. Otherwise each vector finds out whether it is.
template <bool kFull, typename T>
__device__ __forceinline__ void load_as(const T* p, int count, float (&values)[kVector]) {
  if constexpr (kFull) {
    load_wide(p, values);
  } else if (count >= kVector && is_aligned(p)) {
    load_wide(p, values);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k) values[k] = k < count ? widen(p[k]) : 0.0f;
  }
}

template <bool kFull, typename T>
__device__ __forceinline__ void store_as(T* p, int count, const float (&values)[kVector]) {
  if constexpr (kFull) {
    store_wide(p, values);
  } else if (count >= kVector && is_aligned(p)) {
    store_wide(p, values);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (k < count) narrow(values[k], p + k);
    }
  }
}

// This thread's vector of the given pass over a tile of `length` elements at `tile`; zero beyond.
template <bool kFull>
__device__ __forceinline__ void load(Operand tile, int pass, int length, float (&values)[kVector]) {
  const int offset = (pass * kThreads + static_cast<int>(threadIdx.x)) * kVector;
  const int count = length - offset;
  switch (tile.dtype) {
    case Dtype::kFloat32:
      load_as<kFull>(static_cast<const float*>(tile.data) + offset, count, values);
      break;
    case Dtype::kBFloat16:
      load_as<kFull>(static_cast<const __nv_bfloat16*>(tile.data) + offset, count, values);
      break;
    case Dtype::kFloat16:
      load_as<kFull>(static_cast<const __half*>(tile.data) + offset, count, values);
      break;
  }
}

template <bool kFull>
__device__ __forceinline__ void store(void* tile, Dtype dtype, int pass, int length,
                                      const float (&values)[kVector]) {
  const int offset = (pass * kThreads + static_cast<int>(threadIdx.x)) * kVector;
  const int count = length - offset;
  switch (dtype) {
    case Dtype::kFloat32:
      store_as<kFull>(static_cast<float*>(tile) + offset, count, values);
      break;
    case Dtype::kBFloat16:
      store_as<kFull>(static_cast<__nv_bfloat16*>(tile) + offset, count, values);
      break;
    case Dtype::kFloat16:
      store_as<kFull>(static_cast<__half*>(tile) + offset, count, values);
      break;
  }
}

// One tile of a call, whichever form the call has. `Deltas` maps i to the tile's elements of tau_i.
template <typename Deltas>
struct Tile {
  Operand source;
  Deltas deltas;
  int num_vectors;
  int length;
};

// 128 bytes of deltas per thread in flight fit into its registers.
constexpr int unroll_of(Dtype delta) { return delta == Dtype::kFloat32 ? 2 : 4; }

// A bank's deltas of one tile: vector after vector.
template <Dtype kDelta>
struct Interleaved {
  static constexpr int kUnroll = unroll_of(kDelta);
  const void* first;
  int length;
  __device__ __forceinline__ Operand operator()(int i) const {
    return {advance(first, static_cast<int64_t>(i) * length, kDelta), kDelta};
  }
};

template <Dtype kDelta>
__device__ __forceinline__ Tile<Interleaved<kDelta>> tile_of(const Bank& bank, int64_t tile) {
  const int64_t start = bank.tile_offset[tile];
  const int length = static_cast<int>(bank.tile_offset[tile + 1] - start);
  const Operand source = {advance(bank.source.data, start, bank.source.dtype), bank.source.dtype};
  const void* first = advance(bank.deltas.data, bank.num_vectors * start, kDelta);
  return {source, {first, length}, static_cast<int>(bank.num_vectors), length};
}

// Full tiles of an aligned arena are aligned throughout.
template <Dtype kDelta>
__device__ __forceinline__ bool is_full(const Tile<Interleaved<kDelta>>& tile) {
  return tile.length == kTile && is_aligned(tile.source.data) && is_aligned(tile.deltas.first);
}

// `coefs(i)(pass, k)`: what tau_i is multiplied by at this thread's element k of a pass.
template <bool kFull, typename Deltas, typename Coefs>
__device__ __forceinline__ void compose_tile(const Tile<Deltas>& tile, const Coefs& coefs,
                                             void* target, Dtype dtype) {
  float sums[kPasses][kVector];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    load<kFull>(tile.source, pass, tile.length, sums[pass]);
  }
  // Gathered coefficients take the registers of a second vector.
#pragma unroll(kFull && !Coefs::kGathers ? Deltas::kUnroll : 1)
  for (int i = 0; i < tile.num_vectors; ++i) {
    const Operand delta = tile.deltas(i);
    if (!kFull && delta.data == nullptr) continue;
    const auto coef = coefs(i);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      float values[kVector];
      load<kFull>(delta, pass, tile.length, values);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        sums[pass][k] = fmaf(coef(pass, k), values[k], sums[pass][k]);
      }
    }
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    store<kFull>(target, dtype, pass, tile.length, sums[pass]);
  }
}

}  // namespace atlas_kernels
