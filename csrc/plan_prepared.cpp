// Checks a program at the border, then carries it out phase by phase.
#include "plan_prepared.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>

#include "cpu/isa.h"
#include "plan_barriers.h"
#include "plan_uses.h"

namespace nascompile::plan {
namespace {

constexpr int64_t kHeaderWords = sizeof(Header) / sizeof(int64_t);
// floats: the last-level cache of a large processor
constexpr int64_t kCached = int64_t{8} << 20;

// Where the seconds of every operation go: [chunks][operations], or null where nobody asks.
struct Clock {
  double* seconds;
  int64_t operations;

  template <typename Work>
  void time(int64_t chunk, int64_t operation, const Work& work) const {
    if (seconds == nullptr) {
      work();
      return;
    }
    const auto start = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    seconds[chunk * operations + operation] += passed.count();
  }
};

// Memory for the tiles of all chunks; kept by the thread that runs plans, as they are run over and over.
float* tiles(int64_t floats) {
  struct Free {
    void operator()(float* memory) const {
      std::free(memory);
    }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset(static_cast<float*>(std::aligned_alloc(kAlignment * sizeof(float), floats * sizeof(float))));
    size = memory ? floats : 0;
    STD_TORCH_CHECK(memory, "run_plan: no memory for tiles of ", floats, " floats");
  }
  return memory.get();
}

// visit(first, last) over all numbers below `count`, one by one shared out among the threads
template <typename Visit>
void share_out(int64_t count, const Visit& visit) {
  if (count == 1) {
    visit(0, 1);
  } else {
    torch::stable::parallel_for(0, count, 1, visit);
  }
}

void clear(const Run& run) {
  share_out(run.header().chunks, [&](int64_t first, int64_t last) {
    std::fill_n(run.work + first * run.chunk, (last - first) * run.chunk, 0.0f);
  });
}

void run_barriers(const Run& run, const Operation* begin, const Operation* end, const Clock& clock) {
  const auto carry_out = [&](const Operation& op) {
    clock.time(0, op.number, [&] { run_barrier(op.kind, op.fields, run); });
  };
  for (const Operation* next = begin; next != end;) {
    const Operation* stop = std::find_if(next, end, [](const Operation& op) { return !is_packing(op.kind); });
    if (stop == next) {
      carry_out(*next);
      ++next;
      continue;
    }
    torch::stable::parallel_for(0, stop - next, 4, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        carry_out(next[k]);
      }
    });
    next = stop;
  }
}

Turns turns_of(const Header& header, int64_t chunk, bool is_reversed) {
  const int64_t first = header.images * chunk / header.chunks;
  const int64_t stop = header.images * (chunk + 1) / header.chunks;
  return is_reversed ? Turns{stop - 1, -1, stop - first} : Turns{first, 1, stop - first};
}

void run_steps(
    const Run& run, const Operation* begin, const Operation* end, const Readings& readings, float* memory, int64_t tile,
    bool is_reversed, const Clock& clock) {
  const Header& header = run.header();
  const auto kernel = NASCOMPILE_PICK(plan_step);
  share_out(header.chunks, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      Image image{
          run.program,
          run.slab,
          run.flags,
          run.tensors,
          run.sums(chunk),
          run.gradients(chunk),
          run.scratch(chunk),
          memory + chunk * tile,
          0,
          run.streams,
          false,
          nullptr};
      const Turns turns = turns_of(header, chunk, is_reversed);
      Ahead ahead(readings, run.slab, turns);
      image.ahead = &ahead;
      for (int64_t turn = 0; turn < turns.count; ++turn) {
        image.number = turns.image(turn);
        for (const Operation* step = begin; step != end; ++step) {
          ahead.begin(turn, step - begin);
          image.begins = step->begins;
          clock.time(chunk, step->number, [&] { kernel(step->kind, step->fields, image); });
        }
      }
#ifdef NASCOMPILE_X86
      // what went past the caches is there for everyone
      __builtin_ia32_sfence();
#endif
    }
  });
}

}  // namespace

Prepared::Prepared(const int64_t* program, int64_t words, const uint8_t* flags, int64_t count)
    : program_(program), flags_(flags) {
  STD_TORCH_CHECK(words >= kHeaderWords, "run_plan: program is too short to be one");
  STD_TORCH_CHECK(
      header().version == kVersion,
      "run_plan: program has version ",
      header().version,
      ", this build runs version ",
      kVersion);
  STD_TORCH_CHECK(header().chunks >= 1, "run_plan: the program has ", header().chunks, " chunks, at least 1 is needed");
  check_lane();
  const auto* phases = reinterpret_cast<const Phase*>(program + header().phases_at);
  for (int64_t k = 0; k < header().phases; ++k) {
    add_phase(phases[k], count);
  }
}

void Prepared::add_phase(const Phase& phase, int64_t flags) {
  const auto add = [&](Sequence& sequence, int64_t count, int64_t at, const auto& expect) {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t* const words = program_ + program_[at + k];
      const int64_t flag = words[1];
      STD_TORCH_CHECK(flag < flags, "run_plan: the program uses flag ", flag, ", there are ", flags);
      if (flag < 0 || flags_[flag] != 0) {
        expect(words[0], words + 2);
        sequence.add({words[0], words + 2, operations_ + k}, program_);
      }
    }
    sequence.end_phase();
    operations_ += count;
  };
  add(barriers_, phase.barriers, phase.barriers_at, [&](int64_t kind, const int64_t* fields) { expect_barrier(kind, fields); });
  add(steps_, phase.steps, phase.steps_at, [&](int64_t kind, const int64_t* fields) { expect_step(kind, fields); });
  const auto number = static_cast<int64_t>(readings_.size());
  readings_.emplace_back(steps_.begin(number), steps_.end(number), program_, flags_);
}

