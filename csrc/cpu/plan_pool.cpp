// Max and average pooling of a plan's maps, forward and backward. Windows of 3 by 3 with stride 1 and padding 1 are taken
// apart into rows and columns; all others are gone over as they are. Compiled once per instruction set.
#include <cstring>
#include <limits>
#include <utility>

#include "isa.h"
#include "plan_lanes.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

constexpr int64_t kSide = 3;  // of the windows that are taken apart

template <typename Step>
bool is_separable(const Step& step) {
  return step.kernel_h == kSide && step.kernel_w == kSide && step.stride_h == 1 && step.stride_w == 1 &&
      step.padding_h == 1 && step.padding_w == 1;
}

// ---- a window's maximum

// The greatest value so far and its number in the window, as floats.
template <int N>
struct Best {
  Channels<N> value;
  Channels<N> number;
};

// The first of equal values stays; nan wins, the last one of several, as in torch.
template <bool with_number, int N>
NASCOMPILE_INLINE void challenge(Best<N>& best, const Channels<N>& value, const Channels<N>& number) {
  if constexpr (with_number) {
    const Channels<N> wins =
        each([](const Vec& x, const Vec& y) { return (x > y) | (x != x); }, value, best.value);
    const auto choose = [](const Vec& a, const Vec& b, const Vec& m) { return Vec::blendv(a, b, m); };
    best.value = each(choose, best.value, value, wins);
    best.number = each(choose, best.number, number, wins);
  } else {
    best.value = each([](const Vec& x, const Vec& y) { return at::vec::maximum(x, y); }, best.value, value);
  }
}

// Eight numbers; conversions that double or halve the width are single instructions, larger ones are not.
using Bytes = uint8_t __attribute__((vector_size(8)));
using Shorts = int16_t __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(32)));

template <int N>
NASCOMPILE_INLINE void store_bytes(const Channels<N>& numbers, uint8_t* to) {
  alignas(64) float lanes[N];
  numbers.store(lanes);
  for (int i = 0; i < N; i += 8) {
    Floats wide;
    std::memcpy(&wide, lanes + i, sizeof(wide));
    const Ints whole = __builtin_convertvector(wide, Ints);
    const Bytes narrow = __builtin_convertvector(__builtin_convertvector(whole, Shorts), Bytes);
    std::memcpy(to + i, &narrow, sizeof(narrow));
  }
}

template <int N>
NASCOMPILE_INLINE Channels<N> load_bytes(const uint8_t* from) {
  alignas(64) float lanes[N];
  for (int i = 0; i < N; i += 8) {
    Bytes narrow;
    std::memcpy(&narrow, from + i, sizeof(narrow));
    const Ints whole = __builtin_convertvector(__builtin_convertvector(narrow, Shorts), Ints);
    const Floats wide = __builtin_convertvector(whole, Floats);
    std::memcpy(lanes + i, &wide, sizeof(wide));
  }
  return Channels<N>(lanes);
}

// ---- windows

// The part [begin, end) of a window along one dimension that lies in the image.
struct Window {
  int64_t start, begin, end;

  Window(int64_t number, int64_t stride, int64_t padding, int64_t kernel, int64_t size)
      : start(number * stride - padding), begin(start < 0 ? -start : 0), end(std::min(kernel, size - start)) {}
};

// What an average divides by.
template <typename Step>
float divisor(const Step& step, const Window& down, const Window& across) {
  return static_cast<float>(
      step.counts_padding ? step.kernel_h * step.kernel_w : (down.end - down.begin) * (across.end - across.begin));
}

// Sums of an output map and of its squares, collected in fp32 for a limited number of pixels.
template <int N>
class Moments {
 public:
  Moments(double* sums, int64_t channels) : sums_(sums), channels_(channels) {}

