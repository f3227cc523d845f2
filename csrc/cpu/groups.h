// Tiles whose elements have coefficients by group; atlas_kernels/ops/groups.py defines groups.
#pragma once

#include "packed.h"

namespace atlas {
namespace ATLAS_CAPABILITY {
namespace {

// Of all elements of a tile, also of those that a shorter one lacks.
void slots_of_tile(uint32_t key, uint16_t* slot) {
  constexpr int kRounds = 4;
  constexpr int kBits = 12;
  static_assert(kTile == 1 << kBits, "the halves of a slot are shifted by");
  uint16_t factor[kRounds], shift[kRounds];
  for (int r = 0; r < kRounds; ++r) {
    factor[r] = uint16_t(key | 1);
    shift[r] = uint16_t(key >> kBits);
    key = key * 0x2c1b3c6du + 0x297a2d39u;
    key ^= key >> 15;
  }
  Halves element;
  for (int k = 0; k < kWidth; ++k) element[k] = uint16_t(k);
  for (int64_t e = 0; e < kTile; e += kWidth) {
    Halves x = element + uint16_t(e);
    for (int r = 0; r < kRounds; ++r) {
      // Modulo 2**16, of which kTile is a divisor.
      x = (x * factor[r] + shift[r]) & uint16_t(kTile - 1);
      x ^= x >> kBits / 2;
    }
    __builtin_memcpy(slot + e, &x, sizeof(x));
  }
}

inline Floats gather(const float* from, const uint16_t* index) {
#if defined(__AVX512F__)
  return Floats(_mm512_i32gather_ps(__m512i(load_bits(index)), from, 4));
#elif defined(__AVX2__)
  return Floats(_mm256_i32gather_ps(from, __m256i(load_bits(index)), 4));
#else
  Floats x;
#pragma GCC unroll 4
  for (int k = 0; k < kWidth; ++k) x[k] = from[index[k]];
  return x;
#endif
}

// Calls work(e, times) for all elements [e, e + kWidth) of a row; times(x) is x times them. Those
// of a packed row are multiplied by their scale first.
template <class T, class Work>
void for_dense(const void* row, int64_t length, const Work& work) {
  const T* data = static_cast<const T*>(row);
  for (int64_t e = 0; e < length; e += kWidth) {
    work(e, [=](Floats x) { return x * load(data + e); });
  }
}

template <int kBits, class Work>
void for_packed(const PackedTile<kBits>& tile, int64_t row, const Work& work) {
  for (int64_t first = 0; first < tile.groups(); first += kUnitGroups<kBits>) {
#pragma GCC unroll 4
    for (int k = 0; k < kUnitGroups<kBits>; ++k) {
      const int64_t g = first + k;
      const float scale = tile.scale(row, g);
      for (int p = 0; p < kParts; ++p) {
        const uint32_t* unit = tile.unit(row, first) + p * kWidth;
#pragma GCC unroll 8
        for (int f = 0; f < kFields; ++f) {
          work(g * kGroup + f * kLanes + p * kWidth,
               [=](Floats x) { return times_level<kBits>(x * scale, unit, k * kFields + f); });
        }
      }
    }
  }
}

template <class Work>
void for_row(const StoredRows& rows, int64_t row, int64_t length, const Work& work) {
  if (rows.bits != 0) {
    const PackedRows packed{static_cast<const uint32_t*>(rows.items), rows.scales, rows.bits,
                            rows.count};
    with_tile(packed, nullptr, DType::kFloat32, length,
              [&](const auto& tile) { for_packed(tile, row, work); });
    return;
  }
  const char* data = static_cast<const char*>(rows.items) + row * length * size_of(rows.dtype);
  if (rows.dtype == DType::kFloat32) {
    for_dense<float>(data, length, work);
  } else if (rows.dtype == DType::kBFloat16) {
    for_dense<BFloat16>(data, length, work);
  } else {
    for_dense<Float16>(data, length, work);
  }
}

void group_compose_tile(const void* base, void* out, DType dtype, const StoredRows& rows,
                        const GroupedCoef& coef, uint32_t key, int64_t length) {
  alignas(64) float buffer[kTile];
  alignas(64) uint16_t group[kTile];
  slots_of_tile(key, group);
  for (int64_t e = 0; e < kTile; e += kWidth) {
    store_bits(group + e, load_bits(group + e) * uint32_t(coef.groups) / uint32_t(kTile));
  }
  const float* sum = as_float(base, dtype, length, buffer);
  for (int64_t i = 0; i < rows.count; ++i) {
    const float* factors = coef.data + i * coef.stride;
    for_row(rows, i, length, [&](int64_t e, const auto& times) {
      store(buffer + e, load(sum + e) + times(gather(factors, group + e)));
    });
    sum = buffer;
  }
  from_float(sum, out, dtype, length);
}

void group_dot_tile(const void* grad, DType dtype, const StoredRows& rows, int64_t first,
                    int64_t count, uint32_t key, int64_t length, float* by_slot) {
  alignas(64) float buffer[kTile];
  // Zero where a shorter tile has no elements.
  alignas(64) float products[kTile] = {};
  alignas(64) uint16_t slot[kTile], element[kTile];
  slots_of_tile(key, slot);
  for (int64_t e = 0; e < kTile; ++e) element[slot[e]] = uint16_t(e);
  const float* wide = as_float(grad, dtype, length, buffer);
  for (int64_t i = 0; i < count; ++i) {
    for_row(rows, first + i, length,
            [&](int64_t e, const auto& times) { store(products + e, times(load(wide + e))); });
    // Slot by slot, for a scatter would cost more than this gather.
    float* sums = by_slot + i * kTile;
    for (int64_t s = 0; s < kTile; s += kWidth) {
      store(sums + s, load(sums + s) + gather(products, element + s));
    }
  }
}

}  // namespace
}  // namespace ATLAS_CAPABILITY
}  // namespace atlas
