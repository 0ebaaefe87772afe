// The choice of instruction set: what the CPU and the operating system can run, or what set_isa named.
#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace gptfast::cpu {
namespace {

constexpr const char* names[] = {"plain", "avx2", "avx512"};

bool usable(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::plain: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  }
  return false;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{usable(Isa::avx512) ? Isa::avx512 : usable(Isa::avx2) ? Isa::avx2 : Isa::plain};
  return value;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return names[static_cast<int>(isa)]; }

std::vector<std::string> usable_isas() {
  std::vector<std::string> found;
  for (const Isa candidate : {Isa::plain, Isa::avx2, Isa::avx512}) {
    if (usable(candidate)) found.emplace_back(isa_name(candidate));
  }
  return found;
}

void set_isa(const std::string& name) {
  for (const Isa candidate : {Isa::plain, Isa::avx2, Isa::avx512}) {
    if (name == isa_name(candidate) && usable(candidate)) {
      current().store(candidate, std::memory_order_relaxed);
      return;
    }
  }
  std::string allowed;
  for (const auto& usable_name : usable_isas()) allowed += (allowed.empty() ? "" : ", ") + usable_name;
  throw std::invalid_argument("instruction set " + name + " cannot run on this CPU; it has " + allowed);
}

}  // namespace gptfast::cpu
