#include "kernels.h"

#ifdef __AVX512BW__
#include "avx512.h"
#include "table.h"

namespace persona {
const Kernels* const avx512_kernels = &table<Avx512>;
}  // namespace persona
#else
namespace persona {
const Kernels* const avx512_kernels = nullptr;
}  // namespace persona
#endif
