// From torch's tensors to the plain structs of the kernels, through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "mixed_sum.h"

namespace nascompile {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::fp32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::fp16;
    case ScalarType::Double:
      return Type::fp64;
    default:
      STD_TORCH_CHECK(false, "nascompile: a tensor of fp32, bf16, fp16 or fp64 is needed");
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes();
  const auto right = b.sizes();
  return std::equal(left.begin(), left.end(), right.begin(), right.end());
}

// Whether two tensors of one shape have every element at the same offset; the stride of a dimension of one is idle.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) {
      return false;
    }
  }
  return true;
}

// Raise where the weights or a tensor do not fit the first tensor; defined in mixed_sum.cpp.
void check_weights(const Tensor& weights, size_t count, Type type);
void check_like(const Tensor& tensor, const Tensor& first);

// The memory order of a dense result, and the strides of other tensors of its shape in that order.
class MemoryOrder {
 public:
  explicit MemoryOrder(const Tensor& result) : result_(result) {
    for (int64_t dim = 0; dim < result.dim(); ++dim) {
      if (result.size(dim) > 1) {
        dims_.push_back(dim);
      }
    }
    std::stable_sort(dims_.begin(), dims_.end(), [&](int64_t a, int64_t b) { return result.stride(a) > result.stride(b); });
    for (const int64_t dim : dims_) {
      sizes_.push_back(result.size(dim));
    }
    strides_.reserve(kMixedSumLimit + 1);
  }

  Order order() const {
    return {static_cast<int>(sizes_.size()), sizes_.data()};
  }

  // Valid as long as this object and the tensor; at most kMixedSumLimit + 1 of them.
  Source source(const Tensor& tensor) {
    if (same_layout(tensor, result_)) {
      return {tensor.const_data_ptr(), nullptr};
    }
    std::vector<int64_t>& strides = strides_.emplace_back();
    for (const int64_t dim : dims_) {
      strides.push_back(tensor.stride(dim));
    }
    return {tensor.const_data_ptr(), strides.data()};
  }

 private:
  const Tensor& result_;
  std::vector<int64_t> dims_;
  std::vector<int64_t> sizes_;
  std::vector<std::vector<int64_t>> strides_;
};

}  // namespace nascompile
