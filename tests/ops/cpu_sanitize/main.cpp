// Runs the CPU kernels on heap blocks of exactly the bytes they may touch, aligned and not, for a
// sanitizer to watch. ATLAS_CAPABILITY is the instruction set of the kernels it is linked to.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../../csrc/cpu/kernels.h"

namespace {

// `size` zero bytes, `shift` bytes into a heap block that ends with them.
class Bytes {
 public:
  Bytes(int64_t size, int64_t shift)
      : block_(static_cast<char*>(std::malloc(size + shift))), data_(block_ + shift) {
    std::memset(block_, 0, size + shift);
  }
  Bytes(const Bytes&) = delete;
  ~Bytes() { std::free(block_); }
  char* data() { return data_; }

 private:
  char* block_;
  char* data_;
};

}  // namespace

int main() {
  using namespace atlas;
  const Kernels& kernels = atlas::ATLAS_CAPABILITY::kernels;
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  const int64_t lengths[] = {0, 1, 15, 16, 17, 333, 4095, 4096};
  int64_t runs = 0;
  for (DType wide : dtypes) {
    for (DType dtype : dtypes) {
      for (int64_t length : lengths) {
        for (int64_t num_rows : {0, 1, 3, 8, 21}) {
          for (int64_t shift : {0, 2, 16}) {
            Bytes base(length * size_of(wide), shift), out(length * size_of(wide), shift);
            Bytes row(length * size_of(dtype), shift), result(4 * num_rows, 0);
            std::vector<Row> rows;
            for (int64_t i = 0; i < num_rows; ++i) {
              rows.push_back({row.data(), 0.5f, dtype, i});
            }
            for (bool stream : {false, true}) {
              kernels.compose_tile(base.data(), out.data(), wide, rows.data(), num_rows, length,
                                   stream);
            }
            kernels.dot_tile(base.data(), wide, rows.data(), num_rows, length,
                             reinterpret_cast<float*>(result.data()));
            ++runs;
          }
        }
      }
    }
  }
  for (DType wide : dtypes) {
    for (int64_t bits : {1, 2, 3, 4, 8}) {
      for (int64_t length : {int64_t{0}, unit_of(bits), 5 * unit_of(bits), kTile}) {
        for (int64_t num_rows : {0, 1, 21}) {
          for (int64_t shift : {0, 4}) {
            Bytes base(length * size_of(wide), shift), out(length * size_of(wide), shift);
            Bytes words(num_rows * length * bits / 8, shift);
            Bytes scales(num_rows * length / kGroup * 2, shift);
            Bytes coef(4 * num_rows, 0), result(4 * num_rows, 0);
            const PackedRows rows{reinterpret_cast<const uint32_t*>(words.data()),
                                  reinterpret_cast<const uint16_t*>(scales.data()), bits, num_rows};
            for (bool stream : {false, true}) {
              kernels.packed_compose_tile(base.data(), out.data(), wide, rows,
                                          reinterpret_cast<const float*>(coef.data()), length,
                                          stream);
            }
            kernels.packed_dot_tile(base.data(), wide, rows, length,
                                    reinterpret_cast<float*>(result.data()));
            ++runs;
          }
        }
      }
    }
  }
  // Floating point, then packed.
  const int64_t kinds[] = {0, 0, 0, 1, 2, 3, 4, 8};
  for (int64_t kind = 0; kind < 8; ++kind) {
    const int64_t bits = kinds[kind];
    const DType dtype = dtypes[kind % 3];
    const int64_t unit = bits == 0 ? kLanes : unit_of(bits);
    for (int64_t length : {int64_t{0}, unit, 5 * unit, kTile}) {
      for (int64_t num_rows : {0, 1, 3}) {
        for (int64_t groups : {int64_t{1}, int64_t{5}, kTile}) {
          const int64_t item_bits = bits == 0 ? 8 * size_of(dtype) : bits;
          Bytes base(length * size_of(dtype), 0), out(length * size_of(dtype), 0);
          Bytes items(num_rows * length * item_bits / 8, 4);
          Bytes scales(num_rows * length / kGroup * 2, 4);
          Bytes coef(4 * num_rows * groups, 0), sums(4 * num_rows * kTile, 0);
          const StoredRows rows{items.data(), reinterpret_cast<const uint16_t*>(scales.data()),
                                bits, dtype, num_rows};
          const GroupedCoef its{reinterpret_cast<const float*>(coef.data()), groups, groups};
          kernels.group_compose_tile(base.data(), out.data(), dtype, rows, its, 77u, length);
          kernels.group_dot_tile(base.data(), dtype, rows, 0, num_rows, 77u, length,
                                 reinterpret_cast<float*>(sums.data()));
          ++runs;
        }
      }
    }
  }
  kernels.fence();
  std::printf("%lld runs\n", static_cast<long long>(runs));
}
