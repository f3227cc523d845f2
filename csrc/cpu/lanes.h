// Sixteen elements at a time, whatever the width of the registers; see kernels.h for the rules.
#pragma once

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace atlas {
namespace ATLAS_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;

using Floats = float __attribute__((vector_size(4 * kWidth)));
using Words = uint32_t __attribute__((vector_size(4 * kWidth)));
using Halves = uint16_t __attribute__((vector_size(2 * kWidth)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Sixteen consecutive elements in as many registers as it takes.
struct Lanes {
  Floats part[kParts];
};

inline Words words(Floats x) { return Words(x); }
inline Floats floats(Words x) { return Floats(x); }
inline Words select(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }

inline Floats load(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

inline Words load_bits(const void* p) {
  Halves bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, Words);
}

// One shuffle each; the portable form takes up to five instructions.
inline Floats load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m512i upper_half = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,
                                              7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Floats(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, upper_half, _mm512_castsi256_si512(bits)));
#elif defined(__AVX2__)
  const __m256i upper_half =
      _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                       -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return Floats(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bits), upper_half));
#elif defined(__x86_64__)
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return Floats(_mm_unpacklo_epi16(_mm_setzero_si128(), bits));
#else
  return floats(load_bits(p) << 16);
#endif
}

inline Floats load(const Float16* p) {
#if defined(__AVX512F__)
  return Floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  // Shift exponent and mantissa into place and rebias. Inf and NaN need a second rebias;
  // subnormals borrow an exponent of one, which the subtraction takes back exactly.
  const Words half = load_bits(p);
  const Words shifted = (half & 0x7fffu) << 13;
  const Words exponent = shifted & 0x0f800000u;
  const Words rebiased = shifted + 0x38000000u;
  const Words subnormal = words(floats(rebiased + 0x00800000u) - floats(Words{} + 0x38800000u));
  const Words special = rebiased + 0x38000000u;
  Words bits = select(exponent == 0x0f800000u, special, rebiased);
  bits = select(exponent == 0u, subnormal, bits);
  return floats(bits | (half & 0x8000u) << 16);
#endif
}

inline void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof(x)); }

inline void store_bits(void* p, Words x) {
  const Halves bits = __builtin_convertvector(x, Halves);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

inline void store(BFloat16* p, Floats x) {
  const Words bits = words(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (bits & 0x7fffffffu) > 0x7f800000u;
  store_bits(p, select(nan, Words{} + 0x7fc0u, rounded));
}

inline void store(Float16* p, Floats x) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &bits, sizeof(bits));
#elif defined(__F16C__)
  const __m128i bits = _mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &bits, sizeof(bits));
#else
  const Words sign = words(x) & 0x80000000u;
  const Words magnitude = words(x) ^ sign;
  // Normal results: rebias, then add half a unit, ties to even. A carry runs on into the exponent.
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: one half has the unit of a subnormal float16, so that the addition rounds.
  const Words half = Words{} + 0x3f000000u;
  const Words subnormal = words(floats(magnitude) + floats(half)) - half;
  const Words special = select(magnitude > 0x7f800000u, Words{} + 0x7e00u, Words{} + 0x7c00u);
  Words bits = select(magnitude < 0x38800000u, subnormal, normal);
  bits = select(magnitude >= 0x47800000u, special, bits);
  store_bits(p, bits | sign >> 16);
#endif
}

template <class T>
inline Lanes load_lanes(const T* p) {
  Lanes lanes;
  for (int k = 0; k < kParts; ++k) lanes.part[k] = load(p + k * kWidth);
  return lanes;
}

template <class T>
inline void store_lanes(T* p, const Lanes& lanes) {
  for (int k = 0; k < kParts; ++k) store(p + k * kWidth, lanes.part[k]);
}

// Around the caches.
inline void stream(float* p, Floats x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, __m512(x));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, __m256(x));
#elif defined(__x86_64__)
  _mm_stream_ps(p, __m128(x));
#else
  store(p, x);
#endif
}

inline void stream_lanes(float* p, const Lanes& lanes) {
  for (int k = 0; k < kParts; ++k) stream(p + k * kWidth, lanes.part[k]);
}

inline bool whole(int64_t length) { return length % kLanes == 0; }
inline int64_t whole_part(int64_t length) { return length / kLanes * kLanes; }

// The last length % kLanes elements, followed by zeros.
template <class T>
struct Tail {
  T data[kLanes] = {};
  Tail(const T* p, int64_t length) {
    const int64_t start = whole_part(length);
    __builtin_memcpy(data, p + start, (length - start) * sizeof(T));
  }
};

template <class T>
void widen(const void* source, float* wide, int64_t length) {
  const T* p = static_cast<const T*>(source);
  const int64_t end = whole_part(length);
  for (int64_t e = 0; e < end; e += kLanes) store_lanes(wide + e, load_lanes(p + e));
  if (!whole(length)) store_lanes(wide + end, load_lanes(Tail<T>(p, length).data));
}

template <class T>
void narrow(const float* wide, void* target, int64_t length) {
  T* p = static_cast<T*>(target);
  const int64_t end = whole_part(length);
  for (int64_t e = 0; e < end; e += kLanes) store_lanes(p + e, load_lanes(wide + e));
  if (!whole(length)) {
    T tail[kLanes];
    store_lanes(tail, load_lanes(wide + end));
    __builtin_memcpy(p + end, tail, (length - end) * sizeof(T));
  }
}

// The sum of the lanes, always in the same order.
inline float sum_of(const Lanes& lanes) {
  float sums[kLanes];
  store_lanes(sums, lanes);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

// The elements as float32, zero-padded to whole lanes: in place if they are that, else in `buffer`.
const float* as_float(const void* data, DType dtype, int64_t length, float* buffer) {
  if (dtype == DType::kFloat32) {
    if (whole(length)) return static_cast<const float*>(data);
    widen<float>(data, buffer, length);
  } else if (dtype == DType::kBFloat16) {
    widen<BFloat16>(data, buffer, length);
  } else {
    widen<Float16>(data, buffer, length);
  }
  return buffer;
}

void from_float(const float* wide, void* target, DType dtype, int64_t length) {
  if (dtype == DType::kFloat32) {
    narrow<float>(wide, target, length);
  } else if (dtype == DType::kBFloat16) {
    narrow<BFloat16>(wide, target, length);
  } else {
    narrow<Float16>(wide, target, length);
  }
}

}  // namespace
}  // namespace ATLAS_CAPABILITY
}  // namespace atlas
