// The integer image of a row of scores: signed integers in the order of the scores.
#pragma once

#include "../simd/elements.h"
#include "arguments.h"

namespace persona {
namespace {

/// Below the image of every score, minus infinity too.
constexpr std::int32_t kNone = INT32_MIN;
constexpr std::uint32_t kInfinity = 0x7f800000u;

PERSONA_INLINE bool is_unordered(std::uint32_t bits) { return (bits & 0x7fffffffu) > kInfinity || bits == kInfinity; }

/// Non-negative floats order like their bits; negative ones in reverse; -0.0 becomes 0.0.
PERSONA_INLINE std::int32_t image_of(std::uint32_t bits) {
  const std::uint32_t negative = static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31);
  return bits == 0x80000000u ? 0 : static_cast<std::int32_t>(bits ^ (negative >> 1));
}

/// Row `row` in whole blocks of 64: in place where the layout allows, else in `copy`.
template <class T>
PERSONA_INLINE const T* row_of(const Scores& s, std::int64_t row, T* copy) {
  const T* source = static_cast<const T*>(s.values) + row * s.row_stride;
  if (s.column_stride == 1 && s.columns % 64 == 0) return source;
  if (s.column_stride == 1)
    std::memcpy(copy, source, static_cast<std::size_t>(s.columns) * sizeof(T));
  else
    for (std::int64_t c = 0; c < s.columns; ++c) copy[c] = source[c * s.column_stride];
  std::memset(copy + s.columns, 0, static_cast<std::size_t>(padded_columns(s.columns) - s.columns) * sizeof(T));
  return copy;
}

/// The bits of a row of scores into `image`; returns the largest of them as an unsigned integer.
template <class V, class T>
PERSONA_INLINE std::uint32_t score(const T* values, const float* channel, std::int64_t columns, std::int32_t* image) {
  auto largest = V::zero();
  for (std::int64_t c = 0; c < columns; c += V::width) {
    auto value = V::load(values + c);
    if (channel != nullptr) value = V::mul(V::abs(value), V::load(channel + c));
    const auto bits = V::bits(value);
    V::store(image + c, bits);
    largest = V::max(largest, bits);
  }
  return V::largest(largest);
}

/// Replaces bits by their image; false if one of the `columns` is NaN or plus infinity.
PERSONA_INLINE bool order(std::int32_t* image, std::int64_t columns) {
  int bad = 0;
  for (std::int64_t c = 0; c < columns; ++c) {
    const std::uint32_t bits = static_cast<std::uint32_t>(image[c]);
    bad |= is_unordered(bits);
    image[c] = image_of(bits);
  }
  return bad == 0;
}

struct Image {
  bool ordered;
  /// Every score of the row lies in `low <= image < high`.
  std::int32_t low, high;
};

template <class V, class T>
Image image_from(const Scores& s, std::int64_t row, std::int32_t* image, void* copy) {
  const std::int64_t padded = padded_columns(s.columns);
  const T* values = row_of<T>(s, row, static_cast<T*>(copy));
  const std::uint32_t largest = score<V>(values, s.channel, padded, image);
  Image result{true, 0, static_cast<std::int32_t>(largest + 1)};
  // Anything but non-negative finite numbers shows in the largest unsigned value.
  if (largest >= kInfinity) result = {order(image, s.columns), kNone + 1, static_cast<std::int32_t>(kInfinity)};
  for (std::int64_t c = s.columns; c < padded; ++c) image[c] = kNone;
  return result;
}

/// The image of one row, `kNone` behind its columns.
template <class V>
Image image_of_row(const Scores& s, std::int64_t row, std::int32_t* image, void* copy) {
  switch (s.element) {
    case Element::bf16: return image_from<V, bf16>(s, row, image, copy);
    case Element::f16: return image_from<V, f16>(s, row, image, copy);
    case Element::f64: return image_from<V, double>(s, row, image, copy);
    default: return image_from<V, float>(s, row, image, copy);
  }
}

}  // namespace
}  // namespace persona
