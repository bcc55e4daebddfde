// Fills the table of one instruction set; each source file of simd/ is compiled with its own flags.
#pragma once

#include "../activation_stats/kernel.h"
#include "../mask_select/kernel.h"
#include "../mask_select/nm.h"
#include "../mask_select/threshold.h"
#include "../masked_linear/blocks.h"
#include "../masked_linear/kernel.h"
#include "../masked_linear/rows.h"
#include "../sparse_linear/kernel.h"
#include "kernels.h"

namespace persona {
namespace {

template <class V>
constexpr Kernels table{V::name,          kSharesGates<V>,  activation_stats<V>, mask_select<V>,    mask_select_nm<V>,
                        count_digits<V>,  count_equal<V>,   select_above<V>,     prepared_bytes<V>, prepare_rows<V>,
                        masked_linear<V>, prepare_block<V>, masked_blocks<V>,    gate_rows<V>,      subtract_removed<V>,
                        sparse_linear<V>, sparse_blocks<V>, expand_rows<V>,      nullptr,           nullptr,
                        nullptr,          nullptr};

}  // namespace
}  // namespace persona
