// What the activation statistics kernel reads and writes, free of torch.
#pragma once

#include <cstdint>

#include "../simd/elements.h"

namespace persona {

/// Strides count elements. Sequence s lies in the row `row[s]` of x and counts the tokens
/// `token[first_counted[s] .. first_sink[s])`; its sinks are `token[first_sink[s] .. first_counted[s + 1])`.
struct StatsArguments {
  const void* x;  // [B, T, K]
  Element element;
  std::int64_t x_stride[3];
  std::int64_t sequences;
  const std::int64_t* row;  // [S]
  const std::int32_t* token;
  const std::int64_t* first_counted;  // [S + 1]
  const std::int64_t* first_sink;     // [S]
  const std::int64_t* persona;        // [S]
  double* sums;                       // [P, 8, K]
  std::int64_t sums_stride[3];
};

}  // namespace persona
