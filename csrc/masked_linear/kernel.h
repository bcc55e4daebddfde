// The masked product of few rows of x, for one instruction set `V`.
//
// The weight is read once, four rows a quarter of the range apart together, and serves all rows of x: a strip of
// 2 KB of each of the four rows meets every row of x before the next strip. x lies in strips too, and the masks of
// a strip are copied side by side: rows and personas are powers of two apart in memory more often than not, and
// would drive each other out of the cache. Every sum is taken lane by lane in the order of the columns: it does not
// depend on the rows that are computed beside it, and so neither on the number of threads nor on the batch.
#pragma once

#include "../correction_linear/kernel.h"
#include "../simd/product.h"
#include "arguments.h"

namespace persona {
namespace {

constexpr int kRowsTogether = 4;
constexpr int kLine = 64;

/// Rows of x that a strip meets together: their sums with four rows of the weight are to stay in registers.
template <class V>
constexpr int kRowsOfX = V::registers / 8;

/// Whether rows of x with one mask are faster beside each other, for they share gated weights. Where there are 32
/// registers, masks are part of the instructions, and sharing them gains nothing.
template <class V>
constexpr bool kSharesGates = V::registers < 32;

/// What a thread keeps beside the weight: the masks of this strip and of the next, and the sums.
template <class V, class T>
struct MaskedWork {
  static constexpr std::int64_t bytes = strip_columns<T>() / 8;
  struct Masks {
    alignas(kLine) std::uint8_t bits[kMostRows][kRowsTogether][bytes];
    std::uint8_t behind[kBitsBehind];
  } masks[2];
  alignas(kLine) T rest[kRowsTogether][Product<V, T>::step];
  typename V::F sum[kMostRows][kRowsTogether];
};

/// A strip of `R` rows of the weight, `apart` rows from one to the next: columns k to k + width.
struct Place {
  std::int64_t n, k, width;
};

PERSONA_INLINE const std::uint8_t* bits_at(const MaskedArguments& a, std::int64_t m, std::int64_t n, std::int64_t k) {
  return a.mask[m].bits + n * a.mask[m].stride + k / 8;
}

/// The masks that lie `ahead` bytes behind those of a strip, into a cache: memory takes longer than a strip.
template <int R>
PERSONA_INLINE void fetch_bits(const MaskedArguments& a, std::int64_t m, std::int64_t count, Place p,
                               std::int64_t apart, std::int64_t ahead) {
  for (std::int64_t c = m; c < m + count; ++c)
    for (int r = 0; r < R; ++r)
      for (std::int64_t i = 0; i < p.width; i += 8 * kLine)
        __builtin_prefetch(bits_at(a, c, p.n + r * apart, p.k + i) + ahead);
}

/// The masks of a strip, followed by zeros up to a whole step.
template <int R, class Bits>
PERSONA_INLINE void copy_bits(const MaskedArguments& a, std::int64_t m, std::int64_t count, Place p, std::int64_t apart,
                              Bits& bits) {
  for (std::int64_t c = m; c < m + count; ++c)
    for (int r = 0; r < R; ++r) {
      const std::uint8_t* source = bits_at(a, c, p.n + r * apart, p.k);
      if (p.width == static_cast<std::int64_t>(8 * sizeof bits[c][r])) {
        std::memcpy(bits[c][r], source, sizeof bits[c][r]);
      } else {
        std::memset(bits[c][r], 0, sizeof bits[c][r]);
        std::memcpy(bits[c][r], source, static_cast<std::size_t>((p.width + 7) / 8));
      }
    }
}

/// One gated weight for all rows of x; one for each; or products of each that leave out what is removed.
enum class Gating { shared, own, fused };

/// Adds the products of `R` rows of the weight and `C` rows of x. `bits` are the masks of the first of these, each
/// row's `MaskedWork::bytes` behind the one before.
template <class V, class T, int R, int C, Gating gating, bool soft, bool fetch, class Bits>
PERSONA_INLINE void add_strip(const T* const* weight, const typename Product<V, T>::X* x, std::int64_t x_stride,
                              const Bits* bits, std::int64_t offset, std::int64_t columns, float gamma,
                              typename V::F (*sum)[kRowsTogether]) {
  using P = Product<V, T>;
  typename V::F local[C][R];
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) local[c][r] = sum[c][r];
  const std::uint8_t* first_bits = bits[0][0] + offset / 8;
  for (std::int64_t k = 0; k < columns; k += P::step, first_bits += P::step / 8) {
    // One pointer and constant distances: the compiler would rather keep sixteen pointers, on the stack.
    PERSONA_OPAQUE(first_bits);
    const auto bits_of = [&](int c, int r) { return first_bits + c * sizeof(Bits) + r * sizeof(bits[0][0]); };
    const auto gated = [&](int c, int r, typename P::W kept, typename P::W removed) {
      return P::pick(bits_of(c, r), kept, removed);
    };
    typename P::W kept[R], removed[R];
    for (int r = 0; r < R; ++r) {
      kept[r] = P::load(weight[r] + k);
      if constexpr (fetch) __builtin_prefetch(weight[r] + k + strip_columns<T>());
      removed[r] = soft ? P::scale(kept[r], gamma) : P::none();
      if (gating == Gating::shared) kept[r] = gated(0, r, kept[r], removed[r]);
    }
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r)
        if constexpr (gating == Gating::fused) {
          local[c][r] = P::multiply_add_kept(bits_of(c, r), kept[r], x + c * x_stride + k, local[c][r]);
        } else {
          const auto w = gating == Gating::shared ? kept[r] : gated(c, r, kept[r], removed[r]);
          local[c][r] = P::multiply_add(w, x + c * x_stride + k, local[c][r]);
        }
  }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) sum[c][r] = local[c][r];
}

