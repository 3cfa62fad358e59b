// Dense weights as the kernels want them, and their gradients on the way back. Compiled once per instruction set.
#include <algorithm>
#include <vector>

#include "../plan_barriers.h"
#include "isa.h"
#include "plan_transpose.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

// Channels of two lists at a time: what is transposed stays in the nearest cache, and both sides are gone over in order.
constexpr int64_t kSide = 16;

using Segments = plan::List<plan::Segment>;

template <typename Visit>
void for_segments(const Segments& segments, const plan::Run& run, const Visit& visit) {
  const plan::Segment* const first = segments.in(run.program);
  std::for_each(first, first + segments.count, visit);
}

// visit(part) for at most kSide channels of a list at a time
template <typename Visit>
void for_parts(const Segments& segments, const plan::Run& run, const Visit& visit) {
  for_segments(segments, run, [&](const plan::Segment& segment) {
    for (int64_t c = 0; c < segment.count; c += kSide) {
      visit(plan::Segment{segment.logical + c, std::min(kSide, segment.count - c), segment.padded + c});
    }
  });
}

int64_t count_channels(const Segments& segments, const plan::Run& run) {
  int64_t count = 0;
  for_segments(segments, run, [&](const plan::Segment& segment) { count += segment.count; });
  return count;
}

// to[i * to_row + j] = from[j * from_row + i * step]; the squares of one tap are transposed in registers.
void transpose_taps(
    const float* from, int64_t from_row, int64_t step, float* to, int64_t to_row, int64_t rows, int64_t columns) {
  if (step == 1) {
    return transpose_all<false>(from, from_row, to, to_row, rows, columns);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      to[i * to_row + j] = from[j * from_row + i * step];
    }
  }
}

// target[tap][input][output]
void pack(const plan::PackDense& op, const plan::Run& run, const float* tensor, int64_t row, float* target) {
  for_parts(op.out_segments, run, [&](const plan::Segment& out) {
    for_parts(op.in_segments, run, [&](const plan::Segment& in) {
      for (int64_t tap = 0; tap < op.count; ++tap) {
        const float* const from = tensor + out.logical * row + in.logical * op.count + tap;
        float* const to = target + (tap * op.in_channels + in.padded) * op.out_channels + out.padded;
        transpose_taps(from, row, op.count, to, op.out_channels, in.count, out.count);
      }
    });
  });
}

// Elements of one output channel of the tensor, whose last input channel is in some segment.
template <typename T>
int64_t row_of(const T& op, const plan::Run& run) {
  int64_t inputs = 0;
  for_segments(op.in_segments, run, [&](const plan::Segment& in) { inputs = std::max(inputs, in.logical + in.count); });
  return inputs * op.count;
}

// transposed[tap][output][input]
void pack_transposed(
    const plan::PackDense& op, const plan::Run& run, const float* tensor, int64_t row, float* transposed) {
  for_segments(op.out_segments, run, [&](const plan::Segment& out) {
    for_segments(op.in_segments, run, [&](const plan::Segment& in) {
      for (int64_t o = 0; o < out.count; ++o) {
        for (int64_t tap = 0; tap < op.count; ++tap) {
          const float* const source = tensor + (out.logical + o) * row + in.logical * op.count + tap;
          float* const target = transposed + (tap * op.out_channels + out.padded + o) * op.in_channels + in.padded;
          for (int64_t i = 0; i < in.count; ++i) {
            target[i] = source[i * op.count];
          }
        }
      }
    });
  });
}

// target[k] = the sum of the chunks' gradients from `source` on, in chunk order; these are zero afterwards.
void take_gradients(const plan::Run& run, int64_t source, int64_t count, float* target) {
  const int64_t chunks = run.header().chunks;
  // not looked up in the loops, which write what might be the header for all that the compiler knows
  const int64_t apart = run.chunk;
  float* const begin = run.gradients(0) + source;
  int64_t first = 0;
  for (; first + kSide <= count; first += kSide) {
    double sums[kSide] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      float* const gradients = begin + chunk * apart + first;
      for (int64_t k = 0; k < kSide; ++k) {
        sums[k] += gradients[k];
        gradients[k] = 0.0f;
      }
    }
    for (int64_t k = 0; k < kSide; ++k) {
      target[first + k] = static_cast<float>(sums[k]);
    }
  }
  for (; first < count; ++first) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      float& gradient = begin[chunk * apart + first];
      sum += gradient;
      gradient = 0.0f;
    }
    target[first] = static_cast<float>(sum);
  }
}

}  // namespace

void plan_pack_dense(const plan::PackDense& op, const plan::Run& run) {
  const float* const tensor = run.tensor(op.tensor);
  const int64_t row = row_of(op, run);
  const int64_t size = op.count * op.in_channels * op.out_channels;
  const int64_t written =
      op.count * count_channels(op.in_segments, run) * count_channels(op.out_segments, run);
  // zero where padded
  const auto begin = [&](float* target) { std::fill_n(target, written < size ? size : 0, 0.0f); };
  if (float* const target = run.vector(op.target)) {
    begin(target);
    pack(op, run, tensor, row, target);
  }
  if (float* const transposed = run.vector(op.transposed)) {
    begin(transposed);
    pack_transposed(op, run, tensor, row, transposed);
  }
}

void plan_unpack_dense(const plan::UnpackDense& op, const plan::Run& run) {
  float* const tensor = run.tensor(op.tensor);
  const int64_t row = row_of(op, run);
  // sums of a few input channels, in the order in which the chunks' gradients lie in memory
  std::vector<float> panel(kSide * op.out_channels);
  for_parts(op.in_segments, run, [&](const plan::Segment& in) {
    for (int64_t tap = 0; tap < op.count; ++tap) {
      const int64_t at = op.source + (tap * op.in_channels + in.padded) * op.out_channels;
      take_gradients(run, at, in.count * op.out_channels, panel.data());
      for_segments(op.out_segments, run, [&](const plan::Segment& out) {
        float* const to = tensor + out.logical * row + in.logical * op.count + tap;
        if (op.count == 1) {
          return transpose_all<false>(panel.data() + out.padded, op.out_channels, to, row, out.count, in.count);
        }
        for (int64_t o = 0; o < out.count; ++o) {
          for (int64_t i = 0; i < in.count; ++i) {
            to[o * row + i * op.count] = panel[i * op.out_channels + out.padded + o];
          }
        }
      });
    }
  });
  if (count_channels(op.in_segments, run) < op.in_channels) {
    // of padded channels, too
    run.clear_gradients(op.source, op.count * op.in_channels * op.out_channels);
  }
}

}  // namespace nascompile::CPU_CAPABILITY
