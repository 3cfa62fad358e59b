// A program under its flags, made ready to run: what is the same in all its runs is found once. No torch types.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "plan.h"
#include "plan_ahead.h"
#include "plan_sequence.h"

namespace nascompile::plan {

// What a program says of one of its tensors.
struct Expected {
  enum Kind : int64_t { kFloats, kCounter, kImages };

  int64_t number;
  Kind kind;      // contiguous fp32, contiguous int64, fp32 with these sizes and strides
  int64_t least;  // elements; of images their sizes say it
  std::array<int64_t, 4> sizes, strides;
};

class Prepared {
 public:
  // `words` of a program and `count` flags, which stay where they are as long as this object lives. Raises
  // std::runtime_error where they are not what this build can run.
  Prepared(const int64_t* program, int64_t words, const uint8_t* flags, int64_t count);

  // Of the operations whose flags hold.
  const std::vector<Expected>& expected() const {
    return expected_;
  }
  // All of the program, whether their flags hold or not.
  int64_t operations() const {
    return operations_;
  }
  // Carries out the program. `slab` has so many floats, `work` at least `work_size`, both aligned to 64 bytes; the tensors
  // are as expected. `seconds`: what every operation took is added, [chunks][operations]; or null.
  void run(float* slab, int64_t floats, float* work, void* const* tensors, double* seconds) const;

  int64_t work_size() const;

 private:
  const Header& header() const {
    return *reinterpret_cast<const Header*>(program_);
  }
  void add_phase(const Phase& phase, int64_t flags);
  void expect(int64_t number, int64_t least, Expected::Kind kind = Expected::kFloats);
  int64_t channels(const List<Segment>& segments) const;
  void expect_barrier(int64_t kind, const int64_t* fields);
  void expect_step(int64_t kind, const int64_t* fields);
  void check_lane() const;
  int64_t tile() const;

  const int64_t* const program_;
  const uint8_t* const flags_;
  Sequence barriers_, steps_;
  std::vector<Readings> readings_;  // per phase
  std::vector<Expected> expected_;
  int64_t operations_ = 0;
};

}  // namespace nascompile::plan
