// Tiles shared out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "dispatch.h"

namespace atlas {

// Elements read below which a further thread costs more than it saves.
constexpr int64_t kGrain = 1 << 18;

// Calls work(first, last) for consecutive ranges that cover `tiles` tiles, on as many threads as
// `elements` to be read are worth. Ranges are handed out one by one: a thread that the system slows
// down takes fewer of them. `work` must not throw.
template <class Work>
void for_tiles(int64_t tiles, int64_t elements, const Work& work) {
  const int64_t threads =
      std::clamp<int64_t>(elements / kGrain, 1, torch::stable::get_num_threads());
  const int64_t chunk = std::clamp<int64_t>(tiles / (8 * threads), 1, 16);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = next.fetch_add(chunk)) < tiles;) {
      work(first, std::min(first + chunk, tiles));
    }
    kernels().fence();
  });
}

}  // namespace atlas
