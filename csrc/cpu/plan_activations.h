// The activations of plans and their derivatives, on a line of channels. Included once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "plan_lanes.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

constexpr float kSlope = 0.01f;  // of leaky relu below zero

// e^x = scale * (1 + part): scale a power of two, part between -0.3 and 0.42. For x between kLowest and kHighest.
constexpr float kLowest = -87.3f;
constexpr float kHighest = 88.3f;

struct Power {
  Vec scale, part;

  NASCOMPILE_INLINE explicit Power(const Vec& x) {
    using Words = int32_t __attribute__((vector_size(sizeof(Vec))));
    // 1.5 * 2^23: what is added to it loses its fraction, and the whole part lies in the lowest bits
    const Vec kWhole(12582912.0f);
    const Vec shifted = at::vec::fmadd(x, Vec(1.44269504f), kWhole);
    const Vec whole = shifted - kWhole;
    // log 2 in two parts, the first with few enough digits to be exact times `whole`
    Vec rest = at::vec::fmadd(whole, Vec(-0.693359375f), x);
    rest = at::vec::fmadd(whole, Vec(2.12194440e-4f), rest);
    Vec sum(1.9875691500e-4f);
    for (const float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f}) {
      sum = at::vec::fmadd(sum, rest, Vec(coefficient));
    }
    part = at::vec::fmadd(sum, rest * rest, rest);
    Words exponent;
    std::memcpy(&exponent, &shifted, sizeof(exponent));
    exponent = (exponent << 23) + (127 << 23);
    std::memcpy(static_cast<void*>(&scale), &exponent, sizeof(exponent));
  }
};

// e^x within two units in the last place; zero below kLowest, infinite above kHighest, nan stays nan
NASCOMPILE_INLINE Vec exponential(const Vec& x) {
  const Vec bounded = at::vec::clamp(x, Vec(kLowest), Vec(kHighest));
  const Power power(bounded);
  const Vec inside = at::vec::fmadd(power.scale, power.part, power.scale);
  const Vec outside = at::vec::clamp_min(x, Vec(0.0f)) * Vec(3e38f);
  return Vec::blendv(outside, inside, x == bounded);
}

// e^x - 1 for x up to zero, with all digits near zero; nan stays nan
NASCOMPILE_INLINE Vec exponential_minus_one(const Vec& x) {
  const Power power(at::vec::clamp(x, Vec(kLowest), Vec(0.0f)));
  const Vec result = at::vec::fmadd(power.scale, power.part, power.scale - Vec(1.0f));
  return Vec::blendv(result, x, x != x);
}

NASCOMPILE_INLINE Vec sigmoid(const Vec& x) {
  return Vec(1.0f) / (Vec(1.0f) + exponential(Vec(0.0f) - x));
}

// The normal distribution: its density times the square root of 2 pi, and how much lies below x. Abramowitz and Stegun
// 7.1.26, as torch has it: within 1.5e-7.
struct Normal {
  Vec bell, below;

  NASCOMPILE_INLINE explicit Normal(const Vec& x) : bell(exponential(x * x * Vec(-0.5f))) {
    const Vec distance = at::vec::maximum(x, Vec(0.0f) - x);
    const Vec t = Vec(1.0f) / at::vec::fmadd(distance, Vec(0.3275911f * 0.70710678f), Vec(1.0f));
    Vec sum(1.061405429f);
    for (const float coefficient : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) {
      sum = at::vec::fmadd(sum, t, Vec(coefficient));
    }
    const Vec tail = Vec(0.5f) * sum * t * bell;
    below = Vec::blendv(Vec(1.0f) - tail, tail, x < Vec(0.0f));
  }
};

