// out = sum_k w_k y_k, and backward dy_k = w_k g with all <g, y_k>, for NVIDIA GPUs. Bound by memory: every thread moves
// 16 bytes per tensor and step. Sums go through one partial per block and a second kernel: no atomics, results repeat.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "mixed_sum.h"

namespace {

using nascompile::kMixedSumLimit;
using nascompile::Type;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// fixed, so that sums do not depend on the GPU; 1024 blocks of 256 threads fill 132 multiprocessors almost once
constexpr int64_t kMaxBlocks = 1024;

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void narrow(float value, float& to) { to = value; }
__device__ inline void narrow(double value, double& to) { to = value; }
__device__ inline void narrow(float value, __half& to) { to = __float2half_rn(value); }
__device__ inline void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

// What a thread moves at once: 16 bytes where all pointers allow it, else one element.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T lanes[N];
};

template <typename T, int N>
__device__ inline Pack<T, N> load(const void* from, int64_t pack) {
  return static_cast<const Pack<T, N>*>(from)[pack];
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ NascompileMixedSum call, int64_t packs) {
  using W = typename Wide<T>::type;
  const W* weights = static_cast<const W*>(call.weights);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; pack < packs; pack += step) {
    W total[N] = {};
#pragma unroll 4
    for (int k = 0; k < call.count; ++k) {
      const W weight = weights[k];
      const Pack<T, N> values = load<T, N>(call.inputs[k], pack);
#pragma unroll
      for (int lane = 0; lane < N; ++lane) {
        total[lane] += weight * widen(values.lanes[lane]);
      }
    }
    Pack<T, N> out;
#pragma unroll
    for (int lane = 0; lane < N; ++lane) {
      narrow(total[lane], out.lanes[lane]);
    }
    static_cast<Pack<T, N>*>(call.out)[pack] = out;
  }
}

template <typename W>
__device__ inline W sum_of_warp(W value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
  }
  return value;
}

// COUNT is the number of sums kept in registers: call.count rounded up to 4, 8 or 16.
template <typename T, int N, int COUNT>
__global__ void __launch_bounds__(kThreads)
    backward(const __grid_constant__ NascompileMixedSumBackward call, int64_t packs) {
  using W = typename Wide<T>::type;
  const W* weights = static_cast<const W*>(call.weights);
  const bool needs_dots = call.dots != nullptr;
  W sums[COUNT] = {};
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; pack < packs; pack += step) {
    const Pack<T, N> packed = load<T, N>(call.grad, pack);
    W grad[N];
#pragma unroll
    for (int lane = 0; lane < N; ++lane) {
      grad[lane] = widen(packed.lanes[lane]);
    }
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      if (k >= call.count) {
        break;
      }
      if (needs_dots) {
        const Pack<T, N> values = load<T, N>(call.inputs[k], pack);
#pragma unroll
        for (int lane = 0; lane < N; ++lane) {
          sums[k] += grad[lane] * widen(values.lanes[lane]);
        }
      }
      if (call.products[k] != nullptr) {
        const W weight = weights[k];
        Pack<T, N> product;
#pragma unroll
        for (int lane = 0; lane < N; ++lane) {
          narrow(weight * grad[lane], product.lanes[lane]);
        }
        static_cast<Pack<T, N>*>(call.products[k])[pack] = product;
      }
    }
  }
  if (!needs_dots) {
    return;
  }
  __shared__ W of_warps[kWarps][COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const W sum = sum_of_warp(sums[k]);
    if (threadIdx.x % 32 == 0) {
      of_warps[threadIdx.x / 32][k] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < call.count) {
    W sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += of_warps[warp][threadIdx.x];
    }
    static_cast<W*>(call.partials)[static_cast<int64_t>(blockIdx.x) * call.count + threadIdx.x] = sum;
  }
}

// One block per sum.
template <typename W>
__global__ void __launch_bounds__(kThreads) add_partials(const W* partials, int64_t blocks, int count, W* dots) {
  double sum = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += kThreads) {
    sum += partials[block * count + blockIdx.x];
  }
  __shared__ double of_warps[kWarps];
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) {
    of_warps[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      total += of_warps[warp];
    }
    dots[blockIdx.x] = static_cast<W>(total);
  }
}

int64_t blocks_for(int64_t packs) {
  const int64_t blocks = (packs + kThreads - 1) / kThreads;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <typename T>
bool fits_packs(int64_t numel, int count, const void* const* inputs, void* const* products, const void* other) {
  bool fits = numel % (16 / sizeof(T)) == 0 && is_aligned(other);
  for (int k = 0; k < count; ++k) {
    fits = fits && is_aligned(inputs[k]) && (products == nullptr || is_aligned(products[k]));
  }
  return fits;
}

template <typename T, int N>
void launch_forward(const NascompileMixedSum& call, cudaStream_t stream) {
  const int64_t packs = call.numel / N;
  forward<T, N><<<blocks_for(packs), kThreads, 0, stream>>>(call, packs);
}

template <typename T, int N>
int64_t launch_backward(const NascompileMixedSumBackward& call, cudaStream_t stream) {
  const int64_t packs = call.numel / N;
  const int64_t blocks = blocks_for(packs);
  if (call.count <= 4) {
    backward<T, N, 4><<<blocks, kThreads, 0, stream>>>(call, packs);
  } else if (call.count <= 8) {
    backward<T, N, 8><<<blocks, kThreads, 0, stream>>>(call, packs);
  } else {
    backward<T, N, kMixedSumLimit><<<blocks, kThreads, 0, stream>>>(call, packs);
  }
  return blocks;
}

template <typename T>
cudaError_t run_forward(const NascompileMixedSum& call, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  if (fits_packs<T>(call.numel, call.count, call.inputs, nullptr, call.out)) {
    launch_forward<T, kPack>(call, stream);
  } else {
    launch_forward<T, 1>(call, stream);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t run_backward(const NascompileMixedSumBackward& call, cudaStream_t stream) {
  using W = typename Wide<T>::type;
  constexpr int kPack = 16 / sizeof(T);
  const int64_t blocks = fits_packs<T>(call.numel, call.count, call.inputs, call.products, call.grad)
      ? launch_backward<T, kPack>(call, stream)
      : launch_backward<T, 1>(call, stream);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || call.dots == nullptr) {
    return error;
  }
  add_partials<W><<<call.count, kThreads, 0, stream>>>(
      static_cast<const W*>(call.partials), blocks, call.count, static_cast<W*>(call.dots));
  return cudaGetLastError();
}

}  // namespace

extern "C" {

int64_t nascompile_mixed_sum_partials(int64_t numel) {
  return blocks_for(numel);
}

int nascompile_mixed_sum(const NascompileMixedSum* call, void* stream) {
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (call->type) {
    case Type::fp32:
      return run_forward<float>(*call, on);
    case Type::bf16:
      return run_forward<__nv_bfloat16>(*call, on);
    case Type::fp16:
      return run_forward<__half>(*call, on);
    case Type::fp64:
      return run_forward<double>(*call, on);
  }
  return cudaErrorInvalidValue;
}

int nascompile_mixed_sum_backward(const NascompileMixedSumBackward* call, void* stream) {
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (call->type) {
    case Type::fp32:
      return run_backward<float>(*call, on);
    case Type::bf16:
      return run_backward<__nv_bfloat16>(*call, on);
    case Type::fp16:
      return run_backward<__half>(*call, on);
    case Type::fp64:
      return run_backward<double>(*call, on);
  }
  return cudaErrorInvalidValue;
}

const char* nascompile_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}
