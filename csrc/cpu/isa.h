// Which instruction set the kernels run with. Every *_kernel.h is compiled once per ISA, each in a namespace of that name; the same
// source, the same flags for all other code, so that a CPU never meets an instruction it does not have.
#pragma once

#include <string>
#include <vector>

namespace gptfast::cpu {

enum class Isa { plain, avx2, avx512 };

Isa isa();                               // in use: the best this CPU has, unless set_isa named another
void set_isa(const std::string& name);   // throws std::invalid_argument where the CPU lacks it
const char* isa_name(Isa isa);
std::vector<std::string> usable_isas();  // worst to best

}  // namespace gptfast::cpu

// Declares a kernel in the three namespaces: GPTFAST_PER_ISA(void layer_norm_forward(const LayerNorm&, long, long))
#define GPTFAST_PER_ISA(declaration)                     \
  namespace gptfast::cpu {                               \
  namespace plain { declaration; }                       \
  namespace avx2 { declaration; }                        \
  namespace avx512 { declaration; }                      \
  }

// Calls it in the namespace in use: GPTFAST_CALL(layer_norm_forward, arguments, begin, end)
#define GPTFAST_CALL(kernel, ...)                                             \
  (::gptfast::cpu::isa() == ::gptfast::cpu::Isa::avx512                       \
       ? ::gptfast::cpu::avx512::kernel(__VA_ARGS__)                          \
       : ::gptfast::cpu::isa() == ::gptfast::cpu::Isa::avx2                   \
             ? ::gptfast::cpu::avx2::kernel(__VA_ARGS__)                      \
             : ::gptfast::cpu::plain::kernel(__VA_ARGS__))
