// The dense product less the products of listed weights, on torch's CPU threads.
#include <utility>

#include "../masked_linear/launch.h"
#include "../ops.h"

namespace persona {
namespace {

/// `offsets` [N + 1] of one persona, within a list of `count` columns.
const int32_t* check_offsets(const int32_t* offsets, int64_t rows, int64_t count) {
  bool rising = offsets[0] >= 0 && offsets[rows] <= count;
  for (int64_t n = 0; n < rows; ++n) rising &= offsets[n] <= offsets[n + 1];
  STD_TORCH_CHECK(rising, "offsets must rise from 0 to the number of columns");
  return offsets;
}

/// [M]; empty if one of the personas has no list.
std::vector<RemovedRows> removed_of(const Tensor& columns, const Tensor& offsets, const Tensor& persona, int64_t rows) {
  const uint16_t* first = static_cast<const uint16_t*>(columns.const_data_ptr());
  const int32_t* offset = static_cast<const int32_t*>(offsets.const_data_ptr());
  const int32_t* index = static_cast<const int32_t*>(persona.const_data_ptr());
  const int64_t outputs = offsets.size(1) - 1;
  std::vector<RemovedRows> removed;
  std::vector<bool> checked(static_cast<size_t>(offsets.size(0)), false);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t p = persona.size(0) == 1 ? index[0] : index[m * persona.stride(0)];
    if (p < -1 || p >= offsets.size(0)) return {};
    removed.push_back({first, p < 0 ? nullptr : offset + p * (outputs + 1)});
    if (p < 0 || checked[static_cast<size_t>(p)]) continue;
    check_offsets(removed.back().offsets, outputs, columns.numel());
    checked[static_cast<size_t>(p)] = true;
  }
  return removed;
}

template <class T>
void widen(const Tensor& x, std::vector<float>& out) {
  const T* data = static_cast<const T*>(x.const_data_ptr());
  out.reserve(static_cast<size_t>(x.numel()));
  for (int64_t m = 0; m < x.size(0); ++m)
    for (int64_t k = 0; k < x.size(1); ++k) out.push_back(to_float(data[m * x.stride(0) + k * x.stride(1)]));
}

/// x [M, K] in float32 with adjacent columns, and the elements from one row to the next. `copy` holds it where x itself
/// is not like that.
std::pair<const float*, int64_t> flat_rows(const Tensor& x, std::vector<float>& copy) {
  switch (element_of(x, "x")) {
    case Element::f32:
      if (x.stride(1) == 1) return {static_cast<const float*>(x.const_data_ptr()), x.stride(0)};
      widen<float>(x, copy);
      break;
    case Element::bf16: widen<bf16>(x, copy); break;
    case Element::f16: widen<f16>(x, copy); break;
    case Element::f64: break;
  }
  return {copy.data(), x.size(1)};
}

}  // namespace

bool correction_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& columns, const Tensor& offsets,
                           const Tensor& persona, double gamma, const std::optional<Tensor>& bias, Tensor& y) {
  check_product(x, weight, persona, bias, y);
  check_cpu(offsets, "offsets", 2);
  check_cpu(columns, "columns", 1);
  check_plain(columns, "columns", ScalarType::UInt16, {columns.size(0)});
  check_plain(offsets, "offsets", ScalarType::Int, {offsets.size(0), weight.size(0) + 1});
  const std::vector<uint8_t> plain(static_cast<size_t>(bytes_of(weight.size(1))), 0xff);
  std::vector<float> copy;
  const auto [flat, flat_stride] = flat_rows(x, copy);
  const Gates gates{{{plain.data(), 0}},           0,    removed_of(columns, offsets, persona, x.size(0)),
                    static_cast<float>(1 - gamma), flat, flat_stride};
  if (gates.removed.empty() && x.size(0) > 0) return false;
  if (x.size(0) > 0) multiply_rows(PreparedRows(x), x.size(0), weight, gates, bias, y.mutable_data_ptr());
  return true;
}

void subtract_removed_cpu(const Tensor& x, const Tensor& weight, const Tensor& columns, const Tensor& offsets,
                          double scale, Tensor& y) {
  check_cpu(y, "y", 2);
  check_weight(weight, y);
  const int64_t outputs = weight.size(0);
  check_plain(x, "x", ScalarType::Float, {weight.size(1), kRowsAside});
  check_cpu(columns, "columns", 1);
  check_plain(columns, "columns", ScalarType::UInt16, {columns.size(0)});
  check_plain(offsets, "offsets", ScalarType::Int, {outputs + 1});
  STD_TORCH_CHECK(y.size(0) <= kRowsAside && y.size(1) == outputs && (outputs < 2 || y.stride(1) == 1),
                  "y must have at most ", kRowsAside, " rows of N adjacent columns");
  const int32_t* offset = static_cast<const int32_t*>(offsets.const_data_ptr());
  // Without columns there is no last one that a column which does not exist could count as.
  if (weight.size(1) == 0 || y.size(0) == 0) return;
  const SubtractArguments arguments{
      static_cast<const float*>(x.const_data_ptr()),
      y.size(0),
      matrix_of(weight),
      element_of(weight, "weight"),
      {static_cast<const uint16_t*>(columns.const_data_ptr()), check_offsets(offset, outputs, columns.numel())},
      static_cast<float>(scale),
      y.mutable_data_ptr(),
      y.stride(0)};
  const auto kernel = kernels().subtract_removed;
  const int64_t work = std::max<int64_t>((offset[outputs] - offset[0]) / std::max<int64_t>(outputs, 1), 1) * kRowsAside;
  parallel_parts(outputs, parts_of(outputs, kLeastWeights / work),
                 [&](int64_t, int64_t first, int64_t last) { kernel(arguments, first, last); });
}

}  // namespace persona
