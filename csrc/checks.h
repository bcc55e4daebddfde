// Checks and views shared by the ops. The Python side has already said what is wrong in the user's words;
// these keep a direct call from reading outside a tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "simd/elements.h"

namespace persona {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    case ScalarType::Double: return Element::f64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

inline void check_cpu(const Tensor& tensor, const char* name, int64_t dims) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ", tensor.dim());
}

/// A contiguous tensor of one dtype whose elements can be read or written through a plain pointer. Sizes are compared
/// one by one: the product of sizes that come from different tensors can overflow.
inline void check_plain(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  check_cpu(tensor, name, static_cast<int64_t>(sizes.size()));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(tensor.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ",
                    tensor.size(dim));
    ++dim;
  }
}

/// Bytes of a packed row.
inline int64_t bytes_of(int64_t columns) { return columns / 8 + (columns % 8 != 0); }

/// How many parts `count` items are worth on torch's threads, if a part should have at least `least`.
inline int64_t parts_of(int64_t count, int64_t least) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return std::clamp<int64_t>(count / std::max<int64_t>(least, 1), 1, std::max<int64_t>(threads, 1));
}

/// Calls `f(part, first, last)` for `parts` even parts of `count` items on torch's threads.
template <class F>
void parallel_parts(int64_t count, int64_t parts, const F& f) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) f(part, count * part / parts, count * (part + 1) / parts);
  });
}

}  // namespace persona
