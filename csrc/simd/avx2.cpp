#include "kernels.h"

#ifdef __AVX2__
#include "avx2.h"
#include "table.h"

namespace persona {
const Kernels* const avx2_kernels = &table<Avx2>;
}  // namespace persona
#else
namespace persona {
const Kernels* const avx2_kernels = nullptr;
}  // namespace persona
#endif
