// The engine as a Python class.
#pragma once

#include <pybind11/pybind11.h>

namespace gptfast::cpu::engine {

void bind(pybind11::module_& module);

}  // namespace gptfast::cpu::engine
