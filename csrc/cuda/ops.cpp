// The operators of the `atlas_kernels_cuda` namespace: checks, memory and streams around the
// kernels. Schemas and fakes are in `ops/schema.py`.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace {

using atlas::TensorList;
using atlas::TensorRef;
using atlas_kernels::Bank;
using atlas_kernels::Chunks;
using atlas_kernels::Dtype;
using atlas_kernels::Groups;
using atlas_kernels::List;
using atlas_kernels::Operand;
using atlas_kernels::PackedBank;
using atlas_kernels::Tiling;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

void check_device(const Tensor& tensor, int32_t device, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name,
                  " must be on cuda:", device, " like the other tensors");
}

void check_table(const Tensor& table, ScalarType dtype, int32_t device, const char* name) {
  check_device(table, device, name);
  STD_TORCH_CHECK(table.scalar_type() == dtype && table.dim() == 1 && table.is_contiguous(), name,
                  " must be a table as atlas_kernels.ops.layout makes it");
}

void check_arena(const Tensor& arena, int32_t device, const char* name) {
  check_device(arena, device, name);
  STD_TORCH_CHECK(arena.dim() == 1 && arena.is_contiguous(), name,
                  " must be one contiguous dimension");
}

void check_result(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float, "the cuda backend sums in float32");
}

