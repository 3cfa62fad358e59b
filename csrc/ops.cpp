// Every operator of nascompile: its schema, one line each, then one block of implementations per device.
// Fakes, autograd and the reference for other devices are registered by kernels/<kernel>.py.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(nascompile, m) {
  // clang-format off
  m.def("mixed_sum(Tensor[] inputs, Tensor weights) -> Tensor");
  m.def("mixed_sum_backward(Tensor grad, Tensor[] inputs, Tensor weights, bool[] needs_input, bool needs_weights) -> (Tensor[], Tensor)");
  // clang-format on
}

STABLE_TORCH_LIBRARY_IMPL(nascompile, CPU, m) {
  m.impl("mixed_sum", TORCH_BOX(&nascompile::mixed_sum_cpu));
  m.impl("mixed_sum_backward", TORCH_BOX(&nascompile::mixed_sum_backward_cpu));
}

#ifdef NASCOMPILE_CUDA
STABLE_TORCH_LIBRARY_IMPL(nascompile, CUDA, m) {
  m.impl("mixed_sum", TORCH_BOX(&nascompile::mixed_sum_cuda));
  m.impl("mixed_sum_backward", TORCH_BOX(&nascompile::mixed_sum_backward_cuda));
}
#endif