/// Which of the rows of x that a strip meets together have one mask: all rows of x one, some groups, or none; or none,
/// and x is finite: a removed weight is then as good as left out.
enum class Alike { all, some, none, none_finite };

/// Whether `C` rows of x have the mask of row m, the first of them.
template <int C>
PERSONA_INLINE bool alike(const MaskedArguments& a, std::int64_t m) {
  for (int c = 1; c < C; ++c)
    if (a.mask[m + c].bits != a.mask[m].bits) return false;
  return true;
}

/// One strip against `C` rows of x, from row m on. `mask`: the row whose mask is theirs, or that of the first.
template <class V, class T, int R, int C, Gating gating, bool soft>
PERSONA_INLINE void add_rows_of_x(const MaskedArguments& a, std::int64_t m, std::int64_t mask, Place p,
                                  std::int64_t apart, int turn, MaskedWork<V, T>& work) {
  using P = Product<V, T>;
  const std::int64_t whole = p.width / P::step * P::step, x_stride = padded_steps(p.width);
  const auto* x = static_cast<const typename P::X*>(a.x) + p.k * a.rows + m * x_stride;
  const auto* bits = work.masks[turn].bits + mask;
  const T* weight[R];
  for (int r = 0; r < R; ++r)
    weight[r] = static_cast<const T*>(a.weight.data) + (p.n + r * apart) * a.weight.stride[0] + p.k;
  if (m == 0)
    add_strip<V, T, R, C, gating, soft, true>(weight, x, x_stride, bits, 0, whole, a.gamma, work.sum + m);
  else
    add_strip<V, T, R, C, gating, soft, false>(weight, x, x_stride, bits, 0, whole, a.gamma, work.sum + m);
  if (whole == p.width) return;
  // The last columns, continued by zeros: nothing behind a row is read.
  for (int r = 0; r < R; ++r) {
    std::memset(work.rest[r], 0, sizeof work.rest[r]);
    std::memcpy(work.rest[r], weight[r] + whole, static_cast<std::size_t>(p.width - whole) * sizeof(T));
    weight[r] = work.rest[r];
  }
  add_strip<V, T, R, C, gating, soft, false>(weight, x + whole, x_stride, bits, whole, P::step, a.gamma, work.sum + m);
}

/// One strip against rows m to m + C of x, meanwhile the masks of the next strip for them.
template <class V, class T, int R, int C, Alike masks, bool soft>
PERSONA_INLINE void turn_of(const MaskedArguments& a, std::int64_t m, Place p, Place next, std::int64_t apart, int turn,
                            MaskedWork<V, T>& work) {
  const bool one = masks == Alike::some && C > 1 && alike<C>(a, m);
  const std::int64_t count = masks == Alike::all ? (m == 0 ? 1 : 0) : one ? 1 : C;
  fetch_bits<R>(a, m, count, next, apart, 2 * MaskedWork<V, T>::bytes);
  if constexpr (masks == Alike::all)
    add_rows_of_x<V, T, R, C, Gating::shared, soft>(a, m, 0, p, apart, turn, work);
  else if (one)
    add_rows_of_x<V, T, R, C, Gating::shared, soft>(a, m, m, p, apart, turn, work);
  else
    add_rows_of_x<V, T, R, C, masks == Alike::none_finite ? Gating::fused : Gating::own, soft>(a, m, m, p, apart, turn,
                                                                                               work);
  if (next.width > 0) copy_bits<R>(a, m, count, next, apart, work.masks[1 - turn].bits);
}

template <class V, class T, int R>
PERSONA_INLINE void write(const MaskedArguments& a, std::int64_t n, std::int64_t apart, MaskedWork<V, T>& work) {
  for (int r = 0; r < R; ++r) {
    const std::int64_t row = n + r * apart;
    const float bias = a.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(a.bias)[row * a.bias_stride]);
    for (std::int64_t m = 0; m < a.rows; ++m) {
      float y = V::sum(work.sum[m][r]);
      // The row of the weight has just been read and is still in a cache.
      if (a.removed != nullptr) y -= a.removed_scale * removed_sum<T>(a, m, row);
      narrow(y + bias, static_cast<T*>(a.y)[m * a.y_stride + row]);
    }
  }
}

