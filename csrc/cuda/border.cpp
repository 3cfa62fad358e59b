// The CUDA side of the border: dense tensors, the current stream, and the launchers' error codes as exceptions.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../ops.h"
#include "../tensors.h"
#include "mixed_sum.h"

// weak: the extension also loads beside a torch without CUDA, where no tensor ever gets here
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace nascompile {

using Tensors = std::vector<Tensor>;

static void* current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "nascompile: this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

static void check_launch(int error) {
  STD_TORCH_CHECK(error == 0, "nascompile: CUDA: ", nascompile_cuda_error(error));
}

// The tensor in the memory order of `like`: itself, or a copy. `copies` keeps copies alive until the launch; the stream
// and torch's allocator order their memory after that.
static const void* lay_out(const Tensor& tensor, const Tensor& like, Tensors& copies) {
  if (same_layout(tensor, like)) {
    return tensor.const_data_ptr();
  }
  Tensor& copy = copies.emplace_back(torch::stable::empty_like(like));
  torch::stable::copy_(copy, tensor);
  return copy.const_data_ptr();
}

Tensor mixed_sum_cuda(const Tensors& inputs, const Tensor& weights) {
  STD_TORCH_CHECK(!inputs.empty(), "mixed_sum: there are no inputs");
  const torch::stable::accelerator::DeviceGuard guard(inputs[0].get_device_index());
  NascompileMixedSum call{};
  call.type = type_of(inputs[0]);
  check_weights(weights, inputs.size(), call.type);
  Tensor out = torch::stable::empty_like(inputs[0]);
  call.count = static_cast<int>(inputs.size());
  call.numel = out.numel();
  if (call.numel == 0) {
    return out;
  }
  Tensors copies;
  for (int k = 0; k < call.count; ++k) {
    check_like(inputs[k], inputs[0]);
    call.inputs[k] = lay_out(inputs[k], out, copies);
  }
  const Tensor dense_weights = torch::stable::contiguous(weights);
  call.weights = dense_weights.const_data_ptr();
  call.out = out.mutable_data_ptr();
  check_launch(nascompile_mixed_sum(&call, current_stream(out)));
  return out;
}

std::tuple<Tensors, Tensor> mixed_sum_backward_cuda(
    const Tensor& grad,
    const Tensors& inputs,
    const Tensor& weights,
    const std::vector<bool>& needs_input,
    bool needs_weights) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  NascompileMixedSumBackward call{};
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
  if (call.numel == 0) {
    return {products, torch::stable::new_zeros(weights, {needs_weights ? call.count : 0})};
  }
  Tensor dots = torch::stable::new_empty(weights, {needs_weights ? call.count : 0});
  const Tensor dense = products.empty() ? torch::stable::empty_like(grad) : products[0];
  Tensors copies;
  Tensor partials = torch::stable::new_empty(
      weights, {needs_weights ? nascompile_mixed_sum_partials(call.numel) * call.count : 0});
  call.grad = lay_out(grad, dense, copies);
  if (needs_weights) {
    for (int k = 0; k < call.count; ++k) {
      check_like(inputs[k], grad);
      call.inputs[k] = lay_out(inputs[k], dense, copies);
    }
    call.partials = partials.mutable_data_ptr();
    call.dots = dots.mutable_data_ptr();
  }
  const Tensor dense_weights = torch::stable::contiguous(weights);
  call.weights = dense_weights.const_data_ptr();
  check_launch(nascompile_mixed_sum_backward(&call, current_stream(grad)));
  return {products, dots};
}

}  // namespace nascompile
