// Selection by one threshold for a whole matrix, and the counts that find it.
#pragma once

#include "image.h"
#include "kernel.h"

namespace persona {
namespace {

PERSONA_INLINE std::uint32_t key_of(std::int32_t image) { return static_cast<std::uint32_t>(image) ^ 0x80000000u; }

/// Adds to `counts[2048]` how many scores have each value of the next digit of their key, among the scores whose
/// digits before that are `prefix`. Digits have 11, 11 and 10 bits (`level` 0, 1, 2), the most significant first.
template <class V>
Unordered count_digits(const Scores& s, int level, std::uint32_t prefix, std::int64_t first, std::int64_t last,
                       std::int64_t* counts, std::int32_t* workspace) {
  static constexpr int kShift[] = {21, 10, 0};
  static constexpr std::uint32_t kMask[] = {0x7ff, 0x7ff, 0x3ff};
  std::int32_t *image = workspace, *copy = image + 2 * padded_columns(s.columns);
  for (std::int64_t row = first; row < last; ++row) {
    if (!image_of_row<V>(s, row, image, copy).ordered) return Unordered::scores;
    for (std::int64_t c = 0; c < s.columns; ++c) {
      const std::uint32_t key = key_of(image[c]);
      const bool counted = level == 0 || (key >> kShift[level - 1]) == prefix;
      counts[(key >> kShift[level]) & kMask[level]] += counted;
    }
  }
  return Unordered::none;
}

/// How many scores of each row equal `threshold`.
template <class V>
Unordered count_equal(const Scores& s, float threshold, std::int64_t first, std::int64_t last, std::int64_t* counts,
                      std::int32_t* workspace) {
  const std::int32_t wanted = image_of(bits_of_float(threshold));
  std::int32_t *image = workspace, *copy = image + 2 * padded_columns(s.columns);
  for (std::int64_t row = first; row < last; ++row) {
    if (!image_of_row<V>(s, row, image, copy).ordered) return Unordered::scores;
    std::int64_t count = 0;
    for (std::int64_t c = 0; c < s.columns; c += 64) count += __builtin_popcountll(V::equal(image + c, wanted));
    counts[row] = count;
  }
  return Unordered::none;
}

template <class V>
Unordered select_above(const ThresholdArguments& a, std::int64_t first, std::int64_t last) {
  const std::int64_t columns = a.scores.columns, row_bytes = (columns + 7) / 8;
  const std::int32_t high = image_of(bits_of_float(a.threshold)) + 1;
  std::int32_t *image = a.workspace, *copy = image + 2 * padded_columns(columns);
  for (std::int64_t row = first; row < last; ++row) {
    if (!image_of_row<V>(a.scores, row, image, copy).ordered) return Unordered::scores;
    emit<V>(image, columns, {high, a.ties == nullptr ? 0 : a.ties[row]}, a.bits + row * row_bytes);
  }
  return Unordered::none;
}

}  // namespace
}  // namespace persona
