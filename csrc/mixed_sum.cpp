// The border of the mixed sum: checks arguments, allocates results, and hands plain structs to the kernels.
#include "mixed_sum.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/isa.h"
#include "ops.h"
#include "tensors.h"

namespace nascompile {

using Tensors = std::vector<Tensor>;

// blocks per task: 16 Ki elements are worth waking a thread for
constexpr int64_t kGrain = 16;

void check_weights(const Tensor& weights, size_t count, Type type) {
  STD_TORCH_CHECK(count >= 1 && count <= kMixedSumLimit, "mixed_sum: 1 to 16 tensors are needed, there are ", count);
  STD_TORCH_CHECK(
      weights.dim() == 1 && weights.size(0) == static_cast<int64_t>(count),
      "mixed_sum: weights must be a vector of ",
      count,
      " entries");
  STD_TORCH_CHECK(
      type_of(weights) == (type == Type::fp64 ? Type::fp64 : Type::fp32),
      "mixed_sum: weights must be fp32, or fp64 where the tensors are");
}

void check_like(const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(same_shape(tensor, first), "mixed_sum: all tensors must have one shape");
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), "mixed_sum: all tensors must have one type");
  STD_TORCH_CHECK(tensor.device() == first.device(), "mixed_sum: all tensors must be on one device");
}

static void read_weights(const Tensor& weights, double* to) {
  const bool is_double = weights.scalar_type() == ScalarType::Double;
  const int64_t stride = weights.stride(0);
  for (int64_t k = 0; k < weights.size(0); ++k) {
    to[k] = is_double ? static_cast<const double*>(weights.const_data_ptr())[k * stride]
                      : static_cast<const float*>(weights.const_data_ptr())[k * stride];
  }
}

Tensor mixed_sum_cpu(const Tensors& inputs, const Tensor& weights) {
  STD_TORCH_CHECK(!inputs.empty(), "mixed_sum: there are no inputs");
  MixedSum call{};
  call.type = type_of(inputs[0]);
  check_weights(weights, inputs.size(), call.type);
  Tensor out = torch::stable::empty_like(inputs[0]);
  MemoryOrder memory(out);
  call.count = static_cast<int>(inputs.size());
  call.numel = out.numel();
  call.order = memory.order();
  call.out = out.mutable_data_ptr();
  for (int k = 0; k < call.count; ++k) {
    check_like(inputs[k], inputs[0]);
    call.inputs[k] = memory.source(inputs[k]);
  }
  read_weights(weights, call.weights);
  const auto kernel = NASCOMPILE_PICK(mixed_sum);
  torch::stable::parallel_for(
      0, blocks_of(call.numel), kGrain, [&](int64_t first, int64_t last) { kernel(call, first, last); });
  return out;
}

std::tuple<Tensors, Tensor> mixed_sum_backward_cpu(
    const Tensor& grad,
    const Tensors& inputs,
    const Tensor& weights,
    const std::vector<bool>& needs_input,
    bool needs_weights) {
  MixedSumBackward call{};
  call.type = type_of(grad);
  check_weights(weights, needs_input.size(), call.type);
  STD_TORCH_CHECK(!needs_weights || inputs.size() == needs_input.size(), "mixed_sum_backward: one tensor per weight");
  call.count = static_cast<int>(needs_input.size());
  call.numel = grad.numel();
  Tensors products;
  for (int k = 0; k < call.count; ++k) {
    if (needs_input[k]) {
      call.products[k] = products.emplace_back(torch::stable::empty_like(grad)).mutable_data_ptr();
    }
  }
  // dots are taken in the memory order of the products, or of the gradient made dense
  const Tensor dense = products.empty() ? torch::stable::empty_like(grad) : products[0];
  MemoryOrder memory(dense);
  call.order = memory.order();
  call.grad = memory.source(grad);
  read_weights(weights, call.weights);
  std::vector<double> partials;
  if (needs_weights) {
    for (int k = 0; k < call.count; ++k) {
      check_like(inputs[k], grad);
      call.inputs[k] = memory.source(inputs[k]);
    }
    partials.resize(blocks_of(call.numel) * call.count);
    call.partials = partials.data();
  }
  const auto kernel = NASCOMPILE_PICK(mixed_sum_backward);
  torch::stable::parallel_for(
      0, blocks_of(call.numel), kGrain, [&](int64_t first, int64_t last) { kernel(call, first, last); });

  Tensor dots = torch::stable::new_empty(weights, {needs_weights ? call.count : 0});
  for (int k = 0; needs_weights && k < call.count; ++k) {
    double sum = 0;
    for (int64_t block = 0; block < blocks_of(call.numel); ++block) {
      sum += partials[block * call.count + k];
    }
    if (call.type == Type::fp64) {
      static_cast<double*>(dots.mutable_data_ptr())[k] = sum;
    } else {
      static_cast<float*>(dots.mutable_data_ptr())[k] = static_cast<float>(sum);
    }
  }
  return {products, dots};
}

}  // namespace nascompile
