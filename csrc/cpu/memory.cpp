#include "memory.h"

#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace atlas {
namespace {

// Bytes. Smaller tensors come from PyTorch, whose allocator does not return them to the system.
constexpr int64_t kLarge = 1 << 20;
constexpr int64_t kHugePage = 1 << 21;
constexpr int64_t kPage = 1 << 12;

void* allocate(int64_t bytes) {
  void* data = std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) / kHugePage * kHugePage);
  STD_TORCH_CHECK(data != nullptr, "out of memory: cannot allocate ", bytes, " bytes");
#if defined(__linux__)
  // Advice only: without huge pages it fails, and nothing is lost. It ends at the last whole page,
  // lest a huge page back the slack.
  madvise(data, bytes / kPage * kPage, MADV_HUGEPAGE);
#endif
  return data;
}

class Pool {
 public:
  void expect(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    if (idle_bytes_ > limit_) release();
  }

  void* take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = idle_.find(bytes);
    if (found == idle_.end()) {
      release();  // first, so that idle memory never adds to the peak
      return allocate(bytes);
    }
    void* data = found->second;
    idle_.erase(found);
    idle_bytes_ -= bytes;
    return data;
  }

  void give_back(void* data, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_bytes_ + bytes > limit_) {
      std::free(data);
      return;
    }
    idle_.emplace(bytes, data);
    idle_bytes_ += bytes;
  }

 private:
  void release() {
    for (const auto& entry : idle_) std::free(entry.second);
    idle_.clear();
    idle_bytes_ = 0;
  }

  std::mutex mutex_;
  std::unordered_multimap<int64_t, void*> idle_;
  int64_t idle_bytes_ = 0;
  int64_t limit_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

}  // namespace

void expect_outputs(int64_t bytes) { pool().expect(bytes); }

Tensor empty_output(TensorRef like) {
  const int64_t bytes = like.numel() * size_of(like.dtype<DType>());
  const IntHeaderOnlyArrayRef sizes = like.sizes();
  if (bytes < kLarge) return new_empty(like, sizes, like.dtype_code());
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  const auto give_back = [](void* data, void* size) {
    pool().give_back(data, reinterpret_cast<intptr_t>(size));
  };
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      pool().take(bytes), sizes.size(), sizes.data(), strides.data(), 0, like.dtype_code(),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0, give_back,
      reinterpret_cast<void*>(bytes)));
  return Tensor(handle);
}

}  // namespace atlas