void Prepared::expect(int64_t number, int64_t least, Expected::Kind kind) {
  if (number >= 0) {
    expected_.push_back({number, kind, least, {}, {}});
  }
}

// Of a tensor: as many as its last segment needs.
int64_t Prepared::channels(const List<Segment>& segments) const {
  int64_t most = 0;
  for (int64_t k = 0; k < segments.count; ++k) {
    const Segment& segment = segments.in(program_)[k];
    most = std::max(most, segment.logical + segment.count);
  }
  return most;
}

void Prepared::expect_barrier(int64_t kind, const int64_t* fields) {
  const auto dense = [&](const auto& op) {
    expect(op.tensor, op.count * channels(op.in_segments) * channels(op.out_segments));
  };
  const auto depthwise = [&](const auto& op) { expect(op.tensor, op.count * channels(op.segments)); };
  const auto decision = [&](int64_t number, const auto& list) {
    int64_t most = 0;
    for (int64_t k = 0; k < list.count; ++k) {
      most = std::max(most, list.in(program_)[k].weight + 1);
    }
    expect(number, most);
  };
  switch (kind) {
    case kPackDepthwise:
      return depthwise(as<PackDepthwise>(fields));
    case kPackDense:
      return dense(as<PackDense>(fields));
    case kUnpackDepthwise:
      return depthwise(as<UnpackDepthwise>(fields));
    case kUnpackDense:
      return dense(as<UnpackDense>(fields));
    case kNormalise: {
      const auto& op = as<Normalise>(fields);
      for (const int64_t number : {op.gamma, op.beta, op.running_mean, op.running_var}) {
        expect(number, channels(op.segments));
      }
      return expect(op.counter, 1, Expected::kCounter);
    }
    case kCoefficients:
      return decision(as<Coefficients>(fields).decision, as<Coefficients>(fields).terms);
    case kNormaliseBackward: {
      const auto& op = as<NormaliseBackward>(fields);
      decision(op.decision, op.upstream);
      // gradients that are left out where nothing reaches the normalisation
      expect(op.gamma, 0);
      return expect(op.beta, 0);
    }
    case kDecisionGradient:
      return expect(as<DecisionGradient>(fields).tensor, as<DecisionGradient>(fields).weight + 1);
    default:
      STD_TORCH_CHECK(false, "run_plan: there is no barrier operation of kind ", kind);
  }
}

void Prepared::expect_step(int64_t kind, const int64_t* fields) {
  STD_TORCH_CHECK(kind >= kLoad && kind <= kGateGradient, "run_plan: there is no step of kind ", kind);
  // what Load and Store go over: `step` has the strides of an (n, c, h, w) tensor
  const auto images = [&](const auto& step, const Map& map) {
    expected_.push_back(
        {step.tensor,
         Expected::kImages,
         0,
         {header().images, channels(step.segments), map.height, map.width},
         {step.stride_n, step.stride_c, step.stride_h, step.stride_w}});
  };
  if (kind == kLoad) {
    images(as<Load>(fields), as<Load>(fields).target);
  } else if (kind == kStore) {
    images(as<Store>(fields), as<Store>(fields).source);
  }
}

void Prepared::check_lane() const {
  const int64_t lane = isa_lane(selected_isa());
  STD_TORCH_CHECK(
      header().lane % lane == 0,
      "run_plan: the program pads channels to a multiple of ",
      header().lane,
      ", the kernels in use need ",
      lane);
}

int64_t Prepared::work_size() const {
  return header().chunks * chunk_size(header());
}

int64_t Prepared::tile() const {
  const auto tile_of = NASCOMPILE_PICK(plan_tile);
  int64_t most = 0;
  for (int64_t k = 0; k < header().phases; ++k) {
    for (const Operation* step = steps_.begin(k); step != steps_.end(k); ++step) {
      most = std::max(most, tile_of(step->kind, step->fields, program_));
    }
  }
  return apart(most);
}

void Prepared::run(float* slab, int64_t floats, float* work, void* const* tensors, double* seconds) const {
  // another instruction set may have been chosen meanwhile
  check_lane();
  const Run run{program_, slab, work, chunk_size(header()), flags_, tensors, floats > kCached};
  const Clock clock{seconds, operations_};
  const int64_t tile = this->tile();
  float* const memory = tiles(header().chunks * tile);
  clear(run);
  for (int64_t k = 0; k < header().phases; ++k) {
    run_barriers(run, barriers_.begin(k), barriers_.end(k), clock);
    if (steps_.begin(k) != steps_.end(k)) {
      // to and fro: the images that come first were the last ones before, and may be in a cache
      run_steps(run, steps_.begin(k), steps_.end(k), readings_[k], memory, tile, k % 2 == 1, clock);
    }
  }
}

}  // namespace nascompile::plan