  NASCOMPILE_INLINE void take(const Channels<N>& value) {
    if (is_first_) {
      shift_ = value;
      is_first_ = false;
      is_of_one_ = true;
    }
    const Channels<N> about = subtract(value, shift_);
    total_ = add(total_, about);
    squares_ = multiply_add(about, about, squares_);
  }
  // at the end of every row of `pixels`
  void end_row(int64_t pixels, bool is_last) {
    pixels_ += pixels;
    if (sums_ != nullptr && (pixels_ >= kSumPixels || is_of_one_ || is_last)) {
      add_moments(sums_, channels_, pixels_, shift_, total_, squares_);
      // one pixel may be far from all others, the mean of a row is not
      shift_ = multiply_add(total_, Channels<N>(1.0f / static_cast<float>(pixels_)), shift_);
      is_of_one_ = false;
      total_ = Channels<N>();
      squares_ = Channels<N>();
      pixels_ = 0;
    }
  }

 private:
  double* sums_;
  int64_t channels_;
  int64_t pixels_ = 0;
  bool is_first_ = true;
  bool is_of_one_ = false;
  Channels<N> shift_;
  Channels<N> total_;
  Channels<N> squares_;
};

// One line of channels of the output: where it goes, its indices, its sums.
struct Output {
  float* data;
  int64_t row, pixel;
  uint8_t* index;
  int64_t channels;
  double* moments;

  Output(const plan::Pool& step, const plan::Image& image, int64_t channel)
      : data(image.at(step.y) + channel),
        row(step.y.row),
        pixel(step.y.pixel),
        index(nullptr),
        channels(step.y.channels),
        moments(step.moments < 0 ? nullptr : image.sums + step.moments + channel) {
    if (step.index >= 0) {
      index = reinterpret_cast<uint8_t*>(image.slab + step.index + image.number * step.index_image) + channel;
    }
  }
};

template <int N, bool is_max, bool with_index>
void pool_windows(const plan::Pool& step, const plan::Image& image, int64_t channel) {
  const float* x = image.at(step.x) + channel;
  const Output output(step, image, channel);
  Moments<N> moments(output.moments, output.channels);
  for (int64_t h = 0; h < step.y.height; ++h) {
    const Window down(h, step.stride_h, step.padding_h, step.kernel_h, step.x.height);
    for (int64_t w = 0; w < step.y.width; ++w) {
      const Window across(w, step.stride_w, step.padding_w, step.kernel_w, step.x.width);
      // numbered by the first pixel, which wins where all are minus infinity
      Best<N> best{
          Channels<N>(is_max ? -std::numeric_limits<float>::infinity() : 0.0f),
          Channels<N>(static_cast<float>(down.begin * step.kernel_w + across.begin))};
      for (int64_t i = down.begin; i < down.end; ++i) {
        const float* in = x + (down.start + i) * step.x.row + (across.start + across.begin) * step.x.pixel;
        for (int64_t j = across.begin; j < across.end; ++j, in += step.x.pixel) {
          const Channels<N> value(in);
          if constexpr (is_max) {
            challenge<with_index>(best, value, Channels<N>(static_cast<float>(i * step.kernel_w + j)));
          } else {
            best.value = add(best.value, value);
          }
        }
      }
      if constexpr (!is_max) {
        best.value = multiply(best.value, Channels<N>(1 / divisor(step, down, across)));
      }
      best.value.store(output.data + h * output.row + w * output.pixel);
      moments.take(best.value);
      if constexpr (with_index) {
        store_bytes(best.number, output.index + (h * step.y.width + w) * output.channels);
      }
    }
    moments.end_row(step.y.width, h + 1 == step.y.height);
  }
}

