// What the list form and the bank form share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace atlas {

using torch::headeronly::ScalarType;

// Bytes. Outputs beyond this would not be in a cache anyway when their reader comes.
constexpr int64_t kStream = 1 << 24;

inline void check_float32(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float, "the cpp backend computes in float32 only");
}

// result[i, b] = the sum of partials[tile, i] over the tiles of block b, in order, in float64.
inline Tensor sum_tiles(TensorRef like, const std::vector<float>& partials,
                        const std::vector<int64_t>& block_tile, int64_t num_vectors) {
  const int64_t num_blocks = block_tile.size() - 1;
  Tensor result = new_empty(like, {num_vectors, num_blocks}, aoti_torch_dtype_float32());
  float* out = result.mutable_data_ptr<float>();
  std::vector<double> sums(num_vectors);
  for (int64_t b = 0; b < num_blocks; ++b) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t t = block_tile[b]; t < block_tile[b + 1]; ++t) {
      for (int64_t i = 0; i < num_vectors; ++i) sums[i] += partials[t * num_vectors + i];
    }
    for (int64_t i = 0; i < num_vectors; ++i) out[i * num_blocks + b] = sums[i];
  }
  return result;
}

}  // namespace atlas
