// The steps of a plan as the executor reads them: kernels/plan/steps.py says what each means, kernels/plan/program.py how
// a program is written down. Every structure has the fields of its twin in steps.py, in the same order, all int64.
#pragma once

#include <cstdint>

namespace nascompile::plan {

constexpr int64_t kVersion = 2;
constexpr int64_t kNone = -1;
constexpr int64_t kAlignment = 16;  // floats

enum Space : int64_t { kSlab = 0, kScratch = 1 };
enum Activation : int64_t {
  kIdentity,
  kRelu,
  kRelu6,
  kHardswish,
  kHardsigmoid,
  kSilu,
  kSigmoid,
  kGelu,
  kLeakyRelu,
  kElu,
  kNegative,
  kPositive
};

// `count` items of type T, one after another, at position `at` of the program.
template <typename T>
struct List {
  int64_t count, at;
  const T* in(const int64_t* program) const {
    return reinterpret_cast<const T*>(program + at);
  }
};

struct Map {
  int64_t space, offset, image, row, pixel, channels, height, width;
};
struct Tap {
  int64_t offset, weight;
};
struct Term {
  Map map;
  int64_t coefficient, flag;
};
struct Grid {
  int64_t top, left, step_h, step_w, rows, columns;
  List<Tap> taps;
};
struct Segment {
  int64_t logical, count, padded;
};

// ---- steps; each follows (kind, flag) ----
enum StepKind : int64_t {
  kLoad,
  kStore,
  kStage,
  kConvolve,
  kConvolveBackward,
  kPool,
  kPoolBackward,
  kCombine,
  kReduce,
  kUnstage,
  kMask,
  kPick,
  kGate,
  kGateGradient
};

struct Load {
  int64_t tensor, stride_n, stride_c, stride_h, stride_w;
  List<Segment> segments;
  Map target;
  int64_t adds;
};
struct Store {
  int64_t tensor, stride_n, stride_c, stride_h, stride_w;
  List<Segment> segments;
  Map source;
};
struct Stage {
  Map source;
  int64_t scale, shift, activation;
  Map target;
};
struct Convolve {
  Map x, y;
  int64_t stride_h, stride_w;
  List<Tap> depthwise_taps;
  int64_t depthwise_weights;
  List<Tap> taps;
  int64_t weights, moments;
};
struct ConvolveBackward {
  Map x;
  int64_t y_height, y_width, y_channels, stride_h, stride_w;
  List<Tap> depthwise_taps;
  int64_t depthwise_weights;
  List<Tap> taps;
  int64_t weights_transposed;
  List<Term> terms;
  int64_t constant;
  Map padded;
  List<Grid> grids;
  Map dx;
  int64_t needs_input, adds, depthwise_gradient, gradient;
};
struct Pool {
  Map x, y;
  int64_t is_max, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, counts_padding;
  int64_t index, index_image, moments;
};
struct PoolBackward {
  List<Term> terms;
  int64_t constant;
  Map tile, dx;
  int64_t is_max, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, counts_padding;
  int64_t index, index_image;
};
struct Combine {
  List<Term> terms;
  int64_t constant, activation;
  Map target;
  int64_t adds, moments;
};
struct Reduce {
  Map gradient;
  List<Term> terms;
  int64_t total;
};
struct Unstage {
  Map gradient, source;
  int64_t scale, shift, activation;
  Map target;
  int64_t adds, moments;
};
struct Mask {
  Map gradient, value;
  int64_t activation;
};

struct Pick {
  Map source, target;
  int64_t first_source, step_source, first_target, step_target, count, adds;
};
struct Gate {
  Map image, gate, target;
  int64_t adds, moments;
};
struct GateGradient {
  Map gradient, image, target;
};

// ---- barrier operations; each follows (kind, flag) ----
enum BarrierKind : int64_t {
  kPackDepthwise,
  kPackDense,
  kUnpackDepthwise,
  kUnpackDense,
  kNormalise,
  kCoefficients,
  kNormaliseBackward,
  kDecisionGradient
};

struct PackDepthwise {
  int64_t tensor, count;
  List<Segment> segments;
  int64_t channels, target;
};
struct PackDense {
  int64_t tensor, count;
  List<Segment> in_segments, out_segments;
  int64_t in_channels, out_channels, target, transposed;
};
struct UnpackDepthwise {
  int64_t source, count;
  List<Segment> segments;
  int64_t channels, tensor;
};
struct UnpackDense {
  int64_t source, count;
  List<Segment> in_segments, out_segments;
  int64_t in_channels, out_channels, tensor;
};
struct Normalise {
  int64_t moments, elements;
  double epsilon, momentum;
  int64_t gamma, beta, running_mean, running_var, counter;
  List<Segment> segments;
  int64_t channels, out;
};
struct Weighted {
  int64_t weight, scale, shift, out, flag;
};
struct Coefficients {
  List<Weighted> terms;
  int64_t decision, constant, channels;
};
struct Upstream {
  int64_t weight, sum_g, sum_gy, out, flag;
};
struct NormaliseBackward {
  int64_t vectors, elements;
  List<Upstream> upstream;
  int64_t decision, by_y, constant, starts, gamma, beta;
  List<Segment> segments;
  int64_t channels;
};
struct DecisionGradient {
  int64_t weight, sum_g, sum_gy, scale, shift, channels, tensor;
};

struct Phase {
  int64_t barriers, barriers_at, steps, steps_at;
};
struct Header {
  int64_t version, images, chunks, lane, sums, gradients, scratch, phases, phases_at;
};

class Ahead;

// What a chunk's steps work on, for one image: the program for its lists, the slab, the chunk's own memory.
struct Image {
  const int64_t* program;
  float* slab;
  const uint8_t* flags;
  void* const* tensors;
  double* sums;
  float* gradients;
  float* scratch;
  // at least kTile floats of each kernel's own: row blocks of what is never stored whole
  float* tile;
  int64_t number;  // the image's
  // whether the slab is too large for the caches: what is not read soon does better to go past them
  bool streams;
  // whether the step writes where it would add: nothing has been added there yet
  bool begins;
  Ahead* ahead;

  float* at(const Map& map) const {
    return map.space == kSlab ? slab + map.offset + number * map.image : scratch + map.offset;
  }
  bool holds(int64_t flag) const {
    return flag < 0 || flags[flag] != 0;
  }
};

}  // namespace nascompile::plan
