// One implementation per device of every operator in ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

namespace nascompile {

using torch::stable::Tensor;

Tensor mixed_sum_cpu(const std::vector<Tensor>& inputs, const Tensor& weights);
Tensor mixed_sum_cuda(const std::vector<Tensor>& inputs, const Tensor& weights);

std::tuple<std::vector<Tensor>, Tensor> mixed_sum_backward_cpu(
    const Tensor& grad,
    const std::vector<Tensor>& inputs,
    const Tensor& weights,
    const std::vector<bool>& needs_input,
    bool needs_weights);
std::tuple<std::vector<Tensor>, Tensor> mixed_sum_backward_cuda(
    const Tensor& grad,
    const std::vector<Tensor>& inputs,
    const Tensor& weights,
    const std::vector<bool>& needs_input,
    bool needs_weights);

}  // namespace nascompile
