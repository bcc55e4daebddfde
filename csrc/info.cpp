// What was built and what runs, for `python -m kernels` and the tests. setup.py defines the two macros.
#include "ops.h"
#include "simd/kernels.h"

namespace persona {

std::string build_info() { return "torch " PERSONA_TORCH_VERSION ", flags " PERSONA_FLAGS; }

bool has_cuda() {
#ifdef USE_CUDA
  return true;
#else
  return false;
#endif
}

std::string instruction_sets() {
  std::string names;
  for (const Kernels* const* table = available_kernels(); *table != nullptr; ++table)
    names += (names.empty() ? "" : " ") + std::string((*table)->name);
  return names;
}

std::string instruction_set() { return kernels().name; }

bool use_instruction_set(std::string name) { return use_kernels(name.c_str()); }

}  // namespace persona
