// What python asks the extension about itself. No torch headers here; the operators are in ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of nascompile; loading it registers the operators nascompile::*.";
  m.def(
      "instruction_sets",
      [] {
#ifdef NASCOMPILE_X86
        return std::vector<std::string>{"DEFAULT", "AVX2", "AVX512"};
#else
        return std::vector<std::string>{"DEFAULT"};
#endif
      },
      "The instruction sets the CPU kernels are built for.");
  m.def(
      "selected_instruction_set",
      [] { return std::string(nascompile::isa_name(nascompile::selected_isa())); },
      "The one this processor uses.");
  m.def(
      "cuda_compiled",
      [] {
#ifdef NASCOMPILE_CUDA
        return true;
#else
        return false;
#endif
      },
      "Whether the CUDA kernels are in this build.");
}
