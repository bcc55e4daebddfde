// Activation statistics of a range of channels, for one instruction set `V`.
//
// The counted tokens of a sequence are taken eight at a time, so that an accumulator is loaded and stored
// once per eight reads of x. float32 partial sums of at most `kFold` tokens go into float64 sums of the
// sequence, those into the sums of its persona, sequences in order. A channel's arithmetic does not depend
// on the channels beside it: any split of the channels over threads gives the same bits.
#pragma once

#include "../simd/elements.h"
#include "arguments.h"

namespace persona {
namespace {

constexpr int kRows = 8;
constexpr std::int64_t kFold = 64;
constexpr std::int64_t kBlock = 2048;

/// Sums of x^2, |x| and x.
template <class V>
struct Moments {
  typename V::F square, magnitude, sum;
};

/// Moments of `count` rows at one place, added as a tree: its rounding error grows with log2(count).
template <class V, int half, int count, class T>
PERSONA_INLINE Moments<V> moments(const T* const* row, std::int64_t offset) {
  if constexpr (count == 1) {
    const auto x = V::template load_half<half>(row[0] + offset);
    return {V::mul(x, x), V::abs(x), x};
  } else if constexpr (count == 2) {
    const auto x = V::template load_half<half>(row[0] + offset), y = V::template load_half<half>(row[1] + offset);
    return {V::multiply_add(y, y, V::mul(x, x)), V::add(V::abs(x), V::abs(y)), V::add(x, y)};
  } else {
    const auto a = moments<V, half, count / 2>(row, offset);
    const auto b = moments<V, half, count / 2>(row + count / 2, offset);
    return {V::add(a.square, b.square), V::add(a.magnitude, b.magnitude), V::add(a.sum, b.sum)};
  }
}

/// Workspace of one thread: `partial` in the lane order of the loads, the others in channel order.
template <class T>
struct Block {
  alignas(64) float partial[3][kBlock];
  alignas(64) double total[3][kBlock];
  alignas(64) double mean_square[kBlock], rms[kBlock];
  alignas(64) T copy[kRows][kBlock];
};

template <class V, int half, int count, class T>
PERSONA_INLINE void add_half(const T* const* row, std::int64_t offset, Block<T>& block) {
  const auto m = moments<V, half, count>(row, offset);
  const std::int64_t place = offset + half * V::width;
  V::store(block.partial[0] + place, V::add(V::load(block.partial[0] + place), m.square));
  V::store(block.partial[1] + place, V::add(V::load(block.partial[1] + place), m.magnitude));
  V::store(block.partial[2] + place, V::add(V::load(block.partial[2] + place), m.sum));
}

/// Adds `count` rows of `width` channels to the partial sums; rows are readable up to a multiple of 2 * V::width.
/// `next` are the rows after these: short rows end before the processor's own prefetching has found its pace.
template <class V, int count, class T>
void add_rows(const T* const* row, const T* const* next, std::int64_t width, Block<T>& block) {
  for (std::int64_t offset = 0; offset < width; offset += 2 * V::width) {
    for (int r = 0; r < count; ++r)
      for (int i = 0; i < 2 * V::width; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(next[r] + offset + i);
    add_half<V, 0, count>(row, offset, block);
    add_half<V, 1, count>(row, offset, block);
  }
}

/// float64 input is summed in float64, one row at a time.
template <class V>
void add_row(const double* row, std::int64_t width, Block<double>& block) {
  for (std::int64_t c = 0; c < width; ++c) {
    const double x = row[c];
    block.total[0][c] += x * x;
    block.total[1][c] += x < 0 ? -x : x;
    block.total[2][c] += x;
  }
}

template <class V, class T>
void fold(std::int64_t width, Block<T>& block) {
  for (int m = 0; m < 3; ++m)
    for (std::int64_t offset = 0; offset < width; offset += 2 * V::width)
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < V::width; ++i) {
          float& partial = block.partial[m][offset + half * V::width + i];
          block.total[m][offset + V::template natural<T>(half, i)] += static_cast<double>(partial);
          partial = 0;
        }
}

template <class T>
struct Rows {
  const T* base;
  std::int64_t stride_token, stride_channel, width;
};

/// Pointers to `count` rows that can be read in whole vectors: x itself where its layout allows, else a copy.
template <class V, class T>
PERSONA_INLINE void point(const Rows<T>& x, const std::int32_t* token, int count, Block<T>& block, const T** row) {
  const bool whole = x.stride_channel == 1 && x.width % (2 * V::width) == 0;
  for (int r = 0; r < count; ++r) {
    const T* source = x.base + token[r] * x.stride_token;
    row[r] = whole ? source : block.copy[r];
    if (whole) continue;
    // The copy's channels past the last are zeros.
    if (x.stride_channel == 1)
      std::memcpy(block.copy[r], source, static_cast<std::size_t>(x.width) * sizeof(T));
    else
      for (std::int64_t c = 0; c < x.width; ++c) block.copy[r][c] = source[c * x.stride_channel];
  }
}

/// The moments of the listed tokens, in `block.total`.
template <class V, class T>
void sum_tokens(const Rows<T>& x, const std::int32_t* token, std::int64_t tokens, Block<T>& block) {
  for (int m = 0; m < 3; ++m)
    for (std::int64_t c = 0; c < x.width; ++c) block.total[m][c] = 0;
  const T *row[kRows], *next[kRows];
  if constexpr (__is_same(T, double)) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      point<V>(x, token + t, 1, block, row);
      add_row<V>(row[0], x.width, block);
    }
    return;
  } else {
    std::int64_t t = 0;
    while (t < tokens) {
      const std::int64_t stop = tokens - t < kFold ? tokens : t + kFold;
      for (; t + kRows <= stop; t += kRows) {
        point<V>(x, token + t, kRows, block, row);
        for (int r = 0; r < kRows; ++r)
          next[r] = x.base + token[t + kRows + r < tokens ? t + kRows + r : t + r] * x.stride_token;
        add_rows<V, kRows>(row, next, x.width, block);
      }
      for (; t < stop; ++t) {
        point<V>(x, token + t, 1, block, row);
        add_rows<V, 1>(row, row, x.width, block);
      }
      fold<V>(x.width, block);
    }
  }
}