/// The lists of the removed weights of these rows, into a cache: a short piece of a list far away for every row.
template <int R>
PERSONA_INLINE void fetch_lists(const MaskedArguments& a, std::int64_t n, std::int64_t apart) {
  for (std::int64_t m = 0; m < a.rows; ++m) {
    const RemovedRows& removed = a.removed[m];
    if (removed.offsets == nullptr) continue;
    for (int r = 0; r < R; ++r) {
      const std::int64_t row = n + r * apart, end = removed.offsets[row + 1];
      for (std::int64_t i = removed.offsets[row]; i < end; i += kLine / 2) __builtin_prefetch(removed.columns + i);
    }
  }
}

/// Rows `first` to `last` of the weight, each with the `R - 1` others that lie `apart` rows behind it.
template <class V, class T, int R, Alike masks, bool soft>
void weight_rows(const MaskedArguments& a, std::int64_t first, std::int64_t last, std::int64_t apart,
                 MaskedWork<V, T>& work) {
  constexpr std::int64_t strip = strip_columns<T>();
  const std::int64_t columns = a.weight.columns;
  const auto place = [&](std::int64_t n, std::int64_t k) {
    return Place{n, k, n == last ? 0 : columns - k < strip ? columns - k : strip};
  };
  Place p = place(first, 0);
  if (p.width > 0) copy_bits<R>(a, 0, masks == Alike::all ? 1 : a.rows, p, apart, work.masks[0].bits);
  for (int turn = 0; p.n < last; turn = 1 - turn) {
    if (p.k == 0) {
      for (std::int64_t m = 0; m < a.rows; ++m)
        for (int r = 0; r < R; ++r) work.sum[m][r] = V::broadcast(0);
      if (a.removed != nullptr) fetch_lists<R>(a, p.n, apart);
    }
    const bool ends = p.k + p.width == columns;
    const Place next = ends ? place(p.n + 1, 0) : place(p.n, p.k + p.width);
    std::int64_t m = 0;
    constexpr int C = kRowsOfX<V>;
    for (; m + C <= a.rows; m += C) turn_of<V, T, R, C, masks, soft>(a, m, p, next, apart, turn, work);
    for (; m < a.rows; ++m) turn_of<V, T, R, 1, masks, soft>(a, m, p, next, apart, turn, work);
    if (ends) write<V, T, R>(a, p.n, apart, work);
    p = next;
  }
}

template <class V, class T, Alike masks, bool soft>
void masked_linear_of(const MaskedArguments& a, std::int64_t first, std::int64_t last) {
  MaskedWork<V, T> work;
  const std::int64_t quarter = (last - first) / kRowsTogether, rest = first + kRowsTogether * quarter;
  weight_rows<V, T, kRowsTogether, masks, soft>(a, first, first + quarter, quarter, work);
  weight_rows<V, T, 1, masks, soft>(a, rest, last, 0, work);
}

template <class V, class T, Alike masks>
void masked_linear_of(const MaskedArguments& a, std::int64_t first, std::int64_t last) {
  a.gamma == 0 ? masked_linear_of<V, T, masks, false>(a, first, last)
               : masked_linear_of<V, T, masks, true>(a, first, last);
}

/// Whether `count` values, a multiple of `kStep`, are finite.
template <class V>
bool all_finite(const float* x, std::int64_t count) {
  auto sum = V::broadcast(0);
  for (std::int64_t i = 0; i < count; i += V::width) sum = V::multiply_add(V::load(x + i), V::broadcast(0), sum);
  return V::sum(sum) == 0;
}

template <class V, class T>
void masked_linear_of(const MaskedArguments& a, std::int64_t first, std::int64_t last) {
  if (a.shared) return masked_linear_of<V, T, Alike::all>(a, first, last);
  // A choice within the loops of the others would cost them a sixth of their speed.
  if constexpr (kSharesGates<V>)
    for (std::int64_t m = 0; a.gamma == 0 && m + kRowsOfX<V> <= a.rows; m += kRowsOfX<V>)
      if (alike<kRowsOfX<V>>(a, m)) return masked_linear_of<V, T, Alike::some, false>(a, first, last);
  if constexpr (Product<V, T>::fuses_gates)
    if (a.gamma == 0 && all_finite<V>(static_cast<const float*>(a.x), a.rows * padded_steps(a.weight.columns)))
      return masked_linear_of<V, T, Alike::none_finite, false>(a, first, last);
  masked_linear_of<V, T, Alike::none>(a, first, last);
}

/// Rows `first` to `last` of the weight, columns `first` to `last` of y.
template <class V>
void masked_linear(const MaskedArguments& a, std::int64_t first, std::int64_t last) {
  switch (a.element) {
    case Element::f32: return masked_linear_of<V, float>(a, first, last);
    case Element::bf16: return masked_linear_of<V, bf16>(a, first, last);
    case Element::f16: return masked_linear_of<V, f16>(a, first, last);
    case Element::f64: return;
  }
}

}  // namespace
}  // namespace persona
