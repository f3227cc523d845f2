// Tiles of packed deltas, which `codecs/packed.py` defines.
//
// A thread serves four of the sixteen columns of one group of 128 elements: eight planes of four
// consecutive elements, all with one scale. Its codes come in 128-bit loads, which neighbouring
// groups share where their codes lie in the same words. Blocks of an arena hold whole units, so
// there are no tails. Few bits and many vectors ask for more instructions than bytes: what matters
// here is the number of instructions per element.

#pragma once

#include "device.cuh"

namespace atlas_kernels {

constexpr int kScaleGroup = 128;
constexpr int kColumns = 16;  // words of a unit
constexpr int kLanes = 4;     // columns of a thread
constexpr int kPlanes = kScaleGroup / kColumns;
constexpr int kThreadsPerGroup = kColumns / kLanes;
constexpr int kPackedThreads = kTile / kScaleGroup * kThreadsPerGroup;
constexpr int kPackedWarps = kPackedThreads / kWarp;
// At most 80 registers per thread, as many threads as in the other kernels.
constexpr int kPackedBlocksPerMultiprocessor = 6;

// Exact.
__device__ __forceinline__ float inverse_power(int exponent) { return 1.0f / (1 << exponent); }

// The fields of kBits bits of a thread. Each byte of them becomes the second byte of a float, which
// is 2**16 + 2 * byte, by one instruction. What a mask leaves of that is 2**16 + 2 * (one field in
// its place): no code is ever shifted or converted.
template <int kBits>
struct Fields {
  static constexpr int kBytes = kPlanes * kBits / 8;
  uint32_t floats[kBytes][kLanes];

  // `words`: where group 0 starts.
  __device__ __forceinline__ void load(const uint32_t* words, int group, int column) {
    const int first = group * kBytes;
    const uint32_t* unit = words + first / 4 * kColumns + column;
    uint4 four = {};
#pragma unroll
    for (int byte = 0; byte < kBytes; ++byte) {
      if (byte % 4 == 0) four = __ldcs(reinterpret_cast<const uint4*>(unit + byte / 4 * kColumns));
      const uint32_t selector = 0x7604 | (first + byte) % 4 << 4;
      floats[byte][0] = __byte_perm(four.x, 0x47800000, selector);
      floats[byte][1] = __byte_perm(four.y, 0x47800000, selector);
      floats[byte][2] = __byte_perm(four.z, 0x47800000, selector);
      floats[byte][3] = __byte_perm(four.w, 0x47800000, selector);
    }
  }

  // The place of a plane's field in its byte.
  static __device__ __forceinline__ int shift(int plane) { return plane * kBits % 8; }

  // (2 * u + 1 - 2**kBits) * 2**shift, exact.
  __device__ __forceinline__ float level(int plane, int lane) const {
    constexpr uint32_t kField = (1 << kBits) - 1;
    const uint32_t field = kField << shift(plane);
    const uint32_t others = (0xffu ^ field) << 8;
    const float value = __uint_as_float(floats[plane * kBits / 8][lane] & ~others);
    return value - static_cast<float>((1 << 16) + field);
  }
};

// A thread's codes of one vector.
template <int kBits>
struct Codes : Fields<kBits> {};

template <>
struct Codes<3> {
  Fields<2> low;
  Fields<1> high;

  __device__ __forceinline__ void load(const uint32_t* words, int group, int column) {
    constexpr int kGroups = 512 / kScaleGroup;  // of a unit
    const uint32_t* unit = words + group / kGroups * 3 * kColumns;
    low.load(unit, group % kGroups, column);
    high.load(unit + 2 * kColumns, group % kGroups, column);
  }

  static __device__ __forceinline__ int shift(int plane) { return Fields<2>::shift(plane); }

  __device__ __forceinline__ float level(int plane, int lane) const {
    const float weight = (4 << shift(plane)) * inverse_power(Fields<1>::shift(plane));
    return fmaf(weight, high.level(plane, lane), low.level(plane, lane));
  }
};

// Where a thread works. Threads beyond a short tile's last group look at its first.
struct Spot {
  int64_t start;  // of the tile
  int length;     // of the tile
  int group;
  int column;
  bool exists;
};

__device__ __forceinline__ Spot spot_of(const Tiling& tiling, int64_t tile) {
  const int64_t start = tiling.tile_offset[tile];
  const int length = static_cast<int>(tiling.tile_offset[tile + 1] - start);
  const int group = static_cast<int>(threadIdx.x) / kThreadsPerGroup;
  const int column = static_cast<int>(threadIdx.x) % kThreadsPerGroup * kLanes;
  const bool exists = group < length / kScaleGroup;
  return {start, length, exists ? group : 0, column, exists};
}

template <int kBits>
struct Row {
  Codes<kBits> codes;
  float scale;
};

// A thread's deltas of one tile, vector after vector.
template <int kBits>
class Rows {
 public:
  // As many vectors at once as registers allow.
  static constexpr int kUnroll = kBits == 3 ? 1 : 2;

