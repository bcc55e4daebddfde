// Row-wise selection of the `keep` best scores, for one instruction set `V`.
//
// A row's integer image stays in the nearest cache while vectorised counts close in on the threshold. A count
// that hits `keep` exactly ends the search early; ties end it when the bracket has no integer left inside.
#pragma once

#include "../simd/elements.h"
#include "image.h"

namespace persona {
namespace {

/// Keep image >= high, and the first `room` of those equal to high - 1.
struct Cut {
  std::int32_t high;
  std::int64_t room;
};

/// What a row tells the next one: where its threshold was, and how many scores there were per unit of the image.
struct Hint {
  std::int32_t threshold = 0;
  double density = 0;
};

/// The next guess inside the bracket `low < guess < high`, where `low_count` and `high_count` scores reach its ends.
PERSONA_INLINE std::int64_t interpolate(std::int64_t low, std::int64_t high, std::int64_t low_count,
                                        std::int64_t high_count, std::int64_t keep) {
  const double share = (static_cast<double>(low_count - keep)) / static_cast<double>(low_count - high_count);
  const std::int64_t guess = low + static_cast<std::int64_t>(share * static_cast<double>(high - low));
  return guess <= low ? low + 1 : guess >= high ? high - 1 : guess;
}

/// Finds the cut for 0 < keep < count, where `count` images lie in `range.low <= image < range.high`.
template <class V>
Cut find_cut(const std::int32_t* image, std::int64_t padded, Image range, std::int64_t count, std::int64_t keep,
             Hint& hint) {
  std::int64_t low = range.low, high = range.high, low_count = count, high_count = 0;
  std::int64_t guess = hint.threshold;
  bool low_probed = false, high_probed = false, closed = false;
  for (int step = 0;; ++step) {
    if (high - low == 1) {
      hint.threshold = static_cast<std::int32_t>(high);
      return {static_cast<std::int32_t>(high), keep - high_count};
    }
    if (guess <= low || guess >= high) guess = low + (high - low) / 2;
    const std::int64_t reached = V::count_at_least(image, padded, static_cast<std::int32_t>(guess));
    if (reached == keep) {
      hint.threshold = static_cast<std::int32_t>(guess);
      return {static_cast<std::int32_t>(guess), 0};
    }
    if (reached > keep) {
      low = guess, low_count = reached, low_probed = true;
    } else {
      high = guess, high_count = reached, high_probed = true;
    }
    if (low_probed && high_probed && !closed) {
      hint.density = static_cast<double>(low_count - high_count) / static_cast<double>(high - low);
      closed = true;
    }
    if (step % 4 == 3) {
      // Whatever the row looks like, the bracket halves this often.
      guess = low + (high - low) / 2;
    } else if (closed) {
      guess = interpolate(low, high, low_count, high_count, keep);
    } else {
      // One end is still unknown: a step as long as the last row's density asks for, and a little longer, to close it.
      const double distance = static_cast<double>(reached - keep) * 1.25 + (reached > keep ? 2 : -2);
      const double jump = hint.density > 0 ? distance / hint.density : 0;
      guess = jump > -2e9 && jump < 2e9 ? guess + static_cast<std::int64_t>(jump) : low;
    }
  }
}

/// Removes all but the lowest `room` bits from a word of equal scores.
PERSONA_INLINE std::uint64_t lowest(std::uint64_t equal, std::int64_t& room) {
  const std::int64_t found = __builtin_popcountll(equal);
  if (found <= room) {
    room -= found;
    return equal;
  }
  std::uint64_t taken = 0;
  for (; room > 0; --room) {
    taken |= equal & (~equal + 1);
    equal &= equal - 1;
  }
  return taken;
}

PERSONA_INLINE void store_word(std::uint8_t* bits, std::int64_t columns, std::int64_t first, std::uint64_t word) {
  const std::int64_t bytes = (columns - first + 7) / 8;
  std::memcpy(bits + first / 8, &word, static_cast<std::size_t>(bytes < 8 ? bytes : 8));
}

template <class V>
void emit(const std::int32_t* image, std::int64_t columns, Cut cut, std::uint8_t* bits) {
  for (std::int64_t c = 0; c < columns; c += 64) {
    std::uint64_t word = V::at_least(image + c, cut.high);
    if (cut.room > 0) word |= lowest(V::equal(image + c, cut.high - 1), cut.room);
    store_word(bits, columns, c, word);
  }
}

/// Rows whose equals at the cut are ranked by a second image, which is overwritten.
template <class V>
void emit_ranked(const std::int32_t* image, std::int64_t columns, Cut cut, std::int32_t* second, Image range,
                 std::uint8_t* bits) {
  const std::int64_t padded = padded_columns(columns);
  std::int64_t equals = 0;
  for (std::int64_t c = 0; c < padded; ++c) {
    const bool equal = image[c] == cut.high - 1;
    second[c] = equal ? second[c] : kNone;
    equals += equal;
  }
  Cut inner{range.low, 0};
  Hint none;
  if (cut.room < equals) inner = find_cut<V>(second, padded, range, equals, cut.room, none);
  for (std::int64_t c = 0; c < columns; c += 64) {
    std::uint64_t word = V::at_least(image + c, cut.high) | V::at_least(second + c, inner.high);
    if (inner.room > 0) word |= lowest(V::equal(second + c, inner.high - 1), inner.room);
    store_word(bits, columns, c, word);
  }
}

/// Rows `first` to `last`; stops at the first row that cannot be ordered.
template <class V>
Unordered mask_select(const SelectArguments& a, std::int64_t first, std::int64_t last) {
  const std::int64_t columns = a.scores.columns, padded = padded_columns(columns), row_bytes = (columns + 7) / 8;
  std::int32_t *image = a.workspace, *second = image + 2 * padded, *copy = second + 2 * padded;
  Hint hint;
  for (std::int64_t row = first; row < last; ++row) {
    std::uint8_t* bits = a.bits + row * row_bytes;
    const Image range = image_of_row<V>(a.scores, row, image, copy);
    if (!range.ordered) return Unordered::scores;
    Image second_range{true, 0, 0};
    if (a.tiebreak != nullptr) second_range = image_of_row<V>(*a.tiebreak, row, second, copy);
    if (!second_range.ordered) return Unordered::tiebreak;
    // Nothing kept: above every image. All kept: the padding alone lies below.
    Cut cut{a.keep == 0 ? INT32_MAX : kNone + 1, 0};
    if (a.keep > 0 && a.keep < columns) cut = find_cut<V>(image, padded, range, columns, a.keep, hint);
    if (cut.room > 0 && a.tiebreak != nullptr)
      emit_ranked<V>(image, columns, cut, second, second_range, bits);
    else
      emit<V>(image, columns, cut, bits);
  }
  return Unordered::none;
}

}  // namespace
}  // namespace persona
