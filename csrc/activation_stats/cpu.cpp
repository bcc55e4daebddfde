// Activation statistics on torch's CPU threads.
#include <optional>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "../simd/kernels.h"

namespace persona {
namespace {

constexpr uint8_t kCounted = 1, kSink = 2;
/// Channels are dealt out in whole cache lines of every dtype.
constexpr int64_t kChannels = 64;
/// Below this many elements of x a thread costs more than it saves.
constexpr int64_t kLeastWork = 1 << 17;

/// What the kernel is told of the sequences: see StatsArguments.
struct Sequences {
  std::vector<int64_t> row, first_counted, first_sink;
  std::vector<int32_t> token;

  /// Lists the counted and then the sink tokens among `first` to `last` of a row of roles.
  void add(int64_t of_row, const uint8_t* role, int64_t stride, int64_t first, int64_t last) {
    row.push_back(of_row);
    for (uint8_t wanted : {kCounted, kSink}) {
      size_t count = token.size();
      (wanted == kCounted ? first_counted : first_sink).push_back(static_cast<int64_t>(count));
      token.resize(count + static_cast<size_t>(last - first));
      // Stored whatever the role is, and overwritten where it was another one: no branch to mispredict.
      for (int64_t t = first; t < last; ++t) {
        token[count] = static_cast<int32_t>(t);
        count += role[t * stride] == wanted;
      }
      token.resize(count);
    }
  }
};

/// The rows of x, or the spans of rows in `spans`, with the tokens that each counts.
Sequences list_sequences(const Tensor& role, const std::optional<Tensor>& spans) {
  const uint8_t* roles = static_cast<const uint8_t*>(role.const_data_ptr());
  const int64_t batch = role.size(0), tokens = role.size(1);
  Sequences list;
  list.token.reserve(static_cast<size_t>(batch * tokens));
  if (!spans.has_value())
    for (int64_t b = 0; b < batch; ++b) list.add(b, roles + b * role.stride(0), role.stride(1), 0, tokens);
  else {
    check_plain(*spans, "spans", ScalarType::Long, {spans->size(0), 3});
    const int64_t* border = static_cast<const int64_t*>(spans->const_data_ptr());
    for (int64_t s = 0; s < spans->size(0); ++s, border += 3) {
      const int64_t b = border[0], first = border[1], last = border[2];
      STD_TORCH_CHECK(b >= 0 && b < batch && first >= 0 && first <= last && last <= tokens, "span ", s,
                      " does not lie in x");
      list.add(b, roles + b * role.stride(0), role.stride(1), first, last);
    }
  }
  list.first_counted.push_back(static_cast<int64_t>(list.token.size()));
  return list;
}

}  // namespace

/// Channels are split over the threads, sequences and tokens never: no sum is shared, so nothing is atomic and
/// the number of threads cannot change a bit.
Tensor activation_stats_cpu(const Tensor& x, const Tensor& role, const Tensor& persona, Tensor& sums,
                            const std::optional<Tensor>& spans) {
  check_cpu(x, "x", 3);
  check_cpu(role, "role", 2);
  check_cpu(persona, "persona", 1);
  check_cpu(sums, "sums", 3);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  STD_TORCH_CHECK(role.scalar_type() == ScalarType::Byte && role.size(0) == batch && role.size(1) == tokens,
                  "role must be uint8 [B, T]");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.size(1) == 8 && sums.size(2) == channels,
                  "sums must be float64 [P, 8, K]");
  STD_TORCH_CHECK(tokens <= INT32_MAX, "x has too many tokens: ", tokens);

  const Sequences list = list_sequences(role, spans);
  const int64_t sequences = static_cast<int64_t>(list.row.size());
  check_plain(persona, "persona", ScalarType::Long, {sequences});
  const int64_t* owner = static_cast<const int64_t*>(persona.const_data_ptr());
  for (int64_t s = 0; s < sequences; ++s)
    STD_TORCH_CHECK(owner[s] >= 0 && owner[s] < sums.size(0), "persona out of range: ", owner[s]);
  const StatsArguments arguments{x.const_data_ptr(),
                                 element_of(x, "x"),
                                 {x.stride(0), x.stride(1), x.stride(2)},
                                 sequences,
                                 list.row.data(),
                                 list.token.data(),
                                 list.first_counted.data(),
                                 list.first_sink.data(),
                                 owner,
                                 static_cast<double*>(sums.mutable_data_ptr()),
                                 {sums.stride(0), sums.stride(1), sums.stride(2)}};

  const int64_t units = (channels + kChannels - 1) / kChannels;
  const int64_t work = std::max<int64_t>(static_cast<int64_t>(list.token.size()), 1) * kChannels;
  const int64_t parts = parts_of(units, kLeastWork / work);
  std::vector<uint8_t> bad(static_cast<size_t>(parts * sequences), 0);
  const auto kernel = kernels().activation_stats;
  parallel_parts(units, parts, [&](int64_t part, int64_t first, int64_t last) {
    kernel(arguments, first * kChannels, std::min(last * kChannels, channels), bad.data() + part * sequences);
  });

  Tensor spoiled = torch::stable::new_empty(x, {sequences}, ScalarType::Bool);
  bool* flags = static_cast<bool*>(spoiled.mutable_data_ptr());
  for (int64_t s = 0; s < sequences; ++s) {
    flags[s] = false;
    for (int64_t part = 0; part < parts; ++part) flags[s] |= bad[static_cast<size_t>(part * sequences + s)] != 0;
  }
  return spoiled;
}

}  // namespace persona
