// What happens once between the phases of a plan: plain C++ in double precision, no torch types.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"

namespace nascompile::plan {

inline int64_t aligned(int64_t floats) {
  return (floats + kAlignment - 1) / kAlignment * kAlignment;
}

// Floats. What two threads write lies pages apart: prefetchers go on beyond what one of them reads, and would take from the
// other what it is about to write. No whole number of pages, or what is added up of several threads would meet in the cache.
constexpr int64_t kGap = 4096 + 7 * kAlignment;

// Floats of memory for one thread and the gap to that of the next.
inline int64_t apart(int64_t floats) {
  return floats == 0 ? 0 : aligned(floats) + kGap;
}

// Floats of work memory of a chunk: [sums | gradients | scratch], each aligned, and the gap.
inline int64_t chunk_size(const Header& header) {
  return apart(aligned(2 * header.sums) + aligned(header.gradients) + aligned(header.scratch));
}

// A run of a program: everything that all its chunks share.
struct Run {
  const int64_t* program;
  float* slab;
  float* work;    // of all chunks, one after another
  int64_t chunk;  // floats from one to the next
  const uint8_t* flags;
  void* const* tensors;
  bool streams;  // as in Image

  const Header& header() const {
    return *reinterpret_cast<const Header*>(program);
  }
  double* sums(int64_t number) const {
    return reinterpret_cast<double*>(work + number * chunk);
  }
  float* gradients(int64_t number) const {
    return work + number * chunk + aligned(2 * header().sums);
  }
  float* scratch(int64_t number) const {
    return gradients(number) + aligned(header().gradients);
  }
  // of all chunks
  void clear_gradients(int64_t first, int64_t count) const {
    for (int64_t number = 0; number < header().chunks; ++number) {
      std::fill_n(gradients(number) + first, count, 0.0f);
    }
  }
  bool holds(int64_t flag) const {
    return flag < 0 || flags[flag] != 0;
  }
  float* tensor(int64_t number) const {
    return number < 0 ? nullptr : static_cast<float*>(tensors[number]);
  }
  float* vector(int64_t offset) const {
    return offset < 0 ? nullptr : slab + offset;
  }
};

// Packs weights or unpacks their gradients: depends on no other operation of its phase.
inline bool is_packing(int64_t kind) {
  return kind == kPackDepthwise || kind == kPackDense || kind == kUnpackDepthwise || kind == kUnpackDense;
}

// Carries out one barrier operation; `fields` follows its kind and flag, which holds.
void run_barrier(int64_t kind, const int64_t* fields, const Run& run);

}  // namespace nascompile::plan
