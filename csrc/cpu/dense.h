// Tiles of floating-point deltas.
#pragma once

#include "lanes.h"

namespace atlas {
namespace ATLAS_CAPABILITY {
namespace {

// Rows of one dtype that go through memory together: as many streams as registers allow.
constexpr int kRowsAtOnce = kWidth == 16 ? 8 : 4;

template <class T, int kRows>
inline void add_lanes(Lanes& sum, const T* const* data, const float* coef, int64_t e) {
  for (int r = 0; r < kRows; ++r) {
    const Lanes row = load_lanes(data[r] + e);
    for (int k = 0; k < kParts; ++k) sum.part[k] += coef[r] * row.part[k];
  }
}

// With more rows than one group, a row is left again after one tile, before the hardware has seen
// that it goes on: without a hint, 21 vectors took 10 % longer (one Zen 4 core; nearer caches and
// fewer rows lose by it).
constexpr int64_t kPrefetch = 2048;  // bytes

struct Options {
  bool prefetch;
  bool stream;
};

// Always inline: GCC 12 takes a function that only prefetches for one without effect.
template <class T, int kRows>
__attribute__((always_inline)) inline void prefetch(const T* const* data, int64_t e) {
  if (e * int64_t{sizeof(T)} % 64 != 0) return;
  for (int r = 0; r < kRows; ++r) {
    __builtin_prefetch(reinterpret_cast<const char*>(data[r] + e) + kPrefetch, 0, 2);
  }
}

template <class T, int kRows>
void add(const float* source, float* target, const Row* rows, int64_t length, Options options) {
  const T* data[kRows];
  float coef[kRows];
  for (int r = 0; r < kRows; ++r) {
    data[r] = static_cast<const T*>(rows[r].data);
    coef[r] = rows[r].coef;
  }
  const int64_t end = whole_part(length);
  for (int64_t e = 0; e < end; e += kLanes) {
    if (options.prefetch) prefetch<T, kRows>(data, e);
    Lanes sum = load_lanes(source + e);
    add_lanes<T, kRows>(sum, data, coef, e);
    if (options.stream) {
      stream_lanes(target + e, sum);
    } else {
      store_lanes(target + e, sum);
    }
  }
  if (!whole(length)) {
    Lanes sum = load_lanes(source + end);
    for (int r = 0; r < kRows; ++r) {
      const Tail<T> tail(data[r], length);
      const T* start = tail.data;
      add_lanes<T, 1>(sum, &start, coef + r, 0);
    }
    store_lanes(target + end, sum);
  }
}

template <class T, int kRows>
void dot(const float* grad, const Row* rows, int64_t length, float* result, bool ahead) {
  const T* data[kRows];
  Lanes sums[kRows] = {};
  for (int r = 0; r < kRows; ++r) data[r] = static_cast<const T*>(rows[r].data);
  const int64_t end = whole_part(length);
  for (int64_t e = 0; e < end; e += kLanes) {
    if (ahead) prefetch<T, kRows>(data, e);
    const Lanes g = load_lanes(grad + e);
    for (int r = 0; r < kRows; ++r) {
      const Lanes row = load_lanes(data[r] + e);
      for (int k = 0; k < kParts; ++k) sums[r].part[k] += g.part[k] * row.part[k];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if (!whole(length)) {
      const Lanes g = load_lanes(grad + end);
      const Lanes row = load_lanes(Tail<T>(data[r], length).data);
      for (int k = 0; k < kParts; ++k) sums[r].part[k] += g.part[k] * row.part[k];
    }
    result[rows[r].vector] = sum_of(sums[r]);
  }
}

template <class T, int kRows = kRowsAtOnce>
void add_group(int64_t num_rows, const float* source, float* target, const Row* rows,
               int64_t length, Options options) {
  if (num_rows == kRows) {
    add<T, kRows>(source, target, rows, length, options);
  } else if constexpr (kRows > 1) {
    add_group<T, kRows - 1>(num_rows, source, target, rows, length, options);
  }
}

template <class T, int kRows = kRowsAtOnce>
void dot_group(int64_t num_rows, const float* grad, const Row* rows, int64_t length, float* result,
               bool ahead) {
  if (num_rows == kRows) {
    dot<T, kRows>(grad, rows, length, result, ahead);
  } else if constexpr (kRows > 1) {
    dot_group<T, kRows - 1>(num_rows, grad, rows, length, result, ahead);
  }
}

// How many rows to take together: of one dtype, in groups of about equal size.
int64_t group_size(const Row* rows, int64_t num_rows) {
  const int64_t groups = (num_rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t limit = (num_rows + groups - 1) / groups;
  int64_t size = 1;
  while (size < limit && rows[size].dtype == rows[0].dtype) ++size;
  return size;
}

void compose_tile(const void* base, void* out, DType dtype, const Row* rows, int64_t num_rows,
                  int64_t length, bool stream) {
  alignas(64) float buffer[kTile];
  const float* source = as_float(base, dtype, length, buffer);
  const bool direct = dtype == DType::kFloat32 && whole(length);
  stream = stream && direct && reinterpret_cast<uintptr_t>(out) % (4 * kWidth) == 0;
  for (int64_t done = 0; done < num_rows;) {
    const Row* group = rows + done;
    const int64_t size = group_size(group, num_rows - done);
    done += size;
    const bool last = done == num_rows;
    float* target = direct && last ? static_cast<float*>(out) : buffer;
    const Options options{num_rows > kRowsAtOnce, stream && last};
    if (group->dtype == DType::kFloat32) {
      add_group<float>(size, source, target, group, length, options);
    } else if (group->dtype == DType::kBFloat16) {
      add_group<BFloat16>(size, source, target, group, length, options);
    } else {
      add_group<Float16>(size, source, target, group, length, options);
    }
    source = target;
  }
  if (source != out) from_float(source, out, dtype, length);
}

void dot_tile(const void* grad, DType dtype, const Row* rows, int64_t num_rows, int64_t length,
              float* result) {
  alignas(64) float buffer[kTile];
  const float* wide = as_float(grad, dtype, length, buffer);
  const bool ahead = num_rows > kRowsAtOnce;
  for (int64_t done = 0; done < num_rows;) {
    const Row* group = rows + done;
    const int64_t size = group_size(group, num_rows - done);
    done += size;
    if (group->dtype == DType::kFloat32) {
      dot_group<float>(size, wide, group, length, result, ahead);
    } else if (group->dtype == DType::kBFloat16) {
      dot_group<BFloat16>(size, wide, group, length, result, ahead);
    } else {
      dot_group<Float16>(size, wide, group, length, result, ahead);
    }
  }
}

}  // namespace
}  // namespace ATLAS_CAPABILITY
}  // namespace atlas
