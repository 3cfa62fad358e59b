// The barrier operations of a plan, as kernels/plan/steps.py describes them. Sums of chunks are added in chunk order, so
// that results depend on the number of chunks only.
#include "plan_barriers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/isa.h"

namespace nascompile::plan {
namespace {

template <typename T, typename Visit>
void for_each(const List<T>& list, const Run& run, const Visit& visit) {
  const T* items = list.in(run.program);
  for (int64_t k = 0; k < list.count; ++k) {
    visit(items[k]);
  }
}

// visit(number in the tensor, padded number) for every channel of the segments
template <typename Visit>
void for_channels(const List<Segment>& segments, const Run& run, const Visit& visit) {
  for_each(segments, run, [&](const Segment& segment) {
    for (int64_t c = 0; c < segment.count; ++c) {
      visit(segment.logical + c, segment.padded + c);
    }
  });
}

double sum_of(const Run& run, int64_t offset) {
  double sum = 0;
  for (int64_t chunk = 0; chunk < run.header().chunks; ++chunk) {
    sum += run.sums(chunk)[offset];
  }
  return sum;
}

float gradient_of(const Run& run, int64_t offset) {
  double sum = 0;
  for (int64_t chunk = 0; chunk < run.header().chunks; ++chunk) {
    sum += run.gradients(chunk)[offset];
  }
  return static_cast<float>(sum);
}

double weight_of(const Run& run, int64_t decision, int64_t weight) {
  return weight < 0 ? 1.0 : run.tensor(decision)[weight];
}

void carry_out(const PackDepthwise& op, const Run& run) {
  const float* tensor = run.tensor(op.tensor);
  float* target = run.vector(op.target);
  std::fill_n(target, op.count * op.channels, 0.0f);
  for_channels(op.segments, run, [&](int64_t from, int64_t to) {
    for (int64_t tap = 0; tap < op.count; ++tap) {
      target[tap * op.channels + to] = tensor[from * op.count + tap];
    }
  });
}

void carry_out(const UnpackDepthwise& op, const Run& run) {
  float* tensor = run.tensor(op.tensor);
  for_channels(op.segments, run, [&](int64_t to, int64_t from) {
    for (int64_t tap = 0; tap < op.count; ++tap) {
      tensor[to * op.count + tap] = gradient_of(run, op.source + tap * op.channels + from);
    }
  });
  run.clear_gradients(op.source, op.count * op.channels);
}

void update(float* running, int64_t channel, double share, double batch) {
  if (running != nullptr) {
    running[channel] = static_cast<float>((1 - share) * running[channel] + share * batch);
  }
}

void carry_out(const Normalise& op, const Run& run) {
  const float* gamma = run.tensor(op.gamma);
  const float* beta = run.tensor(op.beta);
  float* running_mean = run.tensor(op.running_mean);
  float* running_var = run.tensor(op.running_var);
  const bool uses_batch = op.moments >= 0;
  double share = op.momentum;
  if (uses_batch && op.counter >= 0) {
    const int64_t batches = ++*static_cast<int64_t*>(run.tensors[op.counter]);
    share = op.momentum < 0 ? 1.0 / static_cast<double>(batches) : share;
  }
  float* out = run.vector(op.out);
  std::fill_n(out, 4 * op.channels, 0.0f);
  const double elements = static_cast<double>(op.elements);
  for_channels(op.segments, run, [&](int64_t from, int64_t to) {
    double mean = running_mean != nullptr ? running_mean[from] : 0.0;
    double variance = running_var != nullptr ? running_var[from] : 1.0;
    if (uses_batch) {
      mean = sum_of(run, op.moments + to) / elements;
      variance = std::max(sum_of(run, op.moments + op.channels + to) / elements - mean * mean, 0.0);
      update(running_mean, from, share, mean);
      update(running_var, from, share, variance * elements / std::max(elements - 1, 1.0));
    }
    const double inverse = 1 / std::sqrt(variance + op.epsilon);
    const double scale = (gamma != nullptr ? gamma[from] : 1.0) * inverse;
    out[to] = static_cast<float>(mean);
    out[op.channels + to] = static_cast<float>(inverse);
    out[2 * op.channels + to] = static_cast<float>(scale);
    out[3 * op.channels + to] = static_cast<float>((beta != nullptr ? beta[from] : 0.0) - mean * scale);
  });
}

void carry_out(const Coefficients& op, const Run& run) {
  float* constant = run.vector(op.constant);
  for (int64_t c = 0; c < op.channels; ++c) {
    double sum = 0;
    for_each(op.terms, run, [&](const Weighted& term) {
      if (!run.holds(term.flag)) {
        return;
      }
      const double weight = weight_of(run, op.decision, term.weight);
      if (term.out >= 0) {
        run.slab[term.out + c] = static_cast<float>(term.scale < 0 ? weight : weight * run.slab[term.scale + c]);
      }
      sum += term.shift < 0 ? 0.0 : weight * run.slab[term.shift + c];
    });
    if (constant != nullptr) {
      constant[c] = static_cast<float>(sum);
    }
  }
}

// One padded channel; returns the gradients of beta and gamma.
std::pair<double, double> normalise_backward(const NormaliseBackward& op, const Run& run, int64_t c) {
  const float* vectors = run.vector(op.vectors);
  const double mean = vectors[c];
  const double inverse = vectors[op.channels + c];
  const double scale = vectors[2 * op.channels + c];
  double sum_g = 0;
  double sum_gy = 0;
  for_each(op.upstream, run, [&](const Upstream& upstream) {
    if (!run.holds(upstream.flag)) {
      return;
    }
    const double weight = weight_of(run, op.decision, upstream.weight);
    sum_g += weight * sum_of(run, upstream.sum_g + c);
    sum_gy += weight * sum_of(run, upstream.sum_gy + c);
    if (upstream.out >= 0) {
      run.slab[upstream.out + c] = static_cast<float>(weight * scale);
    }
  });
  const double towards_gamma = inverse * (sum_gy - mean * sum_g);
  double by_y = 0;
  double constant = 0;
  if (op.elements > 0) {
    const double elements = static_cast<double>(op.elements);
    by_y = -scale * inverse * towards_gamma / elements;
    constant = -scale * sum_g / elements - by_y * mean;
  }
  if (float* vector = run.vector(op.by_y)) {
    vector[c] = static_cast<float>(op.starts ? by_y : vector[c] + by_y);
  }
  if (float* vector = run.vector(op.constant)) {
    vector[c] = static_cast<float>(op.starts ? constant : vector[c] + constant);
  }
  return {sum_g, towards_gamma};
}

// Nothing reaches the normalisation: its vectors may never have been computed.
void start_normalise_backward(const NormaliseBackward& op, const Run& run) {
  for (const int64_t at : {op.by_y, op.constant}) {
    if (at >= 0 && op.starts) {
      std::fill_n(run.vector(at), op.channels, 0.0f);
    }
  }
}

void carry_out(const NormaliseBackward& op, const Run& run) {
  bool is_reached = false;
  for_each(op.upstream, run, [&](const Upstream& upstream) { is_reached |= run.holds(upstream.flag); });
  if (!is_reached) {
    return start_normalise_backward(op, run);
  }
  float* gamma = run.tensor(op.gamma);
  float* beta = run.tensor(op.beta);
  // padded channels too: their vectors become zero
  std::vector<int64_t> number(op.channels, kNone);
  for_channels(op.segments, run, [&](int64_t to, int64_t c) { number[c] = to; });
  for (int64_t c = 0; c < op.channels; ++c) {
    const auto [towards_beta, towards_gamma] = normalise_backward(op, run, c);
    if (gamma != nullptr && number[c] >= 0) {
      gamma[number[c]] += static_cast<float>(towards_gamma);
    }
    if (beta != nullptr && number[c] >= 0) {
      beta[number[c]] += static_cast<float>(towards_beta);
    }
  }
}

void carry_out(const DecisionGradient& op, const Run& run) {
  double sum = 0;
  for (int64_t c = 0; c < op.channels; ++c) {
    if (op.sum_gy >= 0) {
      sum += (op.scale < 0 ? 1.0 : run.slab[op.scale + c]) * sum_of(run, op.sum_gy + c);
    }
    if (op.shift >= 0) {
      sum += run.slab[op.shift + c] * sum_of(run, op.sum_g + c);
    }
  }
  float& gradient = run.tensor(op.tensor)[op.weight];
  gradient = static_cast<float>(gradient + sum);
}

template <typename T>
void carry_out_as(const int64_t* fields, const Run& run) {
  T op;
  std::memcpy(&op, fields, sizeof(T));
  carry_out(op, run);
}

}  // namespace

void run_barrier(int64_t kind, const int64_t* fields, const Run& run) {
  switch (kind) {
    case kPackDepthwise:
      return carry_out_as<PackDepthwise>(fields, run);
    case kPackDense:
      return NASCOMPILE_PICK(plan_pack_dense)(*reinterpret_cast<const PackDense*>(fields), run);
    case kUnpackDepthwise:
      return carry_out_as<UnpackDepthwise>(fields, run);
    case kUnpackDense:
      return NASCOMPILE_PICK(plan_unpack_dense)(*reinterpret_cast<const UnpackDense*>(fields), run);
    case kNormalise:
      return carry_out_as<Normalise>(fields, run);
    case kCoefficients:
      return carry_out_as<Coefficients>(fields, run);
    case kNormaliseBackward:
      return carry_out_as<NormaliseBackward>(fields, run);
    case kDecisionGradient:
      return carry_out_as<DecisionGradient>(fields, run);
  }
}

}  // namespace nascompile::plan
