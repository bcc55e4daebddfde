// What the activation statistics kernel reads and writes, free of torch.
#pragma once

#include <cstdint>

#include "../simd/elements.h"

namespace persona {

/// Strides count elements. Sequence b counts the tokens `token[first_counted[b] .. first_sink[b])`; its sinks
/// are `token[first_sink[b] .. first_counted[b + 1])`.
struct StatsArguments {
  const void* x;  // [B, T, K]
  Element element;
  std::int64_t batch;
  std::int64_t x_stride[3];
  const std::int32_t* token;
  const std::int64_t* first_counted;  // [B + 1]
  const std::int64_t* first_sink;     // [B]
  const std::int64_t* persona;        // [B]
  double* sums;                       // [P, 8, K]
  std::int64_t sums_stride[3];
};

}  // namespace persona
