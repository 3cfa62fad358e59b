// Two vectors' worth of elements of any type, computed in fp32 (fp64 for fp64). Included once per instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstring>
#include <tuple>

#include "../mixed_sum.h"

// distinct in every object file: two instruction sets must never share one compiled function
namespace nascompile::CPU_CAPABILITY {
namespace {

template <typename T>
struct Lanes {
  using Wide = float;
  using Vec = at::vec::Vectorized<float>;
  static constexpr int64_t kStep = 2 * Vec::size();

  static std::tuple<Vec, Vec> load(const T* from) {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  }
  static void store(T* to, const Vec& low, const Vec& high) {
    at::vec::convert_from_float<T>(low, high).store(to);
  }
};

template <typename T>
struct WideLanes {
  using Wide = T;
  using Vec = at::vec::Vectorized<T>;
  static constexpr int64_t kStep = 2 * Vec::size();

  static std::tuple<Vec, Vec> load(const T* from) {
    return {Vec::loadu(from), Vec::loadu(from + Vec::size())};
  }
  static void store(T* to, const Vec& low, const Vec& high) {
    low.store(to);
    high.store(to + Vec::size());
  }
};

template <>
struct Lanes<float> : WideLanes<float> {};
template <>
struct Lanes<double> : WideLanes<double> {};

// `visit(offset, length)` for every step of a block: whole steps first, then the rest with length < kStep.
template <typename T, typename Visit>
inline void steps(int64_t length, const Visit& visit) {
  constexpr int64_t kStep = Lanes<T>::kStep;
  int64_t at = 0;
  for (; at + kStep <= length; at += kStep) {
    visit(at, kStep);
  }
  if (at < length) {
    visit(at, length - at);
  }
}

// Loads and stores of a step that may be the short rest of a block; the missing lanes are zero.
template <typename T>
inline auto load_step(const T* from, int64_t length) {
  if (length == Lanes<T>::kStep) {
    return Lanes<T>::load(from);
  }
  T padded[Lanes<T>::kStep] = {};
  std::memcpy(padded, from, length * sizeof(T));
  return Lanes<T>::load(padded);
}

template <typename T, typename Vec>
inline void store_step(T* to, const Vec& low, const Vec& high, int64_t length) {
  if (length == Lanes<T>::kStep) {
    return Lanes<T>::store(to, low, high);
  }
  T padded[Lanes<T>::kStep];
  Lanes<T>::store(padded, low, high);
  std::memcpy(to, padded, length * sizeof(T));
}

// The elements [begin, begin + length) of a tensor in the result's memory order: in place where it lies like the result,
// else collected into `buffer`.
template <typename T>
inline const T* read_block(const Source& source, const Order& order, int64_t begin, int64_t length, T* buffer) {
  const T* data = static_cast<const T*>(source.data);
  if (source.strides == nullptr) {
    return data + begin;
  }
  const int last = order.dims - 1;
  const int64_t inner = source.strides[last];
  int64_t done = 0;
  while (done < length) {
    int64_t rest = begin + done;
    const int64_t start = rest % order.sizes[last];
    rest /= order.sizes[last];
    int64_t offset = start * inner;
    for (int dim = last - 1; dim >= 0; --dim) {
      offset += rest % order.sizes[dim] * source.strides[dim];
      rest /= order.sizes[dim];
    }
    const int64_t run = order.sizes[last] - start < length - done ? order.sizes[last] - start : length - done;
    for (int64_t i = 0; i < run; ++i) {
      buffer[done + i] = data[offset + i * inner];
    }
    done += run;
  }
  return buffer;
}

}  // namespace
}  // namespace nascompile::CPU_CAPABILITY
