// What python asks the extension about itself. No torch headers here; the operators are in ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "plan_prepared.h"
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

using nascompile::plan::Prepared;

template <typename T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (number, kind, least elements, sizes, strides) of every tensor that is used
static std::vector<pybind11::tuple> expected(const Prepared& prepared) {
  std::vector<pybind11::tuple> rows;
  for (const auto& tensor : prepared.expected()) {
    rows.push_back(pybind11::make_tuple(tensor.number, static_cast<int64_t>(tensor.kind), tensor.least, tensor.sizes, tensor.strides));
  }
  return rows;
}

static void run(
    const Prepared& prepared, uintptr_t slab, int64_t floats, uintptr_t work, const std::vector<uintptr_t>& tensors,
    uintptr_t seconds) {
  std::vector<void*> data(tensors.size());
  std::transform(tensors.begin(), tensors.end(), data.begin(), pointer<void>);
  const pybind11::gil_scoped_release others_may_run;
  prepared.run(pointer<float>(slab), floats, pointer<float>(work), data.data(), pointer<double>(seconds));
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
      "The one in use: the best that this processor has and ATEN_CPU_CAPABILITY, as for torch, allows.");
  m.def("select_instruction_set", &select_by_name, "Use another one, to test it; ValueError where that is not possible.");
  m.def(
      "lane",
      [] { return nascompile::isa_lane(nascompile::selected_isa()); },
      "What the plan kernels in use want channels padded to.");
  pybind11::class_<nascompile::Watch>(m, "Watch", "Whether dictionaries, classes and objects are what they were.")
      .def(pybind11::init<const std::vector<pybind11::object>&, const std::vector<pybind11::object>&>())
      .def("holds", &nascompile::Watch::holds, "False where something changed, or where Python does not say.");
  pybind11::class_<Prepared>(m, "Prepared", "A program under its flags, ready to run. Memory is given by its address.")
      .def(
          pybind11::init([](uintptr_t program, int64_t words, uintptr_t flags, int64_t count) {
            return std::make_unique<Prepared>(pointer<int64_t>(program), words, pointer<uint8_t>(flags), count);
          }),
          "The program and the flags have to stay where they are.")
      .def_property_readonly("expected", &expected, "Of every tensor used: number, kind, least elements, sizes and strides; csrc/plan_prepared.h.")
      .def_property_readonly("operations", &Prepared::operations, "All of the program.")
      .def_property_readonly("work", &Prepared::work_size, "Floats of work memory.")
      .def("run", &run, "Carry it out: slab, its floats, work, tensors, and [chunks][operations] of seconds or 0.");
  m.def("cuda_compiled", &cuda_compiled, "Whether the CUDA kernels are in this build.");
}
