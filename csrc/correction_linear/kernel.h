// Sums over the removed weights that lists of columns name, for one instruction set `V`.
#pragma once

#include "../masked_linear/arguments.h"
#include "../simd/product.h"

namespace persona {
namespace {

/// The sum of `w x` over the weights of row n that are removed for row m of x. Four running sums: a single one would
/// wait for itself. A column that does not exist counts as the last one.
template <class T>
PERSONA_INLINE float removed_sum(const MaskedArguments& a, std::int64_t m, std::int64_t n) {
  const RemovedRows& removed = a.removed[m];
  if (removed.offsets == nullptr || a.weight.columns == 0) return 0;
  const T* w = static_cast<const T*>(a.weight.data) + n * a.weight.stride[0];
  const float* x = a.flat + m * a.flat_stride;
  const std::int64_t end = removed.offsets[n + 1], last = a.weight.columns - 1;
  float sum[4] = {};
  const auto product = [&](std::int64_t i) {
    const std::int64_t listed = removed.columns[i], k = listed < last ? listed : last;
    return to_float(w[k]) * x[k];
  };
  std::int64_t i = removed.offsets[n];
  for (; i + 4 <= end; i += 4)
    for (int j = 0; j < 4; ++j) sum[j] += product(i + j);
  for (; i < end; ++i) sum[0] += product(i);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class V, class T>
void subtract_removed_of(const SubtractArguments& a, std::int64_t first, std::int64_t last) {
  constexpr int vectors = kRowsAside / V::width, together = 16;
  // y is written row by row: a column of it is one element of many cache lines.
  alignas(64) float tile[together][kRowsAside];
  for (std::int64_t start = first; start < last; start += together) {
    const std::int64_t count = last - start < together ? last - start : together;
    for (std::int64_t t = 0; t < count; ++t) {
      const std::int64_t n = start + t;
      const T* w = static_cast<const T*>(a.weight.data) + n * a.weight.stride[0];
      typename V::F sum[vectors];
      for (int v = 0; v < vectors; ++v) sum[v] = V::broadcast(0);
      for (std::int64_t i = a.removed.offsets[n]; i < a.removed.offsets[n + 1]; ++i) {
        const std::int64_t listed = a.removed.columns[i];
        const std::int64_t k = listed < a.weight.columns ? listed : a.weight.columns - 1;
        const auto weight = V::broadcast(to_float(w[k]));
        const float* x = a.x + k * kRowsAside;
        for (int v = 0; v < vectors; ++v) sum[v] = V::multiply_add(weight, V::load(x + v * V::width), sum[v]);
      }
      for (int v = 0; v < vectors; ++v) V::store(tile[t] + v * V::width, sum[v]);
    }
    for (std::int64_t m = 0; m < a.rows; ++m)
      for (std::int64_t t = 0; t < count; ++t) {
        T& y = static_cast<T*>(a.y)[m * a.y_stride + start + t];
        narrow(to_float(y) - a.scale * tile[t][m], y);
      }
  }
}

/// Rows `first` to `last` of the weight, columns `first` to `last` of y.
template <class V>
void subtract_removed(const SubtractArguments& a, std::int64_t first, std::int64_t last) {
  switch (a.element) {
    case Element::f32: return subtract_removed_of<V, float>(a, first, last);
    case Element::bf16: return subtract_removed_of<V, bf16>(a, first, last);
    case Element::f16: return subtract_removed_of<V, f16>(a, first, last);
    case Element::f64: return;
  }
}

}  // namespace
}  // namespace persona
