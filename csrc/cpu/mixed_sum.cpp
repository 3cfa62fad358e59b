// out = sum_k w_k y_k, and backward dy_k = w_k g with all <g, y_k>, block by block. Compiled once per instruction set.
#include "../mixed_sum.h"
#include "isa.h"
#include "lanes.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

template <typename T>
void forward(const MixedSum& call, int64_t first_block, int64_t last_block) {
  using Wide = typename Lanes<T>::Wide;
  using Vec = typename Lanes<T>::Vec;
  T buffers[kMixedSumLimit][kBlock];
  const T* inputs[kMixedSumLimit];
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t length = call.numel - begin < kBlock ? call.numel - begin : kBlock;
    for (int k = 0; k < call.count; ++k) {
      inputs[k] = read_block<T>(call.inputs[k], call.order, begin, length, buffers[k]);
    }
    T* out = static_cast<T*>(call.out) + begin;
    steps<T>(length, [&](int64_t at, int64_t width) {
      auto [low, high] = load_step(inputs[0] + at, width);
      low = low * Vec(static_cast<Wide>(call.weights[0]));
      high = high * Vec(static_cast<Wide>(call.weights[0]));
      for (int k = 1; k < call.count; ++k) {
        const Vec weight(static_cast<Wide>(call.weights[k]));
        const auto [next_low, next_high] = load_step(inputs[k] + at, width);
        low = at::vec::fmadd(next_low, weight, low);
        high = at::vec::fmadd(next_high, weight, high);
      }
      store_step<T>(out + at, low, high, width);
    });
  }
}

template <typename T>
void multiply(const typename Lanes<T>::Wide* grad, typename Lanes<T>::Wide weight, int64_t length, T* product) {
  using Wide = typename Lanes<T>::Wide;
  const typename Lanes<T>::Vec factor(weight);
  steps<T>(length, [&](int64_t at, int64_t width) {
    const auto [low, high] = Lanes<Wide>::load(grad + at);
    store_step<T>(product + at, low * factor, high * factor, width);
  });
}

template <typename T>
double dot(const typename Lanes<T>::Wide* grad, const T* input, int64_t length) {
  using Wide = typename Lanes<T>::Wide;
  using Vec = typename Lanes<T>::Vec;
  Vec low_sum(Wide(0));
  Vec high_sum(Wide(0));
  steps<T>(length, [&](int64_t at, int64_t width) {
    const auto [low, high] = load_step(input + at, width);
    const auto [grad_low, grad_high] = Lanes<Wide>::load(grad + at);
    low_sum = at::vec::fmadd(low, grad_low, low_sum);
    high_sum = at::vec::fmadd(high, grad_high, high_sum);
  });
  Wide lanes[Lanes<T>::kStep];
  Lanes<Wide>::store(lanes, low_sum, high_sum);
  double sum = 0;
  for (const Wide lane : lanes) {
    sum += lane;
  }
  return sum;
}

template <typename T>
void backward(const MixedSumBackward& call, int64_t first_block, int64_t last_block) {
  using Wide = typename Lanes<T>::Wide;
  T buffer[kBlock];
  Wide grad[kBlock];
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t length = call.numel - begin < kBlock ? call.numel - begin : kBlock;
    const T* source = read_block<T>(call.grad, call.order, begin, length, buffer);
    // whole steps: the lanes beyond the end of a short block are zero
    steps<T>(length, [&](int64_t at, int64_t width) {
      const auto [low, high] = load_step(source + at, width);
      Lanes<Wide>::store(grad + at, low, high);
    });
    for (int k = 0; k < call.count; ++k) {
      if (call.products[k] != nullptr) {
        multiply<T>(grad, static_cast<Wide>(call.weights[k]), length, static_cast<T*>(call.products[k]) + begin);
      }
      if (call.partials != nullptr) {
        const T* input = read_block<T>(call.inputs[k], call.order, begin, length, buffer);
        call.partials[block * call.count + k] = dot<T>(grad, input, length);
      }
    }
  }
}

}  // namespace

#define NASCOMPILE_SWITCH_TYPE(type, run)     \
  switch (type) {                             \
    case Type::fp32:                          \
      return run(float);                      \
    case Type::bf16:                          \
      return run(c10::BFloat16);              \
    case Type::fp16:                          \
      return run(c10::Half);                  \
    case Type::fp64:                          \
      return run(double);                     \
  }

void mixed_sum(const MixedSum& call, int64_t first_block, int64_t last_block) {
#define RUN(T) forward<T>(call, first_block, last_block)
  NASCOMPILE_SWITCH_TYPE(call.type, RUN)
#undef RUN
}

void mixed_sum_backward(const MixedSumBackward& call, int64_t first_block, int64_t last_block) {
#define RUN(T) backward<T>(call, first_block, last_block)
  NASCOMPILE_SWITCH_TYPE(call.type, RUN)
#undef RUN
}

}  // namespace nascompile::CPU_CAPABILITY
