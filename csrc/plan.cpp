// The operators run_plan and profile_plan: check a program and its memory at the border, then carry it out phase by
// phase.
#include "plan.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "ops.h"
#include "plan_ahead.h"
#include "plan_barriers.h"
#include "plan_check.h"
#include "plan_sequence.h"

namespace nascompile {
namespace {

constexpr int64_t kHeaderWords = sizeof(plan::Header) / sizeof(int64_t);
// floats: the last-level cache of a large processor
constexpr int64_t kCached = int64_t{8} << 20;
constexpr int64_t kBytes = plan::kAlignment * sizeof(float);

void check_memory(const char* name, const Tensor& tensor, ScalarType type, const char* type_name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == type && tensor.is_contiguous(),
      "run_plan: ",
      name,
      " must be a contiguous ",
      type_name,
      " tensor on the CPU");
}

void check_aligned(const char* name, const Tensor& tensor) {
  check_memory(name, tensor, ScalarType::Float, "fp32");
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kBytes == 0,
      "run_plan: ",
      name,
      " must begin at a multiple of 64 bytes");
}

const plan::Header& check_program(const Tensor& program) {
  check_memory("program", program, ScalarType::Long, "int64");
  STD_TORCH_CHECK(program.numel() >= kHeaderWords, "run_plan: program is too short to be one");
  const auto& header = *static_cast<const plan::Header*>(program.const_data_ptr());
  STD_TORCH_CHECK(
      header.version == plan::kVersion,
      "run_plan: program has version ",
      header.version,
      ", this build runs version ",
      plan::kVersion);
  const int64_t lane = isa_lane(selected_isa());
  STD_TORCH_CHECK(
      header.lane % lane == 0,
      "run_plan: the program pads channels to a multiple of ",
      header.lane,
      ", the kernels in use need ",
      lane);
  STD_TORCH_CHECK(header.chunks >= 1, "run_plan: the program has ", header.chunks, " chunks, at least 1 is needed");
  return header;
}

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

using plan::Operation;

// Adds the operations of a phase whose flags hold, after `check(kind, fields)`; `number` is that of the first.
template <typename Check>
void add_phase(
    plan::Sequence& sequence, const int64_t* program, int64_t count, int64_t at, int64_t number, const Tensor& flags,
    const Check& check) {
  const auto* values = static_cast<const uint8_t*>(flags.const_data_ptr());
  for (int64_t k = 0; k < count; ++k) {
    const int64_t* words = program + program[at + k];
    const int64_t flag = words[1];
    STD_TORCH_CHECK(
        flag < flags.numel(), "run_plan: the program uses flag ", flag, ", there are ", flags.numel());
    if (flag < 0 || values[flag] != 0) {
      check(words[0], words + 2);
      sequence.add({words[0], words + 2, number + k}, program);
    }
  }
  sequence.end_phase();
}

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
    memory.reset(static_cast<float*>(std::aligned_alloc(kBytes, floats * sizeof(float))));
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

void clear(const plan::Run& run) {
  share_out(run.header().chunks, [&](int64_t first, int64_t last) {
    std::fill_n(run.work + first * run.chunk_size(), (last - first) * run.chunk_size(), 0.0f);
  });
}

