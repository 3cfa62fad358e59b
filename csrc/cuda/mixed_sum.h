// The launchers of cuda/mixed_sum.cu: plain C, every result is a cudaError_t.
#pragma once

#include <cstdint>

#include "../mixed_sum.h"

extern "C" {

// Pointers are device pointers to dense tensors in one memory order.
struct NascompileMixedSum {
  nascompile::Type type;
  int count;
  int64_t numel;
  const void* inputs[nascompile::kMixedSumLimit];
  const void* weights;  // fp32, or fp64 for fp64
  void* out;
};

struct NascompileMixedSumBackward {
  nascompile::Type type;
  int count;
  int64_t numel;
  const void* grad;
  const void* inputs[nascompile::kMixedSumLimit];  // read only where `dots` is there
  const void* weights;
  void* products[nascompile::kMixedSumLimit];  // null where not needed
  void* partials;                              // room for nascompile_mixed_sum_partials(numel) * count sums
  void* dots;                                  // count sums, or null where not needed; type of the weights
};

int64_t nascompile_mixed_sum_partials(int64_t numel);
int nascompile_mixed_sum(const NascompileMixedSum* call, void* stream);
int nascompile_mixed_sum_backward(const NascompileMixedSumBackward* call, void* stream);
const char* nascompile_cuda_error(int error);

}
