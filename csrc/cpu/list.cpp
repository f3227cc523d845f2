// The list form of the operators in atlas_kernels/ops/schema.py: tensors that the caller owns.
#include <torch/csrc/stable/library.h>

#include "common.h"
#include "dispatch.h"
#include "memory.h"
#include "parallel.h"

namespace atlas {
namespace {

struct View {
  const char* data;
  int64_t numel;
  DType dtype;
  bool contiguous;
};

// The arguments of either operator: `wide` are the base blocks or their gradients. Tensors are read
// in the order of the lists, in which they are likely to lie in memory, not block by block.
struct Arguments {
  Arguments(StableListHandle wide_list, StableListHandle delta_list)
      : wide(wide_list), deltas(delta_list), num_blocks(wide.size()) {
    STD_TORCH_CHECK(num_blocks > 0 && deltas.size() % num_blocks == 0,
                    "expected N * B deltas for B > 0 blocks");
    num_vectors = deltas.size() / num_blocks;
    wide_views.reserve(num_blocks);
    delta_views.reserve(deltas.size());
    std::vector<IntHeaderOnlyArrayRef> sizes;
    sizes.reserve(num_blocks);
    for (int64_t b = 0; b < num_blocks; ++b) {
      wide_views.push_back(view(wide[b]));
      sizes.push_back(wide[b].sizes());
    }
    for (int64_t k = 0; k < deltas.size(); ++k) {
      const View delta = view(deltas[k]);
      const IntHeaderOnlyArrayRef shape = deltas[k].sizes();
      STD_TORCH_CHECK(shape.equals(sizes[k % num_blocks]) || is_absent(shape),
                      "a delta must have the shape of its block");
      delta_views.push_back(delta);
    }
  }

  static View view(TensorRef tensor) {
    return {tensor.data(), tensor.numel(), tensor.dtype<DType>(), tensor.is_contiguous()};
  }

  TensorList wide, deltas;
  int64_t num_blocks, num_vectors;
  std::vector<View> wide_views, delta_views;
};

int64_t tiles_of(int64_t length) { return (length + kTile - 1) / kTile; }

struct Block {
  const char* wide;
  char* out;
  DType dtype;
  int64_t length;
  int64_t first_row, end_row;
};

// Consecutive blocks as addresses. Tensors that are not contiguous are copied; the copies live as
// long as this, which is why it ends at the first block that needs one.
class Blocks {
 public:
  Blocks(const Arguments& args, const float* coef, int64_t first) : end_(first) {
    while (end_ < args.num_blocks && copies_.empty()) {
      const int64_t b = end_++;
      const View& wide = args.wide_views[b];
      Block block{address(wide, args.wide[b]), nullptr, wide.dtype, wide.numel, num_rows(), 0};
      for (int64_t i = 0; i < args.num_vectors; ++i) {
        const int64_t k = i * args.num_blocks + b;
        const View& delta = args.delta_views[k];
        if (delta.numel == 0) continue;
        const float c = coef == nullptr ? 0.0f : coef[k];
        rows_.push_back({address(delta, args.deltas[k]), c, delta.dtype, i});
      }
      block.end_row = num_rows();
      blocks_.push_back(block);
      first_tile_.push_back(first_tile_.back() + tiles_of(block.length));
      elements_ += block.length * (1 + block.end_row - block.first_row);
    }
  }

  int64_t end() const { return end_; }
  std::vector<Block>& blocks() { return blocks_; }

  // Calls work(block, rows of the tile, tile, first element, elements) for every tile, in parallel.
  template <class Work>
  void for_each_tile(const Work& work) const {
    for_tiles(first_tile_.back(), elements_, [&](int64_t first, int64_t last) {
      std::vector<Row> rows;
      int64_t b =
          std::upper_bound(first_tile_.begin(), first_tile_.end(), first) - first_tile_.begin() - 1;
      for (int64_t t = first; t < last; ++t) {
        while (t >= first_tile_[b + 1]) ++b;
        const Block& block = blocks_[b];
        const int64_t start = (t - first_tile_[b]) * kTile;
        rows.assign(rows_.begin() + block.first_row, rows_.begin() + block.end_row);
        for (Row& row : rows) {
          row.data = static_cast<const char*>(row.data) + start * size_of(row.dtype);
        }
        work(block, rows, t, start, std::min(kTile, block.length - start));
      }
    });
  }

 private:
  int64_t num_rows() const { return rows_.size(); }

  const char* address(const View& view, TensorRef tensor) {
    if (view.contiguous) return view.data;
    copies_.push_back(tensor.contiguous());
    return TensorRef(copies_.back()).data();
  }

  int64_t end_;
  int64_t elements_ = 0;
  std::vector<Block> blocks_;
  std::vector<Row> rows_;
  std::vector<int64_t> first_tile_{0};
  std::vector<Tensor> copies_;
};

std::vector<Tensor> compose(StableListHandle base, StableListHandle deltas, const Tensor& coef) {
  const Arguments args(base, deltas);
  check_float32(coef.scalar_type());
  STD_TORCH_CHECK(coef.is_contiguous() && coef.dim() == 2 && coef.size(0) == args.num_vectors &&
                      coef.size(1) == args.num_blocks,
                  "expected contiguous coef of shape (N, B)");
  int64_t output = 0;
  for (const View& block : args.wide_views) output += block.numel * size_of(block.dtype);
  expect_outputs(output);
  std::vector<Tensor> composed;
  composed.reserve(args.num_blocks);
  for (int64_t b = 0; b < args.num_blocks; ++b) composed.push_back(empty_output(args.wide[b]));
  const bool stream = output >= kStream;
  const Kernels& kernel = kernels();
  for (int64_t first = 0; first < args.num_blocks;) {
    Blocks blocks(args, coef.const_data_ptr<float>(), first);
    for (Block& block : blocks.blocks()) {
      block.out = static_cast<char*>(composed[first++].mutable_data_ptr());
    }
    blocks.for_each_tile([&](const Block& block, const std::vector<Row>& rows, int64_t,
                             int64_t start, int64_t length) {
      const int64_t offset = start * size_of(block.dtype);
      kernel.compose_tile(block.wide + offset, block.out + offset, block.dtype, rows.data(),
                          rows.size(), length, stream);
    });
  }
  return composed;
}

Tensor coef_grad(StableListHandle grads, StableListHandle deltas, ScalarType dtype) {
  const Arguments args(grads, deltas);
  check_float32(dtype);
  std::vector<int64_t> block_tile{0};
  for (const View& grad : args.wide_views) {
    block_tile.push_back(block_tile.back() + tiles_of(grad.numel));
  }
  std::vector<float> partials(block_tile.back() * args.num_vectors);
  const Kernels& kernel = kernels();
  for (int64_t first = 0; first < args.num_blocks;) {
    const Blocks blocks(args, nullptr, first);
    float* results = partials.data() + block_tile[first] * args.num_vectors;
    blocks.for_each_tile([&](const Block& block, const std::vector<Row>& rows, int64_t tile,
                             int64_t start, int64_t length) {
      kernel.dot_tile(block.wide + start * size_of(block.dtype), block.dtype, rows.data(),
                      rows.size(), length, results + tile * args.num_vectors);
    });
    first = blocks.end();
  }
  return sum_tiles(args.wide[0], partials, block_tile, args.num_vectors);
}

}  // namespace
}  // namespace atlas

STABLE_TORCH_LIBRARY_IMPL(atlas_kernels_cpp, CPU, m) {
  m.impl("compose", TORCH_BOX(&atlas::compose));
  m.impl("coef_grad", TORCH_BOX(&atlas::coef_grad));
}
