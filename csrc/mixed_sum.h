// What the mixed-sum kernels are given: raw pointers and numbers, no torch types. kernels/mixed_sum.py has the formulas.
#pragma once

#include <cstdint>

namespace nascompile {

constexpr int kMixedSumLimit = 16;  // tensors per call; `LIMIT` in kernels/mixed_sum.py

enum class Type : int { fp32, bf16, fp16, fp64 };

// One tensor, read in the memory order of the result. `strides` is null where it lies in memory exactly like the result;
// elsewhere it holds the strides, in elements, of the dimensions of `Order`.
struct Source {
  const void* data;
  const int64_t* strides;
};

// The dimensions of the result from the slowest to the fastest one in memory.
struct Order {
  int dims;
  const int64_t* sizes;
};

struct MixedSum {
  Type type;
  int count;
  int64_t numel;
  Order order;
  Source inputs[kMixedSumLimit];
  double weights[kMixedSumLimit];  // an fp32 weight is exact in fp64
  void* out;
};

struct MixedSumBackward {
  Type type;
  int count;
  int64_t numel;
  Order order;
  Source grad;
  Source inputs[kMixedSumLimit];  // read only where `partials` is there
  double weights[kMixedSumLimit];
  void* products[kMixedSumLimit];  // weights[k] * grad; null where not needed
  double* partials;                // [block][count]: <grad, inputs[k]> of each block, or null where not needed
};

// Blocks are the unit of work and of summation: their size is fixed, so that sums do not depend on the number of threads.
constexpr int64_t kBlock = 1024;

inline int64_t blocks_of(int64_t numel) {
  return (numel + kBlock - 1) / kBlock;
}

}  // namespace nascompile
