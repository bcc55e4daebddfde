// Schemas and registration. The ops' meaning, checks and fake kernels are in kernels/ops/*/__init__.py; these are
// the functions behind the "cpp" backend. Selections return 0, or 1 or 2 where scores or tiebreak hold NaN or +inf;
// products return whether every persona exists.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(persona_native, m) {
  m.def("activation_stats(Tensor x, Tensor role, Tensor persona, Tensor(a!) sums, Tensor? spans) -> Tensor");
  m.def("mask_select(Tensor values, Tensor? channel, Tensor? tiebreak, int keep, Tensor(a!) bits) -> int");
  m.def("mask_select_nm(Tensor weight, Tensor channel, int n, int m, Tensor(a!) bits) -> int");
  m.def("mask_select_threshold(Tensor scores, float threshold, int ties, Tensor(a!) bits) -> int");
  m.def("count_digits(Tensor scores, int level, int prefix, Tensor(a!) counts) -> int");
  m.def("pack_bits(Tensor mask, Tensor(a!) bits) -> ()");
  m.def("unpack_bits(Tensor bits, int columns, Tensor(a!) mask) -> ()");
  m.def(
      "masked_linear(Tensor x, Tensor weight, Tensor bits, Tensor persona, float gamma, Tensor? bias, Tensor(a!) y) -> "
      "bool");
  m.def("gate_rows(Tensor weight, Tensor bits, float gamma, Tensor(a!) out) -> ()");
  m.def("sparse_linear(Tensor x, Tensor values, Tensor bits, Tensor offsets, Tensor? bias, Tensor(a!) y) -> ()");
  m.def("expand_rows(Tensor values, Tensor bits, Tensor offsets, int first, Tensor(a!) out) -> ()");
  m.def(
      "correction_linear(Tensor x, Tensor weight, Tensor columns, Tensor offsets, Tensor persona, float gamma, "
      "Tensor? bias, Tensor(a!) y) -> bool");
  m.def("subtract_removed(Tensor x, Tensor weight, Tensor columns, Tensor offsets, float scale, Tensor(a!) y) -> ()");
  m.def("build_info() -> str");
  m.def("has_cuda() -> bool");
  m.def("instruction_sets() -> str");
  m.def("instruction_set() -> str");
  m.def("use_instruction_set(str name) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(persona_native, CPU, m) {
  m.impl("activation_stats", TORCH_BOX(&persona::activation_stats_cpu));
  m.impl("mask_select", TORCH_BOX(&persona::mask_select_cpu));
  m.impl("mask_select_nm", TORCH_BOX(&persona::mask_select_nm_cpu));
  m.impl("mask_select_threshold", TORCH_BOX(&persona::mask_select_threshold_cpu));
  m.impl("count_digits", TORCH_BOX(&persona::count_digits_cpu));
  m.impl("pack_bits", TORCH_BOX(&persona::pack_bits_cpu));
  m.impl("unpack_bits", TORCH_BOX(&persona::unpack_bits_cpu));
  m.impl("masked_linear", TORCH_BOX(&persona::masked_linear_cpu));
  m.impl("gate_rows", TORCH_BOX(&persona::gate_rows_cpu));
  m.impl("correction_linear", TORCH_BOX(&persona::correction_linear_cpu));
  m.impl("subtract_removed", TORCH_BOX(&persona::subtract_removed_cpu));
  m.impl("sparse_linear", TORCH_BOX(&persona::sparse_linear_cpu));
  m.impl("expand_rows", TORCH_BOX(&persona::expand_rows_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(persona_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&persona::build_info));
  m.impl("has_cuda", TORCH_BOX(&persona::has_cuda));
  m.impl("instruction_sets", TORCH_BOX(&persona::instruction_sets));
  m.impl("instruction_set", TORCH_BOX(&persona::instruction_set));
  m.impl("use_instruction_set", TORCH_BOX(&persona::use_instruction_set));
}
