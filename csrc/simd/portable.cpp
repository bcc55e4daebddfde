#include "portable.h"

#include "table.h"

namespace persona {
const Kernels* const portable_kernels = &table<Portable>;
}  // namespace persona