// nan stays nan, as in torch; but what lies above zero it is not
template <int64_t A>
NASCOMPILE_INLINE Vec activate_one(const Vec& x) {
  if constexpr (A == plan::kRelu) {
    return at::vec::clamp_min(x, Vec(0.0f));
  } else if constexpr (A == plan::kRelu6) {
    return at::vec::clamp(x, Vec(0.0f), Vec(6.0f));
  } else if constexpr (A == plan::kHardsigmoid) {
    return at::vec::clamp(x + Vec(3.0f), Vec(0.0f), Vec(6.0f)) * Vec(1.0f / 6.0f);
  } else if constexpr (A == plan::kHardswish) {
    return x * at::vec::clamp(x + Vec(3.0f), Vec(0.0f), Vec(6.0f)) * Vec(1.0f / 6.0f);
  } else if constexpr (A == plan::kSigmoid) {
    return sigmoid(x);
  } else if constexpr (A == plan::kSilu) {
    return x * sigmoid(x);
  } else if constexpr (A == plan::kGelu) {
    return x * Normal(x).below;
  } else if constexpr (A == plan::kLeakyRelu) {
    return Vec::blendv(x * Vec(kSlope), x, x > Vec(0.0f));
  } else if constexpr (A == plan::kElu) {
    return Vec::blendv(exponential_minus_one(x), x, x > Vec(0.0f));
  } else if constexpr (A == plan::kNegative) {
    return Vec::blendv(x, Vec(0.0f), x > Vec(0.0f));
  } else if constexpr (A == plan::kPositive) {
    return (x > Vec(0.0f)) & x;
  } else {
    return x;
  }
}

// g times the activation's derivative at x; at nan as torch's vectors: relu passes g on, relu6 and hardsigmoid do not
template <int64_t A>
NASCOMPILE_INLINE Vec hand_back_one(const Vec& g, const Vec& x) {
  if constexpr (A == plan::kRelu) {
    return Vec::blendv(g, Vec(0.0f), x <= Vec(0.0f));
  } else if constexpr (A == plan::kRelu6) {
    return ((x > Vec(0.0f)) & (x < Vec(6.0f))) & g;
  } else if constexpr (A == plan::kHardsigmoid) {
    return ((x > Vec(-3.0f)) & (x < Vec(3.0f))) & (g * Vec(1.0f / 6.0f));
  } else if constexpr (A == plan::kHardswish) {
    const Vec between = g * at::vec::fmadd(x, Vec(1.0f / 3.0f), Vec(0.5f));
    return Vec::blendv(Vec::blendv(between, g, x >= Vec(3.0f)), Vec(0.0f), x <= Vec(-3.0f));
  } else if constexpr (A == plan::kSigmoid) {
    const Vec s = sigmoid(x);
    return g * s * (Vec(1.0f) - s);
  } else if constexpr (A == plan::kSilu) {
    const Vec s = sigmoid(x);
    return g * s * at::vec::fmadd(x, Vec(1.0f) - s, Vec(1.0f));
  } else if constexpr (A == plan::kGelu) {
    const Normal normal(x);
    return g * at::vec::fmadd(x * normal.bell, Vec(0.39894228f), normal.below);
  } else if constexpr (A == plan::kLeakyRelu) {
    return Vec::blendv(g * Vec(kSlope), g, x > Vec(0.0f));
  } else if constexpr (A == plan::kElu) {
    return Vec::blendv(g * exponential(x), g, x > Vec(0.0f));
  } else if constexpr (A == plan::kNegative) {
    return Vec::blendv(g, Vec(0.0f), x > Vec(0.0f));
  } else if constexpr (A == plan::kPositive) {
    return (x > Vec(0.0f)) & g;
  } else {
    return g;
  }
}

template <int64_t A, int N>
NASCOMPILE_INLINE Channels<N> activate(const Channels<N>& value) {
  return each([](const Vec& x) { return activate_one<A>(x); }, value);
}

template <int64_t A, int N>
NASCOMPILE_INLINE Channels<N> hand_back(const Channels<N>& gradient, const Channels<N>& value) {
  return each([](const Vec& g, const Vec& x) { return hand_back_one<A>(g, x); }, gradient, value);
}

// visit(activation) with the activation as a constant, one of those given or none
template <int64_t... kinds, typename Visit>
void switch_among(int64_t activation, const Visit& visit) {
  const bool found = ((activation == kinds && (visit(std::integral_constant<int64_t, kinds>{}), true)) || ...);
  if (!found) {
    visit(std::integral_constant<int64_t, plan::kIdentity>{});
  }
}

template <typename Visit>
void switch_activation(int64_t activation, const Visit& visit) {
  using namespace plan;
  switch_among<
      kRelu, kRelu6, kHardswish, kHardsigmoid, kSilu, kSigmoid, kGelu, kLeakyRelu, kElu, kNegative, kPositive>(
      activation, visit);
}

// those whose derivative follows from the output
template <typename Visit>
void switch_mask(int64_t activation, const Visit& visit) {
  switch_among<plan::kRelu, plan::kRelu6>(activation, visit);
}

}  // namespace
}  // namespace nascompile::CPU_CAPABILITY