// The coefficients as the kernels read them: [N, B], or with three dimensions [N, B, K].
Tensor check_coef(const Tensor& coef, int32_t device, int64_t dimensions = 2) {
  check_device(coef, device, "coef");
  STD_TORCH_CHECK(coef.scalar_type() == ScalarType::Float && coef.dim() == dimensions,
                  "coef must be float32 [N, B], of groups [N, B, K]");
  return torch::stable::contiguous(coef);
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

const int32_t* integers(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// What both directions of the arena form take, in the order of the schema.
struct ArenaArguments {
  const Tensor& source;  // base, or gradient
  const Tensor& deltas;
  const std::optional<Tensor>& scales;
  int64_t bits;
  const Tensor& tile_block;
  const Tensor& tile_offset;
  int64_t num_blocks;
  int64_t num_vectors;
  int32_t device;
};

Tiling tiling_of(const ArenaArguments& arena) {
  check_table(arena.tile_offset, ScalarType::Long, arena.device, "tile_offset");
  check_table(arena.tile_block, ScalarType::Int, arena.device, "tile_block");
  const int64_t num_tiles = arena.tile_offset.numel() - 1;
  STD_TORCH_CHECK(arena.tile_block.numel() == num_tiles,
                  "tile_offset must have one entry more than tile_block");
  return {integers(arena.tile_block),
          static_cast<const int64_t*>(arena.tile_offset.const_data_ptr()), num_tiles,
          arena.num_blocks, arena.num_vectors};
}

Operand operand_of(const Tensor& tensor, int32_t device, const char* name) {
  check_arena(tensor, device, name);
  return {tensor.const_data_ptr(), dtype_of(tensor, name)};
}

// The tensor, or a copy of it that starts at a multiple of 16 bytes, as fresh memory does.
Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

// Calls run(bank) with the arena as the kernels take it.
template <typename Run>
void with_bank(const ArenaArguments& arena, const Run& run) {
  const int64_t elements = arena.num_vectors * arena.source.numel();
  if (!arena.scales) {
    const Operand deltas = operand_of(arena.deltas, arena.device, "deltas");
    STD_TORCH_CHECK(arena.bits == 0 && arena.deltas.numel() == elements,
                    "deltas must hold num_vectors arenas");
    const Operand source = operand_of(arena.source, arena.device, "the base or gradient");
    return run(Bank{tiling_of(arena), source, deltas});
  }
  const Tensor source = aligned(arena.source);
  const Tensor words = aligned(arena.deltas);
  const Tensor& scales = *arena.scales;
  const int64_t bits = arena.bits;
  check_arena(words, arena.device, "words");
  check_arena(scales, arena.device, "scales");
  STD_TORCH_CHECK(bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8,
                  "bits must be 1, 2, 3, 4 or 8");
  STD_TORCH_CHECK(
      words.scalar_type() == ScalarType::Int && scales.scalar_type() == ScalarType::BFloat16,
      "words must be int32 and scales bfloat16");
  STD_TORCH_CHECK(words.numel() * 32 == elements * bits && scales.numel() * 128 == elements,
                  "words and scales must hold num_vectors arenas");
  run(PackedBank{tiling_of(arena), operand_of(source, arena.device, "the base or gradient"),
                 static_cast<const uint32_t*>(words.const_data_ptr()),
                 static_cast<const uint16_t*>(scales.const_data_ptr()), static_cast<int>(bits)});
}

Groups groups_of(const Tensor& tile_key, int64_t num_groups, const Tiling& tiling, int32_t device) {
  check_table(tile_key, ScalarType::Int, device, "tile_key");
  STD_TORCH_CHECK(tile_key.numel() == tiling.num_tiles, "tile_key must have one entry per tile");
  STD_TORCH_CHECK(0 < num_groups && num_groups <= atlas_kernels::kTile,
                  "there must be 1 to 4096 groups");
  return {integers(tile_key), static_cast<int>(num_groups)};
}

Tensor arena_compose(const Tensor& base, const Tensor& deltas, const std::optional<Tensor>& scales,
                     int64_t bits, const Tensor& tile_block, const Tensor& tile_offset,
                     const Tensor& /*block_tile*/, const Tensor& /*chunk_tile*/,
                     const Tensor& /*block_chunk*/, const std::optional<Tensor>& tile_key,
                     const Tensor& coef) {
  const int32_t device = base.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor factors = check_coef(coef, device, tile_key ? 3 : 2);
  Tensor composed = torch::stable::empty_like(base);
  void* target = composed.mutable_data_ptr();
  with_bank({base, deltas, scales, bits, tile_block, tile_offset, factors.size(1), factors.size(0),
             device},
            [&](const auto& bank) {
              const cudaStream_t stream = current_stream(device);
              if (tile_key) {
                const Groups groups = groups_of(*tile_key, factors.size(2), bank, device);
                STD_CUDA_CHECK(
                    atlas_kernels::arena_compose(bank, groups, floats(factors), target, stream));
              } else {
                STD_CUDA_CHECK(atlas_kernels::arena_compose(bank, floats(factors), target, stream));
              }
            });
  return composed;
}

Tensor arena_coef_grad(const Tensor& grad, const Tensor& deltas,
                       const std::optional<Tensor>& scales, int64_t bits, const Tensor& tile_block,
                       const Tensor& tile_offset, const Tensor& block_tile,
                       const Tensor& chunk_tile, const Tensor& block_chunk,
                       const std::optional<Tensor>& tile_key, int64_t num_vectors,
                       int64_t num_groups, ScalarType dtype) {
  check_result(dtype);
  const int32_t device = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_table(block_tile, ScalarType::Int, device, "block_tile");
  const int64_t num_blocks = block_tile.numel() - 1;
  const auto new_floats = [&](std::vector<int64_t> sizes) {
    return torch::stable::new_empty(grad, sizes, ScalarType::Float);
  };
  std::optional<Tensor> result;
  with_bank({grad, deltas, scales, bits, tile_block, tile_offset, num_blocks, num_vectors, device},
            [&](const auto& bank) {
              const cudaStream_t stream = current_stream(device);
              if (tile_key) {
                check_table(chunk_tile, ScalarType::Int, device, "chunk_tile");
                check_table(block_chunk, ScalarType::Int, device, "block_chunk");
                STD_TORCH_CHECK(block_chunk.numel() == block_tile.numel(),
                                "block_chunk must have one entry per block, and one more");
                const Groups groups = groups_of(*tile_key, num_groups, bank, device);
                const Chunks chunks = {integers(chunk_tile), integers(block_chunk),
                                       chunk_tile.numel() - 1};
                const Tensor partials = new_floats({chunks.num_chunks, num_vectors, num_groups});
                result = new_floats({num_vectors, num_blocks, num_groups});
                STD_CUDA_CHECK(atlas_kernels::arena_coef_grad(
                    bank, groups, chunks, floats(partials), floats(*result), stream));
              } else {
                const Tensor partials = new_floats({num_vectors, bank.num_tiles});
                result = new_floats({num_vectors, num_blocks});
                STD_CUDA_CHECK(atlas_kernels::arena_coef_grad(
                    bank, integers(block_tile), floats(partials), floats(*result), stream));
              }
            });
  return *result;
}

// The operands of a list-form call. Copies of non-contiguous tensors live as long as it does:
// memory that is freed afterwards is reused in the stream's order.
class Operands {
 public:
  Operands(const TensorList& source, const TensorList& deltas)
      : device_(source[0].device_index()), num_vectors_(deltas.size() / source.size()) {
    STD_TORCH_CHECK(deltas.size() == source.size() * num_vectors_,
                    "deltas must hold one tensor per vector and block");
    source_.reserve(source.size());
    deltas_.reserve(deltas.size());
    std::vector<IntHeaderOnlyArrayRef> shapes;
    for (int64_t b = 0; b < source.size(); ++b) {
      numel_.push_back(source[b].numel());
      shapes.push_back(source[b].sizes());
      source_.push_back(operand(source[b]));
    }
    // In the order of the list, in which tensors are likely to lie in memory.
    for (int64_t index = 0; index < deltas.size(); ++index) {
      const TensorRef delta = deltas[index];
      const IntHeaderOnlyArrayRef shape = delta.sizes();
      const int64_t b = index % source.size();
      STD_TORCH_CHECK(shape.equals(shapes[b]) || atlas::is_absent(shape),
                      "a delta must have the shape of its block");
      const Operand found = operand(delta);
      deltas_.push_back(
          numel_[b] == 0 || atlas::is_absent(shape) ? Operand{nullptr, Dtype::kFloat32} : found);
    }
  }

  List list() const {
    return {source_.data(), numel_.data(), deltas_.data(), static_cast<int64_t>(source_.size()),
            num_vectors_};
  }

 private:
  Operand operand(TensorRef tensor) {
    static const int32_t cuda = aoti_torch_device_type_cuda();
    STD_TORCH_CHECK(tensor.device_type() == cuda && tensor.device_index() == device_,
                    "all tensors must be on cuda:", device_);
    const Dtype dtype = tensor.dtype<Dtype>();
    if (tensor.is_contiguous()) return {tensor.data(), dtype};
    copies_.push_back(tensor.contiguous());
    return {copies_.back().const_data_ptr(), dtype};
  }

  int32_t device_;
  int64_t num_vectors_;
  std::vector<Operand> source_;
  std::vector<int64_t> numel_;
  std::vector<Operand> deltas_;
  std::vector<Tensor> copies_;
};

std::vector<Tensor> compose(StableListHandle base_list, StableListHandle delta_list,
                            const Tensor& coef) {
  const TensorList base(base_list);
  const TensorList deltas(delta_list);
  STD_TORCH_CHECK(base.size() > 0, "compose takes at least one block");
  const int32_t device = base[0].device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor factors = check_coef(coef, device);
  STD_TORCH_CHECK(factors.size(1) == base.size() && factors.size(0) * base.size() == deltas.size(),
                  "coef must have one row per vector and one column per block");
  const Operands operands(base, deltas);

  std::vector<Tensor> composed;
  std::vector<void*> targets;
  composed.reserve(base.size());
  targets.reserve(base.size());
  for (int64_t b = 0; b < base.size(); ++b) {
    composed.push_back(atlas::new_empty(base[b], base[b].sizes(), base[b].dtype_code()));
    targets.push_back(composed.back().mutable_data_ptr());
  }
  const List list = operands.list();
  std::optional<Tensor> scratch;
  if (const int64_t count = atlas_kernels::compose_scratch(list); count > 0) {
    scratch = atlas::new_empty(base[0], {count}, aoti_torch_dtype_float32());
  }
  STD_CUDA_CHECK(atlas_kernels::compose(list, floats(factors), targets.data(),
                                        scratch ? floats(*scratch) : nullptr,
                                        current_stream(device)));
  return composed;
}

Tensor coef_grad(StableListHandle grad_list, StableListHandle delta_list, ScalarType dtype) {
  const TensorList grads(grad_list);
  const TensorList deltas(delta_list);
  check_result(dtype);
  STD_TORCH_CHECK(grads.size() > 0, "coef_grad takes at least one block");
  const int32_t device = grads[0].device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Operands operands(grads, deltas);
  const List list = operands.list();
  const int32_t float32 = aoti_torch_dtype_float32();
  const Tensor partials =
      atlas::new_empty(grads[0], {atlas_kernels::coef_grad_scratch(list)}, float32);
  Tensor result = atlas::new_empty(grads[0], {list.num_vectors, list.num_blocks}, float32);
  STD_CUDA_CHECK(
      atlas_kernels::coef_grad(list, floats(partials), floats(result), current_stream(device)));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(atlas_kernels_cuda, CUDA, m) {
  m.impl("compose", TORCH_BOX(&compose));
  m.impl("coef_grad", TORCH_BOX(&coef_grad));
  m.impl("arena_compose", TORCH_BOX(&arena_compose));
  m.impl("arena_coef_grad", TORCH_BOX(&arena_coef_grad));
}
