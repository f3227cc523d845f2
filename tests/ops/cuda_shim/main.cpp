// Runs cases from a file through the host functions of kernels.h, on the CPU.
//
//   main CASES RESULTS forward|reverse
//
// A case is a sequence of 64-bit integers and raw arrays, as `Case` in test_cuda.py writes it.
// Every array has a heap block of exactly its size, so that AddressSanitizer sees each step beyond
// it.

#include <cstring>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "shim.h"

namespace {

using namespace atlas_kernels;

enum Op : int64_t {
  kArenaCompose,
  kArenaCoefGrad,
  kCompose,
  kCoefGrad,
  kPackedCompose,
  kPackedCoefGrad,
  kGroupCompose,
  kGroupCoefGrad
};

class Array {
 public:
  // `skew`: bytes that the array starts after a 16-byte boundary.
  Array(size_t size, size_t skew) : memory_(new char[size + skew]), skew_(skew), size_(size) {
    std::memset(memory_.get(), 0xff, size + skew);  // NaN
  }
  char* data() const { return memory_.get() + skew_; }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<char[]> memory_;
  size_t skew_;
  size_t size_;
};

size_t bytes(int64_t count, Dtype dtype) { return count * (dtype == Dtype::kFloat32 ? 4 : 2); }

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {}
  bool done() { return file_.peek() == EOF; }
  int64_t number() {
    int64_t value;
    file_.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
  }
  Array array(size_t size, size_t skew = 0) {
    Array result(size, skew);
    file_.read(result.data(), size);
    return result;
  }

 private:
  std::ifstream file_;
};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::cerr << "launch failed: " << error << "\n";
  std::exit(4);
}

float* floats(const Array& array) { return reinterpret_cast<float*>(array.data()); }

const int32_t* integers(const Array& array) {
  return reinterpret_cast<const int32_t*>(array.data());
}

// The tables of a bank as they follow in the file.
struct Tables {
  Tables(Reader& in, int64_t tiles, int64_t blocks, int64_t vectors, int64_t groups = 1)
      : tile_block(in.array(4 * tiles)),
        tile_offset(in.array(8 * (tiles + 1))),
        block_tile(in.array(4 * (blocks + 1))),
        coef(in.array(4 * vectors * blocks * groups)),
        tiling{integers(tile_block), reinterpret_cast<const int64_t*>(tile_offset.data()), tiles,
               blocks, vectors} {}

  Array tile_block, tile_offset, block_tile, coef;
  Tiling tiling;
};

// `far`: how many elements, left unmapped, the arena has before the first tile.
void run_arena(Reader& in, std::ofstream& out, Op op) {
  const auto source_dtype = static_cast<Dtype>(in.number());
  const auto delta_dtype = static_cast<Dtype>(in.number());
  const int64_t numel = in.number(), tiles = in.number(), blocks = in.number();
  const int64_t vectors = in.number(), skew = in.number(), far = in.number();
  const Array source = in.array(bytes(numel, source_dtype), bytes(skew, source_dtype));
  const Array deltas = in.array(bytes(vectors * numel, delta_dtype), bytes(skew, delta_dtype));
  const Tables tables(in, tiles, blocks, vectors);

  const Bank bank = {tables.tiling,
                     {source.data() - bytes(far, source_dtype), source_dtype},
                     {deltas.data() - bytes(vectors * far, delta_dtype), delta_dtype}};
  if (op == kArenaCompose) {
    const Array composed(source.size(), bytes(skew, source_dtype));
    check(arena_compose(bank, floats(tables.coef), composed.data() - bytes(far, source_dtype),
                        nullptr));
    out.write(composed.data(), composed.size());
  } else {
    const Array partials(4 * vectors * tiles, 0), result(4 * vectors * blocks, 0);
    check(arena_coef_grad(bank, integers(tables.block_tile), floats(partials), floats(result),
                          nullptr));
    out.write(result.data(), result.size());
  }
}

void run_packed(Reader& in, std::ofstream& out, Op op) {
  const auto dtype = static_cast<Dtype>(in.number());
  const int64_t bits = in.number(), numel = in.number(), tiles = in.number();
  const int64_t blocks = in.number(), vectors = in.number(), far = in.number();
  const Array source = in.array(bytes(numel, dtype));
  const Array words = in.array(vectors * numel * bits / 8);
  const Array scales = in.array(vectors * numel / 64);
  const Tables tables(in, tiles, blocks, vectors);

  const PackedBank bank = {
      tables.tiling,
      {source.data() - bytes(far, dtype), dtype},
      reinterpret_cast<const uint32_t*>(words.data() - vectors * far * bits / 8),
      reinterpret_cast<const uint16_t*>(scales.data() - vectors * far / 64),
      static_cast<int>(bits)};
  if (op == kPackedCompose) {
    const Array composed(source.size(), 0);
    check(arena_compose(bank, floats(tables.coef), composed.data() - bytes(far, dtype), nullptr));
    out.write(composed.data(), composed.size());
  } else {
    const Array partials(4 * vectors * tiles, 0), result(4 * vectors * blocks, 0);
    check(arena_coef_grad(bank, integers(tables.block_tile), floats(partials), floats(result),
                          nullptr));
    out.write(result.data(), result.size());
  }
}

