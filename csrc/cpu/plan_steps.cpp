// From the kind of a step to its kernel. Compiled once per instruction set.
#include "isa.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

template <typename T>
const T& as(const int64_t* fields) {
  return *reinterpret_cast<const T*>(fields);
}

}  // namespace

void plan_step(int64_t kind, const int64_t* fields, const plan::Image& image) {
  switch (kind) {
    case plan::kLoad:
      return plan_load(as<plan::Load>(fields), image);
    case plan::kStore:
      return plan_store(as<plan::Store>(fields), image);
    case plan::kStage:
      return plan_stage(as<plan::Stage>(fields), image);
    case plan::kConvolve:
      return plan_convolve(as<plan::Convolve>(fields), image);
    case plan::kConvolveBackward:
      return plan_convolve_backward(as<plan::ConvolveBackward>(fields), image);
    case plan::kPool:
      return plan_pool(as<plan::Pool>(fields), image);
    case plan::kPoolBackward:
      return plan_pool_backward(as<plan::PoolBackward>(fields), image);
    case plan::kCombine:
      return plan_combine(as<plan::Combine>(fields), image);
    case plan::kReduce:
      return plan_reduce(as<plan::Reduce>(fields), image);
    case plan::kUnstage:
      return plan_unstage(as<plan::Unstage>(fields), image);
    case plan::kMask:
      return plan_mask(as<plan::Mask>(fields), image);
    case plan::kPick:
      return plan_pick(as<plan::Pick>(fields), image);
    case plan::kGate:
      return plan_gate(as<plan::Gate>(fields), image);
    case plan::kGateGradient:
      return plan_gate_gradient(as<plan::GateGradient>(fields), image);
  }
}

int64_t plan_tile(int64_t kind, const int64_t* fields, const int64_t* program) {
  switch (kind) {
    case plan::kConvolve:
      return plan_convolve_tile(as<plan::Convolve>(fields), program);
    case plan::kConvolveBackward:
      return plan_convolve_backward_tile(as<plan::ConvolveBackward>(fields), program);
    case plan::kPool:
      return plan_pool_tile(as<plan::Pool>(fields));
    case plan::kPoolBackward:
      return plan_pool_backward_tile(as<plan::PoolBackward>(fields));
    default:
      return 0;
  }
}

}  // namespace nascompile::CPU_CAPABILITY