  __device__ __forceinline__ Rows(const PackedBank& bank, const Spot& at)
      : words_(bank.words + bank.num_vectors * at.start * kBits / 32),
        scales_(bank.scales + bank.num_vectors * at.start / kScaleGroup + at.group),
        at_(at) {}

  __device__ __forceinline__ Row<kBits> next() {
    Row<kBits> row;
    row.codes.load(words_, at_.group, at_.column);
    row.scale = __uint_as_float(static_cast<uint32_t>(*scales_) << 16);
    skip(1);
    return row;
  }

  __device__ __forceinline__ void skip(int64_t vectors) {
    words_ += vectors * (at_.length * kBits / 32);
    scales_ += vectors * (at_.length / kScaleGroup);
  }

 private:
  const uint32_t* words_;
  const uint16_t* scales_;
  const Spot at_;
};

using Planes = float[kPlanes][kLanes];

__device__ __forceinline__ void load_four(const float* p, float (&values)[kLanes]) {
  const float4 four = __ldcs(reinterpret_cast<const float4*>(p));
  values[0] = four.x;
  values[1] = four.y;
  values[2] = four.z;
  values[3] = four.w;
}

template <typename T>
__device__ __forceinline__ void load_four(const T* p, float (&values)[kLanes]) {
  const uint2 four = __ldcs(reinterpret_cast<const uint2*>(p));
  const float2 low = Pair<T>::widen(four.x);
  const float2 high = Pair<T>::widen(four.y);
  values[0] = low.x;
  values[1] = low.y;
  values[2] = high.x;
  values[3] = high.y;
}

__device__ __forceinline__ void store_four(float* p, const float (&values)[kLanes]) {
  *reinterpret_cast<float4*>(p) = make_float4(values[0], values[1], values[2], values[3]);
}

template <typename T>
__device__ __forceinline__ void store_four(T* p, const float (&values)[kLanes]) {
  *reinterpret_cast<uint2*>(p) =
      make_uint2(Pair<T>::narrow(values[0], values[1]), Pair<T>::narrow(values[2], values[3]));
}

__device__ __forceinline__ int64_t first_element(const Spot& at) {
  return at.start + at.group * kScaleGroup + at.column;
}

template <typename T>
__device__ __forceinline__ void load_as(const void* arena, const Spot& at, Planes& values) {
  const T* first = static_cast<const T*>(arena) + first_element(at);
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) load_four(first + plane * kColumns, values[plane]);
}

template <typename T>
__device__ __forceinline__ void store_as(void* arena, const Spot& at, const Planes& values) {
  T* first = static_cast<T*>(arena) + first_element(at);
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) store_four(first + plane * kColumns, values[plane]);
}

__device__ __forceinline__ void load(Operand arena, const Spot& at, Planes& values) {
  switch (arena.dtype) {
    case Dtype::kFloat32:
      return load_as<float>(arena.data, at, values);
    case Dtype::kBFloat16:
      return load_as<__nv_bfloat16>(arena.data, at, values);
    case Dtype::kFloat16:
      return load_as<__half>(arena.data, at, values);
  }
}

__device__ __forceinline__ void store(void* arena, Dtype dtype, const Spot& at,
                                      const Planes& values) {
  switch (dtype) {
    case Dtype::kFloat32:
      return store_as<float>(arena, at, values);
    case Dtype::kBFloat16:
      return store_as<__nv_bfloat16>(arena, at, values);
    case Dtype::kFloat16:
      return store_as<__half>(arena, at, values);
  }
}

// `coefs.next(scale)(plane, lane, unit)`: the next vector's coefficient at this thread's element,
// times its scale, times `unit`, which is a power of two.
template <int kBits, typename Coefs>
__device__ __forceinline__ void compose_tile(const PackedBank& bank, const Spot& at, Coefs coefs,
                                             void* composed) {
  Rows<kBits> rows(bank, at);
  Planes sums;
  load(bank.source, at, sums);
  const int num_vectors = static_cast<int>(bank.num_vectors);
#pragma unroll(Rows<kBits>::kUnroll)
  for (int i = 0; i < num_vectors; ++i) {
    const Row<kBits> row = rows.next();
    const auto weight = coefs.next(row.scale);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const float unit = inverse_power(Codes<kBits>::shift(plane));
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[plane][lane] =
            fmaf(weight(plane, lane, unit), row.codes.level(plane, lane), sums[plane][lane]);
      }
    }
  }
  store(composed, bank.source.dtype, at, sums);
}

}  // namespace atlas_kernels
