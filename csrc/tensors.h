// Tensor arguments, read with as few calls into libtorch as possible: the list form has thousands.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace atlas {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

// A borrowed tensor.
class TensorRef {
 public:
  explicit TensorRef(AtenTensorHandle handle) : handle_(handle) {}
  TensorRef(const Tensor& tensor) : handle_(tensor.get()) {}

  AtenTensorHandle get() const { return handle_; }

  int64_t numel() const {
    int64_t numel;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle_, &numel));
    return numel;
  }

  IntHeaderOnlyArrayRef sizes() const {
    int64_t dim;
    int64_t* sizes;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes));
    return {sizes, static_cast<size_t>(dim)};
  }

  bool is_contiguous() const {
    bool contiguous;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &contiguous));
    return contiguous;
  }

  // libtorch's number for the dtype.
  int32_t dtype_code() const {
    int32_t code;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &code));
    return code;
  }

  // `DType` counts float32, bfloat16, float16.
  template <class DType>
  DType dtype() const {
    static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                    aoti_torch_dtype_float16()};
    const int32_t code = dtype_code();
    for (int32_t k = 0; k < 3; ++k) {
      if (code == codes[k]) return DType(k);
    }
    STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }

  const char* data() const {
    const void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return static_cast<const char*>(data);
  }

  int32_t device_index() const {
    int32_t index;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle_, &index));
    return index;
  }

  int32_t device_type() const {
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle_, &type));
    return type;
  }

  Tensor contiguous() const {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &handle));
    return torch::stable::contiguous(Tensor(handle));
  }

 private:
  AtenTensorHandle handle_;
};

// A Tensor[] argument, owned; std::vector<Tensor> would add a shared_ptr to every tensor.
class TensorList {
 public:
  explicit TensorList(StableListHandle list) {
    size_t size;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.resize(size);
    for (size_t k = 0; k < size; ++k) {
      StableIValue item;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, k, &item));
      handles_[k] = torch::stable::detail::to<AtenTensorHandle>(item);
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }

  int64_t size() const { return handles_.size(); }
  TensorRef operator[](int64_t k) const { return TensorRef(handles_[k]); }

 private:
  std::vector<AtenTensorHandle> handles_;
};

// Whether this is the shape of ABSENT in atlas_kernels/ops/schema.py.
inline bool is_absent(IntHeaderOnlyArrayRef shape) {
  return shape.size() == 8 &&
         std::all_of(shape.begin(), shape.end(), [](int64_t n) { return n == 0; });
}

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor new_empty(TensorRef like, IntHeaderOnlyArrayRef sizes, int32_t dtype_code) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
      like.get(), sizes.data(), sizes.size(), &dtype_code, nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

}  // namespace atlas
