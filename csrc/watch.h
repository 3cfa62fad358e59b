// Whether Python dictionaries, classes and objects are what they were: one number of each is compared, where a look into all
// entries would bring them all into the cache.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace nascompile {

class Watch {
 public:
  // Python counts the changes of its dictionaries up to version 3.12 (PEP 509, withdrawn by PEP 699).
  static constexpr bool kCounts = PY_VERSION_HEX < 0x030D0000;

  // dicts: dictionaries, or classes for their own. objects: whose classes and dictionaries, not what is in these, count. The
  // caller keeps all of them alive: what is held here no garbage collector would see.
  Watch(const std::vector<pybind11::object>& dicts, const std::vector<pybind11::object>& objects) {
    for (const pybind11::object& dict : dicts) {
      dicts_.push_back(reinterpret_cast<const PyDictObject*>(PyType_Check(dict.ptr()) ? of_class(dict.ptr()) : dict.ptr()));
      versions_.push_back(version(dicts_.back()));
    }
    for (const pybind11::object& object : objects) {
      objects_.push_back(object.ptr());
      types_.push_back(Py_TYPE(object.ptr()));
      held_.push_back(of_object(object.ptr()));
    }
  }

  // False as well where Python does not count.
  bool holds() const {
    bool same = kCounts;
    for (std::size_t k = 0; same && k < dicts_.size(); ++k) {
      same = version(dicts_[k]) == versions_[k];
    }
    for (std::size_t k = 0; same && k < objects_.size(); ++k) {
      same = Py_TYPE(objects_[k]) == types_[k] && of_object(objects_[k]) == held_[k];
    }
    return same;
  }

 private:
  // The dictionaries belong to the class and to the object: the references that are given back here are not the last ones.
  static PyObject* of_class(PyObject* type) {
#if PY_VERSION_HEX >= 0x030C0000
    PyObject* dict = PyType_GetDict(reinterpret_cast<PyTypeObject*>(type));
    Py_XDECREF(dict);
    return dict;
#else
    return reinterpret_cast<PyTypeObject*>(type)->tp_dict;
#endif
  }

  // nullptr for an object without one
  static PyObject* of_object(PyObject* object) {
    PyObject* dict = PyObject_GenericGetDict(object, nullptr);
    if (dict == nullptr) {
      PyErr_Clear();
    }
    Py_XDECREF(dict);
    return dict;
  }

  static uint64_t version([[maybe_unused]] const PyDictObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    return dict->ma_version_tag;
#pragma GCC diagnostic pop
#else
    return 0;
#endif
  }

  std::vector<const PyDictObject*> dicts_;
  std::vector<PyObject*> objects_;
  std::vector<uint64_t> versions_;
  std::vector<PyTypeObject*> types_;
  std::vector<PyObject*> held_;
};

}  // namespace nascompile