// The best, or the sum, of a pixel and its neighbours in the row.
template <int N, bool is_max, bool with_index, bool has_left, bool has_right>
NASCOMPILE_INLINE Best<N> pool_neighbours(const float* in, int64_t pixel) {
  Best<N> best{Channels<N>(has_left ? in - pixel : in), Channels<N>(has_left ? 0.0f : 1.0f)};
  const auto take = [&](const float* other, float number) {
    if constexpr (is_max) {
      challenge<with_index>(best, Channels<N>(other), Channels<N>(number));
    } else {
      best.value = add(best.value, Channels<N>(other));
    }
  };
  if constexpr (has_left) {
    take(in, 1.0f);
  }
  if constexpr (has_right) {
    take(in + pixel, 2.0f);
  }
  return best;
}

// That for every pixel of a row.
template <int N, bool is_max, bool with_index>
void pool_row(const float* in, int64_t pixel, int64_t width, float* values, float* numbers) {
  const auto store = [&](const Best<N>& best, int64_t w) {
    best.value.store(values + w * N);
    if constexpr (with_index) {
      best.number.store(numbers + w * N);
    }
  };
  if (width == 1) {
    return store(pool_neighbours<N, is_max, with_index, false, false>(in, pixel), 0);
  }
  store(pool_neighbours<N, is_max, with_index, false, true>(in, pixel), 0);
  for (int64_t w = 1; w + 1 < width; ++w) {
    store(pool_neighbours<N, is_max, with_index, true, true>(in + w * pixel, pixel), w);
  }
  store(pool_neighbours<N, is_max, with_index, true, false>(in + (width - 1) * pixel, pixel), width - 1);
}

// The rows of a window that is taken apart: `first` is the number of the first of `count` rows that lie in the image.
struct Rows {
  int64_t first, count;

  Rows(int64_t h, int64_t height)
      : first(h == 0 ? 1 : 0), count(std::min(h + 2, height) - std::max<int64_t>(h - 1, 0)) {}
  int64_t row(int64_t h) const {
    return h - 1 + first;
  }
};

// visit(count) with the number of rows as a constant
template <typename Visit>
void switch_rows(const Rows& rows, const Visit& visit) {
  switch (rows.count) {
    case 1:
      return visit(std::integral_constant<int, 1>{});
    case 2:
      return visit(std::integral_constant<int, 2>{});
    default:
      return visit(std::integral_constant<int, 3>{});
  }
}

// What an average over a window that is taken apart divides by.
template <typename Step>
float count_of(const Step& step, const Rows& rows, int64_t w, int64_t width) {
  const int64_t columns = std::min(w + 2, width) - std::max<int64_t>(w - 1, 0);
  return static_cast<float>(step.counts_padding ? kSide * kSide : rows.count * columns);
}

// `tile`: three rows of values, and of numbers
template <int N, bool is_max, bool with_index>
void pool_separably(const plan::Pool& step, const plan::Image& image, int64_t channel) {
  const float* x = image.at(step.x) + channel;
  const Output output(step, image, channel);
  Moments<N> moments(output.moments, output.channels);
  const int64_t height = step.x.height;
  const int64_t width = step.x.width;
  const auto values = [&](int64_t h) { return image.tile + h % kSide * width * N; };
  const auto numbers = [&](int64_t h) { return values(h) + kSide * width * N; };
  pool_row<N, is_max, with_index>(x, step.x.pixel, width, values(0), numbers(0));
  for (int64_t h = 0; h < height; ++h) {
    if (h + 1 < height) {
      pool_row<N, is_max, with_index>(x + (h + 1) * step.x.row, step.x.pixel, width, values(h + 1), numbers(h + 1));
    }
    const Rows rows(h, height);
    switch_rows(rows, [&](auto count) {
      const float* in[kSide];
      Channels<N> before[kSide];
      for (int i = 0; i < count; ++i) {
        in[i] = values(rows.row(h) + i);
        before[i] = Channels<N>(static_cast<float>((rows.first + i) * kSide));
      }
      float* out = output.data + h * output.row;
      for (int64_t w = 0; w < width; ++w, out += output.pixel) {
        const auto number = [&](int i) {
          return with_index ? add(Channels<N>(in[i] + (kSide * width + w) * N), before[i]) : Channels<N>();
        };
        Best<N> best{Channels<N>(in[0] + w * N), number(0)};
        for (int i = 1; i < count; ++i) {
          const Channels<N> value(in[i] + w * N);
          if constexpr (is_max) {
            challenge<with_index>(best, value, number(i));
          } else {
            best.value = add(best.value, value);
          }
        }
        if constexpr (!is_max) {
          best.value = multiply(best.value, Channels<N>(1 / count_of(step, rows, w, width)));
        }
        best.value.store(out);
        moments.take(best.value);
        if constexpr (with_index) {
          store_bytes(best.number, output.index + (h * width + w) * output.channels);
        }
      }
    });
    moments.end_row(width, h + 1 == height);
  }
}

