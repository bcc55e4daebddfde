// What the selection kernels read and write, free of torch.
#pragma once

#include <cstdint>

#include "../simd/elements.h"

namespace persona {

/// Selections report what they met instead of throwing: the message needs the whole tensor.
enum class Unordered : int { none = 0, scores = 1, tiebreak = 2 };

/// Columns are handled 64 at a time: one word of packed bits.
constexpr std::int64_t padded_columns(std::int64_t columns) { return (columns + 63) / 64 * 64; }

/// A matrix of scores: `|values| * channel`, or `values` themselves where `channel` is null. Strides count elements.
struct Scores {
  const void* values;  // [N, K]
  Element element;
  std::int64_t row_stride, column_stride;
  const float* channel;  // [padded_columns(K)], zeros behind K
  std::int64_t columns;
};

struct SelectArguments {
  Scores scores;
  const Scores* tiebreak;  // or null
  std::int64_t keep;
  std::uint8_t* bits;  // [N, ceil(K / 8)]
  /// Room for three rows of padded_columns(K) elements of 8 bytes, one such block for each call at a time.
  std::int32_t* workspace;
};

struct SelectNmArguments {
  Scores scores;
  int n, m;
  std::uint8_t* bits;
  std::int32_t* workspace;
};

/// Keep what is greater than `threshold`, and the first `ties` equal to it in row-major order.
struct ThresholdArguments {
  Scores scores;
  float threshold;
  const std::int64_t* ties;  // [N], or null for none: how many equal scores each row may keep
  std::uint8_t* bits;
  std::int32_t* workspace;
};

}  // namespace persona
