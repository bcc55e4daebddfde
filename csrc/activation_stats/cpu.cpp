// Activation statistics on torch's CPU threads.
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

struct Tokens {
  std::vector<int32_t> token;
  std::vector<int64_t> first_counted, first_sink;
};

/// The counted and the sink tokens of every sequence, in order.
Tokens list_tokens(const uint8_t* role, int64_t batch, int64_t tokens, int64_t stride_b, int64_t stride_t) {
  Tokens list;
  list.token.reserve(static_cast<size_t>(batch * tokens));
  for (int64_t b = 0; b < batch; ++b) {
    const uint8_t* row = role + b * stride_b;
    const auto add = [&](uint8_t wanted) {
      for (int64_t t = 0; t < tokens; ++t)
        if (row[t * stride_t] == wanted) list.token.push_back(static_cast<int32_t>(t));
    };
    list.first_counted.push_back(static_cast<int64_t>(list.token.size()));
    add(kCounted);
    list.first_sink.push_back(static_cast<int64_t>(list.token.size()));
    add(kSink);
  }
  list.first_counted.push_back(static_cast<int64_t>(list.token.size()));
  return list;
}

}  // namespace

/// Channels are split over the threads, sequences and tokens never: no sum is shared, so nothing is atomic and
/// the number of threads cannot change a bit.
Tensor activation_stats_cpu(const Tensor& x, const Tensor& role, const Tensor& persona, Tensor& sums) {
  check_cpu(x, "x", 3);
  check_cpu(role, "role", 2);
  check_cpu(persona, "persona", 1);
  check_cpu(sums, "sums", 3);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  STD_TORCH_CHECK(role.scalar_type() == ScalarType::Byte && role.size(0) == batch && role.size(1) == tokens,
                  "role must be uint8 [B, T]");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.size(1) == 8 && sums.size(2) == channels,
                  "sums must be float64 [P, 8, K]");
  check_plain(persona, "persona", ScalarType::Long, {batch});
  STD_TORCH_CHECK(tokens <= INT32_MAX, "x has too many tokens: ", tokens);

  const int64_t* owner = static_cast<const int64_t*>(persona.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    STD_TORCH_CHECK(owner[b] >= 0 && owner[b] < sums.size(0), "persona out of range: ", owner[b]);
  const Tokens list =
      list_tokens(static_cast<const uint8_t*>(role.const_data_ptr()), batch, tokens, role.stride(0), role.stride(1));
  const StatsArguments arguments{x.const_data_ptr(),
                                 element_of(x, "x"),
                                 batch,
                                 {x.stride(0), x.stride(1), x.stride(2)},
                                 list.token.data(),
                                 list.first_counted.data(),
                                 list.first_sink.data(),
                                 owner,
                                 static_cast<double*>(sums.mutable_data_ptr()),
                                 {sums.stride(0), sums.stride(1), sums.stride(2)}};

  const int64_t units = (channels + kChannels - 1) / kChannels;
  const int64_t work = std::max<int64_t>(static_cast<int64_t>(list.token.size()), 1) * kChannels;
  const int64_t parts = parts_of(units, kLeastWork / work);
  std::vector<uint8_t> bad(static_cast<size_t>(parts * batch), 0);
  const auto kernel = kernels().activation_stats;
  parallel_parts(units, parts, [&](int64_t part, int64_t first, int64_t last) {
    kernel(arguments, first * kChannels, std::min(last * kChannels, channels), bad.data() + part * batch);
  });

  Tensor spoiled = torch::stable::new_empty(x, {batch}, ScalarType::Bool);
  bool* flags = static_cast<bool*>(spoiled.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    flags[b] = false;
    for (int64_t part = 0; part < parts; ++part) flags[b] |= bad[static_cast<size_t>(part * batch + b)] != 0;
  }
  return spoiled;
}

}  // namespace persona