// Without bits, deltas of `delta_dtype`.
void run_groups(Reader& in, std::ofstream& out, Op op) {
  const auto dtype = static_cast<Dtype>(in.number());
  const auto delta_dtype = static_cast<Dtype>(in.number());
  const int64_t bits = in.number(), numel = in.number(), tiles = in.number();
  const int64_t blocks = in.number(), vectors = in.number(), chunks = in.number();
  const int64_t groups = in.number(), skew = in.number(), far = in.number();
  const auto stored = [&](int64_t elements) {
    return bits > 0 ? elements * bits / 8 : static_cast<int64_t>(bytes(elements, delta_dtype));
  };
  const Array source = in.array(bytes(numel, dtype), bytes(skew, dtype));
  const Array deltas = in.array(stored(vectors * numel), stored(skew));
  const Array scales = in.array(bits > 0 ? vectors * numel / 64 : 0);
  const Tables tables(in, tiles, blocks, vectors, groups);
  const Array tile_key = in.array(4 * tiles);
  const Array chunk_tile = in.array(4 * (chunks + 1)), block_chunk = in.array(4 * (blocks + 1));

  const Groups parted = {integers(tile_key), static_cast<int>(groups)};
  const Chunks parts = {integers(chunk_tile), integers(block_chunk), chunks};
  const auto run = [&](auto bank) {
    if (op == kGroupCompose) {
      const Array composed(source.size(), bytes(skew, dtype));
      check(arena_compose(bank, parted, floats(tables.coef), composed.data() - bytes(far, dtype),
                          nullptr));
      out.write(composed.data(), composed.size());
    } else {
      bank.tile_block = nullptr;
      const Array partials(4 * chunks * vectors * groups, 0);
      const Array result(4 * vectors * blocks * groups, 0);
      check(arena_coef_grad(bank, parted, parts, floats(partials), floats(result), nullptr));
      out.write(result.data(), result.size());
    }
  };
  const Operand operand = {source.data() - bytes(far, dtype), dtype};
  const char* first = deltas.data() - stored(vectors * far);
  if (bits > 0) {
    run(PackedBank{tables.tiling, operand, reinterpret_cast<const uint32_t*>(first),
                   reinterpret_cast<const uint16_t*>(scales.data() - vectors * far / 64),
                   static_cast<int>(bits)});
  } else {
    run(Bank{tables.tiling, operand, {first, delta_dtype}});
  }
}

void run_list(Reader& in, std::ofstream& out, Op op) {
  const int64_t blocks = in.number(), vectors = in.number(), far = in.number();
  cuda_shim::first_block = static_cast<unsigned>(far / kTile);
  std::vector<Array> arrays, targets;
  std::vector<Operand> operands;
  std::vector<int64_t> numel;
  std::vector<void*> target_data;
  for (int64_t k = 0; k < blocks * (vectors + 1); ++k) {
    const auto dtype = static_cast<Dtype>(in.number());
    const int64_t count = in.number(), skew = in.number();
    arrays.push_back(in.array(bytes(count, dtype), bytes(skew, dtype)));
    const void* data = arrays.back().data() - bytes(far, dtype);
    operands.push_back({count == 0 ? nullptr : data, dtype});
    if (k >= blocks) continue;
    numel.push_back(count + far);
    targets.emplace_back(bytes(count, dtype), bytes(skew, dtype));
    target_data.push_back(targets.back().data() - bytes(far, dtype));
  }
  const Array coef = in.array(4 * vectors * blocks);

  const List list = {operands.data(), numel.data(), operands.data() + blocks, blocks, vectors};
  if (op == kCompose) {
    const Array scratch(4 * compose_scratch(list), 0);
    check(compose(list, floats(coef), target_data.data(), floats(scratch), nullptr));
    for (const Array& target : targets) out.write(target.data(), target.size());
  } else {
    const Array partials(4 * coef_grad_scratch(list), 0), result(4 * vectors * blocks, 0);
    if (far > 0) std::memset(partials.data(), 0, partials.size());  // of the tiles that are skipped
    check(coef_grad(list, floats(partials), floats(result), nullptr));
    out.write(result.data(), result.size());
  }
  cuda_shim::first_block = 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  Reader in(argv[1]);
  std::ofstream out(argv[2], std::ios::binary);
  cuda_shim::reverse_order = std::string(argv[3]) == "reverse";
  while (!in.done()) {
    const auto op = static_cast<Op>(in.number());
    if (op == kArenaCompose || op == kArenaCoefGrad) {
      run_arena(in, out, op);
    } else if (op == kPackedCompose || op == kPackedCoefGrad) {
      run_packed(in, out, op);
    } else if (op == kGroupCompose || op == kGroupCoefGrad) {
      run_groups(in, out, op);
    } else {
      run_list(in, out, op);
    }
  }
  return 0;
}
