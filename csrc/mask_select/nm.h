// N:M selection: the `n` best of every `m` consecutive columns.
#pragma once

#include "image.h"

namespace persona {
namespace {

/// Bits of the columns that fewer than `n` of their `m` neighbours beat; an equal to the left beats.
template <int m>
PERSONA_INLINE std::uint32_t best_of_group(const std::int32_t* image, int n) {
  std::uint32_t kept = 0;
  for (int j = 0; j < m; ++j) {
    int rank = 0;
    for (int i = 0; i < m; ++i) rank += i < j ? image[i] >= image[j] : image[i] > image[j];
    kept |= static_cast<std::uint32_t>(rank < n) << j;
  }
  return kept;
}

/// The byte of eight columns.
template <int m>
PERSONA_INLINE std::uint8_t best_of_eight(const std::int32_t* image, int n) {
  std::uint32_t byte = 0;
  for (int group = 0; group < 8; group += m) byte |= best_of_group<m>(image + group, n) << group;
  return static_cast<std::uint8_t>(byte);
}

template <class V, int m>
Unordered mask_select_groups(const SelectNmArguments& a, std::int64_t first, std::int64_t last) {
  const std::int64_t columns = a.scores.columns, row_bytes = (columns + 7) / 8;
  std::int32_t *image = a.workspace, *copy = image + 2 * padded_columns(columns);
  for (std::int64_t row = first; row < last; ++row) {
    if (!image_of_row<V>(a.scores, row, image, copy).ordered) return Unordered::scores;
    std::uint8_t* bits = a.bits + row * row_bytes;
    for (std::int64_t c = 0; c < columns; c += 8) bits[c / 8] = best_of_eight<m>(image + c, a.n);
    // Groups of padding fill the last byte when m is 2 or 4.
    if (columns % 8 != 0) bits[row_bytes - 1] &= static_cast<std::uint8_t>((1u << (columns % 8)) - 1u);
  }
  return Unordered::none;
}

template <class V>
Unordered mask_select_nm(const SelectNmArguments& a, std::int64_t first, std::int64_t last) {
  switch (a.m) {
    case 2: return mask_select_groups<V, 2>(a, first, last);
    case 4: return mask_select_groups<V, 4>(a, first, last);
    default: return mask_select_groups<V, 8>(a, first, last);
  }
}

}  // namespace
}  // namespace persona
