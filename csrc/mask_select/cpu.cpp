// Mask selections on torch's CPU threads: rows are split, and no row knows of another.
#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "../simd/kernels.h"

namespace persona {
namespace {

/// Below this many scores a thread costs more than it saves.
constexpr int64_t kLeastWork = 1 << 15;
constexpr int64_t kDigits = 2048;

/// The channel score behind zeros up to a multiple of 64: whole vectors can be loaded from it.
std::vector<float> padded_channel(const Tensor& channel, int64_t columns) {
  check_plain(channel, "channel", ScalarType::Float, {columns});
  std::vector<float> padded(static_cast<size_t>(padded_columns(columns)), 0.0f);
  std::copy_n(static_cast<const float*>(channel.const_data_ptr()), columns, padded.data());
  return padded;
}

Scores scores_of(const Tensor& values, const float* channel, const char* name) {
  check_cpu(values, name, 2);
  return {values.const_data_ptr(), element_of(values, name), values.stride(0), values.stride(1), channel,
          values.size(1)};
}

uint8_t* bits_of(Tensor& bits, const Tensor& values) {
  check_plain(bits, "bits", ScalarType::Byte, {values.size(0), bytes_of(values.size(1))});
  return static_cast<uint8_t*>(bits.mutable_data_ptr());
}

/// Runs `f(first, last, workspace, part) -> Unordered` on even parts of the rows; returns the first part's complaint.
template <class F>
Unordered over_rows(int64_t rows, int64_t columns, int64_t parts, const F& f) {
  const int64_t room = 6 * std::max<int64_t>(padded_columns(columns), 64);
  std::vector<int32_t> workspace(static_cast<size_t>(parts * room));
  std::vector<Unordered> result(static_cast<size_t>(parts), Unordered::none);
  parallel_parts(rows, parts, [&](int64_t part, int64_t first, int64_t last) {
    result[static_cast<size_t>(part)] = f(first, last, workspace.data() + part * room, part);
  });
  const auto found = std::find_if(result.begin(), result.end(), [](Unordered u) { return u != Unordered::none; });
  return found == result.end() ? Unordered::none : *found;
}

int64_t parts_of_rows(int64_t rows, int64_t columns) {
  return parts_of(rows, kLeastWork / std::max<int64_t>(columns, 1));
}

}  // namespace

int64_t mask_select_cpu(const Tensor& values, const std::optional<Tensor>& channel,
                        const std::optional<Tensor>& tiebreak, int64_t keep, Tensor& bits) {
  check_cpu(values, "values", 2);
  const int64_t rows = values.size(0), columns = values.size(1);
  STD_TORCH_CHECK(keep >= 0 && keep <= columns, "keep must lie in 0..", columns, ", got ", keep);
  std::vector<float> factors;
  if (channel.has_value()) factors = padded_channel(*channel, columns);
  Scores second{};
  if (tiebreak.has_value()) {
    second = scores_of(*tiebreak, nullptr, "tiebreak");
    STD_TORCH_CHECK(tiebreak->size(0) == rows && tiebreak->size(1) == columns, "tiebreak must have the scores' shape");
  }
  const SelectArguments arguments{scores_of(values, channel.has_value() ? factors.data() : nullptr, "values"),
                                  tiebreak.has_value() ? &second : nullptr, keep, bits_of(bits, values), nullptr};
  const auto kernel = kernels().mask_select;
  return static_cast<int64_t>(over_rows(rows, columns, parts_of_rows(rows, columns),
                                        [&](int64_t first, int64_t last, int32_t* workspace, int64_t) {
                                          SelectArguments own = arguments;
                                          own.workspace = workspace;
                                          return kernel(own, first, last);
                                        }));
}

int64_t mask_select_nm_cpu(const Tensor& weight, const Tensor& channel, int64_t n, int64_t m, Tensor& bits) {
  check_cpu(weight, "weight", 2);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK((m == 2 || m == 4 || m == 8) && columns % m == 0, "m must be 2, 4 or 8 and divide K, got ", m);
  STD_TORCH_CHECK(n >= 0 && n <= m, "n must lie in 0..", m, ", got ", n);
  const std::vector<float> factors = padded_channel(channel, columns);
  const SelectNmArguments arguments{scores_of(weight, factors.data(), "weight"), static_cast<int>(n),
                                    static_cast<int>(m), bits_of(bits, weight), nullptr};
  const auto kernel = kernels().mask_select_nm;
  return static_cast<int64_t>(over_rows(rows, columns, parts_of_rows(rows, columns),
                                        [&](int64_t first, int64_t last, int32_t* workspace, int64_t) {
                                          SelectNmArguments own = arguments;
                                          own.workspace = workspace;
                                          return kernel(own, first, last);
                                        }));
}

int64_t count_digits_cpu(const Tensor& scores, int64_t level, int64_t prefix, Tensor& counts) {
  const Scores view = scores_of(scores, nullptr, "scores");
  STD_TORCH_CHECK(level >= 0 && level <= 2, "level must lie in 0..2, got ", level);
  check_plain(counts, "counts", ScalarType::Long, {kDigits});
  const int64_t rows = scores.size(0), parts = parts_of_rows(rows, view.columns);
  std::vector<int64_t> own(static_cast<size_t>(parts * kDigits), 0);
  const auto kernel = kernels().count_digits;
  const Unordered result =
      over_rows(rows, view.columns, parts, [&](int64_t first, int64_t last, int32_t* workspace, int64_t part) {
        return kernel(view, static_cast<int>(level), static_cast<uint32_t>(prefix), first, last,
                      own.data() + part * kDigits, workspace);
      });
  int64_t* total = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (size_t i = 0; i < own.size(); ++i) total[i % kDigits] += own[i];
  return static_cast<int64_t>(result);
}

int64_t mask_select_threshold_cpu(const Tensor& scores, double threshold, int64_t ties, Tensor& bits) {
  const Scores view = scores_of(scores, nullptr, "scores");
  const int64_t rows = scores.size(0), parts = parts_of_rows(rows, view.columns);
  const float border = static_cast<float>(threshold);
  std::vector<int64_t> allowed;
  if (ties > 0) {
    allowed.resize(static_cast<size_t>(rows));
    const auto count = kernels().count_equal;
    const Unordered result =
        over_rows(rows, view.columns, parts, [&](int64_t first, int64_t last, int32_t* workspace, int64_t) {
          return count(view, border, first, last, allowed.data(), workspace);
        });
    if (result != Unordered::none) return static_cast<int64_t>(result);
    for (int64_t& row : allowed) {
      row = std::min(row, ties);
      ties -= row;
    }
  }
  const ThresholdArguments arguments{view, border, allowed.empty() ? nullptr : allowed.data(), bits_of(bits, scores),
                                     nullptr};
  const auto kernel = kernels().select_above;
  return static_cast<int64_t>(
      over_rows(rows, view.columns, parts, [&](int64_t first, int64_t last, int32_t* workspace, int64_t) {
        ThresholdArguments own = arguments;
        own.workspace = workspace;
        return kernel(own, first, last);
      }));
}

}  // namespace persona