// ---- backward

// Output pixels give their gradient to the winners, or to all pixels of their windows.
template <int N, bool is_max>
void spread_windows(const plan::PoolBackward& step, const plan::Image& image, const uint8_t* index, int64_t channel) {
  const float* dy = image.at(step.tile) + channel;
  float* dx = image.at(step.dx) + channel;
  for (int64_t h = 0; h < step.tile.height; ++h) {
    const Window down(h, step.stride_h, step.padding_h, step.kernel_h, step.dx.height);
    for (int64_t w = 0; w < step.tile.width; ++w) {
      const Window across(w, step.stride_w, step.padding_w, step.kernel_w, step.dx.width);
      Channels<N> gradient(dy + h * step.tile.row + w * step.tile.pixel);
      Channels<N> winner;
      if constexpr (is_max) {
        winner = load_bytes<N>(index + (h * step.tile.width + w) * step.tile.channels + channel);
      } else {
        gradient = multiply(gradient, Channels<N>(1 / divisor(step, down, across)));
      }
      for (int64_t i = down.begin; i < down.end; ++i) {
        float* out = dx + (down.start + i) * step.dx.row + (across.start + across.begin) * step.dx.pixel;
        for (int64_t j = across.begin; j < across.end; ++j, out += step.dx.pixel) {
          Channels<N> share = gradient;
          if constexpr (is_max) {
            const Vec number(static_cast<float>(i * step.kernel_w + j));
            share = each([&](const Vec& g, const Vec& k) { return (k == number) & g; }, gradient, winner);
          }
          add(Channels<N>(out), share).store(out);
        }
      }
    }
  }
}

// One row of output gradients, ready to be collected: an empty pixel at either end; numbers as floats. For the average,
// each with its neighbours.
template <int N, bool is_max>
void prepare_row(
    const plan::PoolBackward& step,
    const float* dy,
    const uint8_t* index,
    const Rows& rows,
    float* values,
    float* numbers) {
  const int64_t width = step.tile.width;
  if constexpr (is_max) {
    Channels<N>().store(values);
    Channels<N>().store(values + (width + 1) * N);
    for (int64_t w = 0; w < width; ++w) {
      Channels<N>(dy + w * step.tile.pixel).store(values + (w + 1) * N);
      load_bytes<N>(index + w * step.tile.channels).store(numbers + (w + 1) * N);
    }
  } else {
    const auto read = [&](int64_t w) {
      return multiply(Channels<N>(dy + w * step.tile.pixel), Channels<N>(1 / count_of(step, rows, w, width)));
    };
    Channels<N> left;
    Channels<N> here = read(0);
    for (int64_t w = 0; w < width; ++w) {
      const Channels<N> right = w + 1 < width ? read(w + 1) : Channels<N>();
      add(add(left, here), right).store(values + (w + 1) * N);
      left = here;
      here = right;
    }
  }
}

