// What a program says about its tensors, held against them before anything is written. For plan.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "ops.h"
#include "plan.h"

namespace nascompile {
namespace {

using torch::headeronly::ScalarType;

// What the steps and barrier operations of a program say about its tensors, held against the tensors.
class TensorCheck {
 public:
  TensorCheck(const std::vector<Tensor>& tensors, const plan::Header& header) : tensors_(tensors), header_(header) {
    for (size_t k = 0; k < tensors.size(); ++k) {
      STD_TORCH_CHECK(tensors[k].is_cpu(), "run_plan: tensor ", k, " is not on the CPU");
    }
  }

  // a parameter, buffer or gradient; the program may leave it out
  void contiguous(int64_t number, ScalarType type = ScalarType::Float) const {
    if (number < 0) {
      return;
    }
    const Tensor& tensor = typed(number, type);
    STD_TORCH_CHECK(tensor.is_contiguous(), "run_plan: tensor ", number, " is not contiguous");
  }

  // what Load or Store goes over: `step` has the strides of an (n, c, h, w) tensor
  template <typename Step>
  void strided(const Step& step, const plan::Map& map) const {
    const Tensor& tensor = typed(step.tensor, ScalarType::Float);
    if (tensor.dim() != 4) {
      return;
    }
    const int64_t strides[] = {step.stride_n, step.stride_c, step.stride_h, step.stride_w};
    const int64_t sizes[] = {header_.images, tensor.size(1), map.height, map.width};
    for (int dim = 0; dim < 4; ++dim) {
      STD_TORCH_CHECK(
          tensor.size(dim) == sizes[dim] && (sizes[dim] <= 1 || tensor.stride(dim) == strides[dim]),
          "run_plan: tensor ",
          step.tensor,
          " has size ",
          tensor.size(dim),
          " and stride ",
          tensor.stride(dim),
          " in dimension ",
          dim,
          ", the program expects ",
          sizes[dim],
          " and ",
          strides[dim]);
    }
  }

 private:
  const Tensor& typed(int64_t number, ScalarType type) const {
    STD_TORCH_CHECK(
        number >= 0 && number < static_cast<int64_t>(tensors_.size()),
        "run_plan: the program uses tensor ",
        number,
        ", there are ",
        tensors_.size());
    STD_TORCH_CHECK(
        tensors_[number].scalar_type() == type,
        "run_plan: tensor ",
        number,
        type == ScalarType::Long ? " must be int64" : " must be fp32");
    return tensors_[number];
  }

  const std::vector<Tensor>& tensors_;
  const plan::Header& header_;
};

void check_barrier(int64_t kind, const int64_t* fields, const TensorCheck& check) {
  switch (kind) {
    case plan::kPackDepthwise:
      return check.contiguous(reinterpret_cast<const plan::PackDepthwise*>(fields)->tensor);
    case plan::kPackDense:
      return check.contiguous(reinterpret_cast<const plan::PackDense*>(fields)->tensor);
    case plan::kUnpackDepthwise:
      return check.contiguous(reinterpret_cast<const plan::UnpackDepthwise*>(fields)->tensor);
    case plan::kUnpackDense:
      return check.contiguous(reinterpret_cast<const plan::UnpackDense*>(fields)->tensor);
    case plan::kNormalise: {
      const auto& op = *reinterpret_cast<const plan::Normalise*>(fields);
      for (const int64_t number : {op.gamma, op.beta, op.running_mean, op.running_var}) {
        check.contiguous(number);
      }
      return check.contiguous(op.counter, ScalarType::Long);
    }
    case plan::kCoefficients:
      return check.contiguous(reinterpret_cast<const plan::Coefficients*>(fields)->decision);
    case plan::kNormaliseBackward: {
      const auto& op = *reinterpret_cast<const plan::NormaliseBackward*>(fields);
      for (const int64_t number : {op.decision, op.gamma, op.beta}) {
        check.contiguous(number);
      }
      return;
    }
    case plan::kDecisionGradient:
      return check.contiguous(reinterpret_cast<const plan::DecisionGradient*>(fields)->tensor);
    default:
      STD_TORCH_CHECK(false, "run_plan: there is no barrier operation of kind ", kind);
  }
}

void check_step(int64_t kind, const int64_t* fields, const TensorCheck& check) {
  STD_TORCH_CHECK(kind >= plan::kLoad && kind <= plan::kGateGradient, "run_plan: there is no step of kind ", kind);
  if (kind == plan::kLoad) {
    const auto& step = *reinterpret_cast<const plan::Load*>(fields);
    check.strided(step, step.target);
  } else if (kind == plan::kStore) {
    const auto& step = *reinterpret_cast<const plan::Store*>(fields);
    check.strided(step, step.source);
  }
}

}  // namespace
}  // namespace nascompile
