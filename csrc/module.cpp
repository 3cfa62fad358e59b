// What python asks the extension about itself. No torch headers here; the operators are in ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "watch.h"

using nascompile::Isa;

static std::vector<Isa> built() {
#ifdef NASCOMPILE_X86
  return {Isa::plain, Isa::avx2, Isa::avx512};
#else
  return {Isa::plain};
#endif
}

static void select_by_name(const std::string& name) {
  for (const Isa isa : built()) {
    if (name == nascompile::isa_name(isa)) {
      if (!nascompile::is_supported(isa)) {
        throw std::invalid_argument("instruction set " + name + ": this processor does not have it");
      }
      return nascompile::select_isa(isa);
    }
  }
  throw std::invalid_argument("instruction set " + name + " is not built in; see instruction_sets()");
}

static bool cuda_compiled() {
#ifdef NASCOMPILE_CUDA
  return true;
#else
  return false;
#endif
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of nascompile; loading it registers the operators nascompile::*.";
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : built()) {
          names.push_back(nascompile::isa_name(isa));
        }
        return names;
      },
      "The instruction sets the CPU kernels are built for.");
  m.def(
      "selected_instruction_set",
      [] { return std::string(nascompile::isa_name(nascompile::selected_isa())); },
      "The one in use: the best this processor has.");
  m.def("select_instruction_set", &select_by_name, "Use another one, to test it; ValueError where that is not possible.");
  m.def(
      "lane",
      [] { return nascompile::isa_lane(nascompile::selected_isa()); },
      "What the plan kernels in use want channels padded to.");
  pybind11::class_<nascompile::Watch>(m, "Watch", "Whether dictionaries, classes and objects are what they were.")
      .def(pybind11::init<const std::vector<pybind11::object>&, const std::vector<pybind11::object>&>())
      .def("holds", &nascompile::Watch::holds, "False where something changed, or where Python does not say.");
  m.def("cuda_compiled", &cuda_compiled, "Whether the CUDA kernels are in this build.");
}
