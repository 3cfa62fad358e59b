// What a run of a program does, in order: its operations whose flags hold, phase by phase.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan.h"

namespace nascompile::plan {

// A barrier operation or a step. `number` counts all of the program, phase by phase, barrier operations first.
struct Operation {
  int64_t kind;
  const int64_t* fields;
  int64_t number;
  bool begins = false;  // as in Image
};

class Sequence {
 public:
  // The next operation of the phase, whose flag holds.
  void add(const Operation& operation, const int64_t* program);
  void end_phase() {
    ends_.push_back(operations_.size());
  }
  const Operation* begin(int64_t phase) const {
    return operations_.data() + (phase == 0 ? 0 : ends_[phase - 1]);
  }
  const Operation* end(int64_t phase) const {
    return operations_.data() + ends_[phase];
  }

 private:
  std::vector<Operation> operations_;
  std::vector<std::size_t> ends_;
};

}  // namespace nascompile::plan