/// Adds a row of sums in place; returns whether one of the values was NaN or infinite.
PERSONA_INLINE bool add_to(double* out, std::int64_t stride, const double* values, std::int64_t width) {
  int bad = 0;
  if (stride == 1)
    for (std::int64_t c = 0; c < width; ++c) {
      out[c] += values[c];
      bad |= !(values[c] - values[c] == 0);
    }
  else
    for (std::int64_t c = 0; c < width; ++c) {
      out[c * stride] += values[c];
      bad |= !(values[c] - values[c] == 0);
    }
  return bad != 0;
}

template <class V, class T>
bool add_sequence(const StatsArguments& a, std::int64_t s, std::int64_t first, std::int64_t width, Block<T>& block) {
  const T* base = static_cast<const T*>(a.x) + a.row[s] * a.x_stride[0] + first * a.x_stride[2];
  const Rows<T> x{base, a.x_stride[1], a.x_stride[2], width};
  double* out = a.sums + a.persona[s] * a.sums_stride[0] + first * a.sums_stride[2];
  const std::int64_t field = a.sums_stride[1], stride = a.sums_stride[2];
  bool bad = false;
  const std::int64_t begin = a.first_counted[s], sinks = a.first_sink[s], end = a.first_counted[s + 1];
  if (begin < sinks) {
    sum_tokens<V>(x, a.token + begin, sinks - begin, block);
    const double count = static_cast<double>(sinks - begin);
    for (std::int64_t c = 0; c < width; ++c) {
      block.mean_square[c] = block.total[0][c] / count;
      block.rms[c] = __builtin_sqrt(block.mean_square[c]);
    }
    bad |= add_to(out, stride, block.rms, width);
    bad |= add_to(out + field, stride, block.mean_square, width);
    for (int m = 0; m < 3; ++m) bad |= add_to(out + (2 + m) * field, stride, block.total[m], width);
  }
  if (sinks < end) {
    sum_tokens<V>(x, a.token + sinks, end - sinks, block);
    for (int m = 0; m < 3; ++m) bad |= add_to(out + (5 + m) * field, stride, block.total[m], width);
  }
  return bad;
}

template <class V, class T>
void activation_stats_of(const StatsArguments& a, std::int64_t first, std::int64_t last, std::uint8_t* bad) {
  Block<T> block;
  std::memset(block.partial, 0, sizeof block.partial);
  for (; first < last; first += kBlock) {
    const std::int64_t width = last - first < kBlock ? last - first : kBlock;
    // Vectors reach behind the last channel of a copied row.
    if (width % (2 * V::width) != 0) std::memset(block.copy, 0, sizeof block.copy);
    for (std::int64_t s = 0; s < a.sequences; ++s) bad[s] |= add_sequence<V, T>(a, s, first, width, block);
  }
}

/// Channels `first` to `last` of every sequence; sets `bad[s]` where a sequence held NaN, infinity or overflow.
template <class V>
void activation_stats(const StatsArguments& a, std::int64_t first, std::int64_t last, std::uint8_t* bad) {
  switch (a.element) {
    case Element::f32: return activation_stats_of<V, float>(a, first, last, bad);
    case Element::bf16: return activation_stats_of<V, bf16>(a, first, last, bad);
    case Element::f16: return activation_stats_of<V, f16>(a, first, last, bad);
    case Element::f64: return activation_stats_of<V, double>(a, first, last, bad);
  }
}

}  // namespace
}  // namespace persona