void run_barriers(const plan::Run& run, const Operation* begin, const Operation* end, const Clock& clock) {
  const auto carry_out = [&](const Operation& op) {
    clock.time(0, op.number, [&] { plan::run_barrier(op.kind, op.fields, run); });
  };
  for (const Operation* next = begin; next != end;) {
    const Operation* stop = std::find_if(next, end, [](const Operation& op) { return !plan::is_packing(op.kind); });
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

plan::Turns turns_of(const plan::Header& header, int64_t chunk, bool is_reversed) {
  const int64_t first = header.images * chunk / header.chunks;
  const int64_t stop = header.images * (chunk + 1) / header.chunks;
  return is_reversed ? plan::Turns{stop - 1, -1, stop - first} : plan::Turns{first, 1, stop - first};
}

void run_steps(
    const plan::Run& run, const Operation* begin, const Operation* end, float* memory, int64_t tile, bool is_reversed,
    const Clock& clock) {
  const plan::Header& header = run.header();
  const auto kernel = NASCOMPILE_PICK(plan_step);
  plan::Readings readings;
  for (const Operation* step = begin; step != end; ++step) {
    readings.add(*step, run.program, run.flags);
  }
  share_out(header.chunks, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      plan::Image image{
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
      const plan::Turns turns = turns_of(header, chunk, is_reversed);
      plan::Ahead ahead(readings, run.slab, turns);
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

int64_t count_operations(const plan::Header& header, const int64_t* words) {
  const auto* phases = reinterpret_cast<const plan::Phase*>(words + header.phases_at);
  int64_t count = 0;
  for (int64_t k = 0; k < header.phases; ++k) {
    count += phases[k].barriers + phases[k].steps;
  }
  return count;
}

void carry_out(
    const Tensor& program,
    const Tensor& slab,
    const Tensor& work,
    const Tensor& flags,
    const std::vector<Tensor>& tensors,
    const Clock& clock) {
  const plan::Header& header = check_program(program);
  const auto* words = static_cast<const int64_t*>(program.const_data_ptr());
  check_aligned("slab", slab);
  check_aligned("work", work);
  check_memory("flags", flags, ScalarType::Byte, "uint8");
  std::vector<void*> data;
  std::vector<int64_t> rows;
  for (const Tensor& tensor : tensors) {
    data.push_back(tensor.mutable_data_ptr());
    rows.push_back(tensor.dim() == 0 || tensor.size(0) == 0 ? 0 : tensor.numel() / tensor.size(0));
  }
  const plan::Run run{
      words,
      static_cast<float*>(slab.mutable_data_ptr()),
      static_cast<float*>(work.mutable_data_ptr()),
      static_cast<const uint8_t*>(flags.const_data_ptr()),
      data.data(),
      rows.data(),
      slab.numel() > kCached};
  STD_TORCH_CHECK(
      work.numel() >= header.chunks * run.chunk_size(),
      "run_plan: work has ",
      work.numel(),
      " floats, the program needs ",
      header.chunks * run.chunk_size());

  // all checks come before anything is written
  const TensorCheck check(tensors, header);
  const auto tile_of = NASCOMPILE_PICK(plan_tile);
  plan::Sequence barriers;
  plan::Sequence steps;
  int64_t tile = 0;
  int64_t number = 0;
  const auto* phases = reinterpret_cast<const plan::Phase*>(words + header.phases_at);
  for (int64_t k = 0; k < header.phases; ++k) {
    const plan::Phase& phase = phases[k];
    add_phase(barriers, words, phase.barriers, phase.barriers_at, number, flags, [&](int64_t kind, const int64_t* fields) {
      check_barrier(kind, fields, check);
    });
    number += phase.barriers;
    add_phase(steps, words, phase.steps, phase.steps_at, number, flags, [&](int64_t kind, const int64_t* fields) {
      check_step(kind, fields, check);
      tile = std::max(tile, plan::aligned(tile_of(kind, fields, words)));
    });
    number += phase.steps;
  }
  float* memory = tiles(header.chunks * tile);

  clear(run);
  for (int64_t k = 0; k < header.phases; ++k) {
    run_barriers(run, barriers.begin(k), barriers.end(k), clock);
    if (steps.begin(k) != steps.end(k)) {
      // to and fro: the images that come first were the last ones before, and may be in a cache
      run_steps(run, steps.begin(k), steps.end(k), memory, tile, k % 2 == 1, clock);
    }
  }
}

}  // namespace

void run_plan_cpu(
    const Tensor& program,
    const Tensor& slab,
    const Tensor& work,
    const Tensor& flags,
    const std::vector<Tensor>& tensors) {
  carry_out(program, slab, work, flags, tensors, Clock{nullptr, 0});
}

void profile_plan_cpu(
    const Tensor& program,
    const Tensor& slab,
    const Tensor& work,
    const Tensor& flags,
    const std::vector<Tensor>& tensors,
    const Tensor& seconds) {
  const plan::Header& header = check_program(program);
  check_memory("seconds", seconds, ScalarType::Double, "fp64");
  const int64_t operations = count_operations(header, static_cast<const int64_t*>(program.const_data_ptr()));
  STD_TORCH_CHECK(
      seconds.numel() == header.chunks * operations,
      "run_plan: seconds has ",
      seconds.numel(),
      " elements, the program has ",
      header.chunks,
      " chunks of ",
      operations,
      " operations");
  carry_out(program, slab, work, flags, tensors, Clock{static_cast<double*>(seconds.mutable_data_ptr()), operations});
}

}  // namespace nascompile