// Input pixels collect from the windows they lie in. `tile`: three rows of gradients, and of numbers.
template <int N, bool is_max>
void collect_separably(const plan::PoolBackward& step, const plan::Image& image, const uint8_t* index, int64_t channel) {
  const float* dy = image.at(step.tile) + channel;
  float* dx = image.at(step.dx) + channel;
  const int64_t height = step.dx.height;
  const int64_t width = step.dx.width;
  const int64_t length = (width + 2) * N;
  const auto values = [&](int64_t h) { return image.tile + h % kSide * length; };
  const auto prepare = [&](int64_t h) {
    const uint8_t* bytes = is_max ? index + h * width * step.tile.channels + channel : nullptr;
    float* to = values(h);
    prepare_row<N, is_max>(step, dy + h * step.tile.row, bytes, Rows(h, height), to, to + kSide * length);
  };
  prepare(0);
  for (int64_t h = 0; h < height; ++h) {
    if (h + 1 < height) {
      prepare(h + 1);
    }
    const Rows rows(h, height);
    switch_rows(rows, [&](auto count) {
      const float* in[kSide];
      // output pixel (row(h) + i, w + j - 1) has this one at row 2 - first - i, column 2 - j of its window
      Vec numbers[kSide][kSide];
      for (int i = 0; i < count; ++i) {
        in[i] = values(rows.row(h) + i);
        for (int j = 0; j < kSide; ++j) {
          numbers[i][j] = Vec(static_cast<float>((2 - rows.first - i) * kSide + 2 - j));
        }
      }
      float* out = dx + h * step.dx.row;
      for (int64_t w = 0; w < width; ++w, out += step.dx.pixel) {
        Channels<N> sum(out);
        for (int i = 0; i < count; ++i) {
          const float* row = in[i] + w * N;
          if constexpr (is_max) {
            for (int j = 0; j < kSide; ++j) {
              const Channels<N> winner(row + kSide * length + j * N);
              sum = add(
                  sum,
                  each(
                      [&](const Vec& g, const Vec& k) { return (k == numbers[i][j]) & g; },
                      Channels<N>(row + j * N),
                      winner));
            }
          } else {
            sum = add(sum, Channels<N>(row + N));
          }
        }
        sum.store(out);
      }
    });
  }
}

template <typename Visit>
void switch_bool(bool value, const Visit& visit) {
  if (value) {
    visit(std::true_type{});
  } else {
    visit(std::false_type{});
  }
}

}  // namespace

int64_t plan_pool_tile(const plan::Pool& step) {
  return is_separable(step) ? 2 * kSide * kLine * step.x.width : 0;
}

int64_t plan_pool_backward_tile(const plan::PoolBackward& step) {
  return is_separable(step) ? 2 * kSide * kLine * (step.dx.width + 2) : 0;
}

void plan_pool(const plan::Pool& step, const plan::Image& image) {
  switch_bool(step.is_max != 0, [&](auto is_max) {
    switch_bool(is_max && step.index >= 0, [&](auto with_index) {
      for_channels(0, step.y.channels, [&](int64_t channel, auto n) {
        if constexpr (is_max || !with_index) {
          if (is_separable(step)) {
            pool_separably<n, is_max, with_index>(step, image, channel);
          } else {
            pool_windows<n, is_max, with_index>(step, image, channel);
          }
        }
      });
    });
  });
}

void plan_pool_backward(const plan::PoolBackward& step, const plan::Image& image) {
  plan_combine({step.terms, step.constant, plan::kIdentity, step.tile, 0, plan::kNone}, image);
  const uint8_t* index = nullptr;
  if (step.is_max) {
    index = reinterpret_cast<const uint8_t*>(image.slab + step.index + image.number * step.index_image);
  }
  switch_bool(step.is_max != 0, [&](auto is_max) {
    for_channels(0, step.tile.channels, [&](int64_t channel, auto n) {
      if (is_separable(step)) {
        collect_separably<n, is_max>(step, image, index, channel);
      } else {
        spread_windows<n, is_max>(step, image, index, channel);
      }
    });
  });
}

}  // namespace nascompile::CPU_CAPABILITY
