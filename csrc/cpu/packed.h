// Tiles of packed deltas; atlas_kernels/codecs/packed.py defines words, levels and scales.
#pragma once

#include "lanes.h"

namespace atlas {
namespace ATLAS_CAPABILITY {
namespace {

// Vectors of kLanes elements that share a scale.
constexpr int kFields = kGroup / kLanes;

// Groups whose codes lie in the same words, and those words in each of the kLanes columns.
template <int kBits>
constexpr int kUnitGroups = unit_of(kBits) / kGroup;
template <int kBits>
constexpr int64_t kUnitWords = kUnitGroups<kBits> * kFields * kBits / 32;

inline Words load_words(const uint32_t* p) {
  Words x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

// The word with its bit `from` moved to the place `to`.
inline Words move(Words word, int from, int to) {
  return from < to ? word << uint32_t(to - from) : word >> uint32_t(from - to);
}

// The same for a few bits that lie in one half of the word, to its lowest place; the rest is
// anything. Shifts and shuffles share two ports on Zen 4, multiplications have others: shift,
// shuffle and add take 2.5 cycles, multiply, shuffle and add 1.5.
inline Words move_to_front(Words word, int from) {
  const Words half = from < 16 ? word : word >> 16;
  if (from % 16 == 0) return half;
#if defined(__AVX512F__)
  __m512i power = _mm512_set1_epi16(short(1 << (16 - from % 16)));
  __asm__("" : "+v"(power));  // or the compiler makes it a shift again
  return Words(_mm512_mulhi_epu16(__m512i(half), power));
#elif defined(__AVX2__)
  __m256i power = _mm256_set1_epi16(short(1 << (16 - from % 16)));
  __asm__("" : "+x"(power));
  return Words(_mm256_mulhi_epu16(__m256i(half), power));
#else
  return half >> uint32_t(from % 16);
#endif
}

// The codes of a field of a unit, from the bit `to` of each word upwards; the other bits are
// anything.
template <int kBits>
inline Words codes(const uint32_t* unit, int field, int to) {
  const int bit = kBits * field;
  const Words word = load_words(unit + bit / 32 * kLanes);
  return to == 0 ? move_to_front(word, bit % 32) : move(word, bit % 32, to);
}

template <>
inline Words codes<3>(const uint32_t* unit, int field, int to) {
  const Words low = codes<2>(unit, field, to);
  const Words high = move(load_words(unit + 2 * kLanes), field, to + 2);
#if defined(__AVX512F__)
  const __m512i two_bits = _mm512_set1_epi32(3 << to);
  return Words(_mm512_ternarylogic_epi32(two_bits, __m512i(low), __m512i(high), 0xca));
#else
  return select(Words{} + (3u << to), low, high);
#endif
}

// Levels of twice the codes, which begin at bit 1: below 2**24 an integer is the mantissa of its
// sum with 2**23.
template <int kBits>
inline Floats levels(Words twice) {
  constexpr uint32_t kHighest = (1u << kBits) - 1;
  return floats((twice & (2 * kHighest)) | 0x4b000000u) - (Floats{} + float((1 << 23) + kHighest));
}

// A shuffle can look up codes of up to so many bits.
#if defined(__AVX512F__)
constexpr int kTableBits = 4;
inline Floats look_up(Floats table, Words index) {
  return Floats(_mm512_permutexvar_ps(__m512i(index), __m512(table)));
}
#elif defined(__AVX2__)
constexpr int kTableBits = 3;
inline Floats look_up(Floats table, Words index) {
  return Floats(_mm256_permutevar8x32_ps(__m256(table), __m256i(index)));
}
#else
constexpr int kTableBits = 0;
inline Floats look_up(Floats table, Words) { return table; }
#endif

// The levels of all codes. It repeats itself to the width of a vector, because a shuffle looks at
// that many bits of an index.
template <int kBits>
inline Floats table_of_levels() {
  Words twice;
  for (int k = 0; k < kWidth; ++k) twice[k] = 2 * k;
  return levels<kBits>(twice);
}

// x * level for a field of a unit.
template <int kBits>
inline Floats times_level(Floats x, const uint32_t* unit, int field) {
  if constexpr (kBits == 1) {
    // Plus or minus one.
    return floats(words(x) ^ (~codes<1>(unit, field, 31) & 0x80000000u));
  } else if constexpr (kBits <= kTableBits) {
    return x * look_up(table_of_levels<kBits>(), codes<kBits>(unit, field, 0));
  } else {
    return x * levels<kBits>(codes<kBits>(unit, field, 1));
  }
}

// The same for one x and many fields.
template <int kBits>
class Multiples {
 public:
  explicit Multiples(float x) : x_(Floats{} + x) {
    if constexpr (kBits <= kTableBits) x_ *= table_of_levels<kBits>();
  }
  Floats operator()(const uint32_t* unit, int field) const {
    if constexpr (kBits <= kTableBits) {
      return look_up(x_, codes<kBits>(unit, field, 0));
    } else {
      return times_level<kBits>(x_, unit, field);
    }
  }

 private:
  Floats x_;
};

// Always inline: GCC 12 takes a function that only prefetches for one without effect.
__attribute__((always_inline)) inline void call_for(const char* data, int64_t bytes) {
  for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(data + k, 0, 2);
}

// Where a tile's rows lie. While it is worked on, the next one is called for, bit by bit and front
// to back: the hardware foresees neither the jumps from row to row nor that all of a gradient is
// wanted at once (a fifth of the time of int4 and int8, both directions, on one Zen 4 core).
template <int kBits>
class PackedTile {
 public:
  // `wide` is the base or its gradient.
  PackedTile(const PackedRows& rows, const void* wide, DType dtype, int64_t length)
      : rows_(rows),
        groups_(length / kGroup),
        row_words_(length * kBits / 32),
        wide_bytes_(length * size_of(dtype)),
        next_wide_(static_cast<const char*>(wide) + wide_bytes_) {}

  int64_t groups() const { return groups_; }

  // `row` may be one of the next tile.
  const uint32_t* unit(int64_t row, int64_t group) const {
    return rows_.words + row * row_words_ + group / kUnitGroups<kBits> * kUnitWords<kBits> * kLanes;
  }

  float scale(int64_t row, int64_t group) const {
    const uint32_t bits = uint32_t{rows_.scales[row * groups_ + group]} << 16;
    float scale;
    __builtin_memcpy(&scale, &bits, sizeof(scale));
    return scale;
  }

  __attribute__((always_inline)) void call_for_wide(int64_t part, int64_t parts) const {
    const int64_t start = wide_bytes_ * part / parts;
    call_for(next_wide_ + start, wide_bytes_ * (part + 1) / parts - start);
  }

 private:
  const PackedRows& rows_;
  int64_t groups_, row_words_, wide_bytes_;
  const char* next_wide_;
};

// One group at a time stays in registers over all rows.
template <int kBits>
void add_packed(const PackedTile<kBits>& tile, int64_t num_rows, const float* coef,
                const float* source, float* target, bool streamed) {
  constexpr int64_t kPartBytes = kGroup * kBits / 8 / kParts;
  const char* next = reinterpret_cast<const char*>(tile.unit(num_rows, 0));
  for (int64_t first = 0; first < tile.groups(); first += kUnitGroups<kBits>) {
#pragma GCC unroll 4
    for (int k = 0; k < kUnitGroups<kBits>; ++k) {
      const int64_t g = first + k;
      tile.call_for_wide(g, tile.groups());
      for (int p = 0; p < kParts; ++p) {
        const int64_t start = g * kGroup + p * kWidth;
        Floats sums[kFields];
        for (int f = 0; f < kFields; ++f) sums[f] = load(source + start + f * kLanes);
        for (int64_t i = 0; i < num_rows; ++i) {
          call_for(next, kPartBytes);
          next += kPartBytes;
          const Multiples<kBits> multiples(coef[i] * tile.scale(i, g));
          const uint32_t* unit = tile.unit(i, first) + p * kWidth;
#pragma GCC unroll 8
          for (int f = 0; f < kFields; ++f) sums[f] += multiples(unit, k * kFields + f);
        }
        for (int f = 0; f < kFields; ++f) {
          float* to = target + start + f * kLanes;
          if (streamed) {
            stream(to, sums[f]);
          } else {
            store(to, sums[f]);
          }
        }
      }
    }
  }
}

// One row at a time, front to back.
template <int kBits>
void dot_packed(const PackedTile<kBits>& tile, int64_t num_rows, const float* grad, float* result) {
  constexpr int64_t kUnitBytes = 4 * kUnitWords<kBits> * kLanes;
  for (int64_t i = 0; i < num_rows; ++i) {
    tile.call_for_wide(i, num_rows);
    float scales[kTile / kGroup];
    for (int64_t g = 0; g < tile.groups(); ++g) scales[g] = tile.scale(i, g);
    Lanes total = {};
    for (int64_t first = 0; first < tile.groups(); first += kUnitGroups<kBits>) {
      call_for(reinterpret_cast<const char*>(tile.unit(num_rows + i, first)), kUnitBytes);
#pragma GCC unroll 4
      for (int k = 0; k < kUnitGroups<kBits>; ++k) {
        const int64_t g = first + k;
        for (int p = 0; p < kParts; ++p) {
          const float* part = grad + g * kGroup + p * kWidth;
          const uint32_t* unit = tile.unit(i, first) + p * kWidth;
          Floats sum = {};
#pragma GCC unroll 8
          for (int f = 0; f < kFields; ++f) {
            sum += times_level<kBits>(load(part + f * kLanes), unit, k * kFields + f);
          }
          total.part[p] += scales[g] * sum;
        }
      }
    }
    result[i] = sum_of(total);
  }
}

// Calls work(a PackedTile).
template <class Work>
void with_tile(const PackedRows& rows, const void* wide, DType dtype, int64_t length,
               const Work& work) {
  switch (rows.bits) {
    case 1:
      return work(PackedTile<1>(rows, wide, dtype, length));
    case 2:
      return work(PackedTile<2>(rows, wide, dtype, length));
    case 3:
      return work(PackedTile<3>(rows, wide, dtype, length));
    case 4:
      return work(PackedTile<4>(rows, wide, dtype, length));
    default:
      return work(PackedTile<8>(rows, wide, dtype, length));
  }
}

void packed_compose_tile(const void* base, void* out, DType dtype, const PackedRows& rows,
                         const float* coef, int64_t length, bool stream) {
  alignas(64) float buffer[kTile];
  const float* source = as_float(base, dtype, length, buffer);
  const bool direct = dtype == DType::kFloat32;
  float* target = direct ? static_cast<float*>(out) : buffer;
  stream = stream && direct && reinterpret_cast<uintptr_t>(out) % (4 * kWidth) == 0;
  with_tile(rows, base, dtype, length,
            [&](const auto& tile) { add_packed(tile, rows.count, coef, source, target, stream); });
  if (!direct) from_float(target, out, dtype, length);
}

void packed_dot_tile(const void* grad, DType dtype, const PackedRows& rows, int64_t length,
                     float* result) {
  alignas(64) float buffer[kTile];
  const float* wide = as_float(grad, dtype, length, buffer);
  with_tile(rows, grad, dtype, length,
            [&](const auto& tile) { dot_packed(tile, rows.count, wide, result); });
}

}  // namespace
}  // namespace ATLAS_CAPABILITY
}  // namespace atlas
