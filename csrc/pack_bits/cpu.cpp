// Eight booleans a byte and back, one 64-bit word of booleans at a time.
#include <array>
#include <cstring>

#include "../checks.h"
#include "../ops.h"

namespace persona {
namespace {

constexpr int64_t kLeastBytes = 1 << 13;

/// Bit i of the result is byte i of `word`, each 0 or 1: the product moves every byte's bit into the top byte.
uint8_t gather_bits(uint64_t word) { return static_cast<uint8_t>((word * 0x0102040810204080ull) >> 56); }

/// Byte i of entry `byte` is bit i of `byte`.
constexpr std::array<uint64_t, 256> make_spread() {
  std::array<uint64_t, 256> table{};
  for (unsigned byte = 0; byte < 256; ++byte)
    for (unsigned bit = 0; bit < 8; ++bit) table[byte] |= uint64_t{(byte >> bit) & 1} << (8 * bit);
  return table;
}

constexpr std::array<uint64_t, 256> kSpread = make_spread();

/// Calls `f(row, byte, count)` for the `count` columns of every byte, rows split over the threads.
template <class F>
void over_bytes(int64_t rows, int64_t columns, const F& f) {
  const int64_t row_bytes = bytes_of(columns);
  const int64_t parts = parts_of(rows, kLeastBytes / std::max<int64_t>(row_bytes, 1));
  parallel_parts(rows, parts, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      for (int64_t byte = 0; byte < columns / 8; ++byte) f(row, byte, size_t{8});
      if (columns % 8 != 0) f(row, row_bytes - 1, static_cast<size_t>(columns % 8));
    }
  });
}

}  // namespace

void pack_bits_cpu(const Tensor& mask, Tensor& bits) {
  check_cpu(mask, "mask", 2);
  const int64_t rows = mask.size(0), columns = mask.size(1), row_bytes = bytes_of(columns);
  check_plain(mask, "mask", ScalarType::Bool, {rows, columns});
  check_plain(bits, "bits", ScalarType::Byte, {rows, row_bytes});
  const char* source = static_cast<const char*>(mask.const_data_ptr());
  uint8_t* target = static_cast<uint8_t*>(bits.mutable_data_ptr());
  over_bytes(rows, columns, [&](int64_t row, int64_t byte, size_t count) {
    uint64_t word = 0;
    std::memcpy(&word, source + row * columns + 8 * byte, count);
    target[row * row_bytes + byte] = gather_bits(word);
  });
}

void unpack_bits_cpu(const Tensor& bits, int64_t columns, Tensor& mask) {
  check_cpu(bits, "bits", 2);
  STD_TORCH_CHECK(columns >= 0, "columns must be at least 0, got ", columns);
  const int64_t rows = bits.size(0), row_bytes = bytes_of(columns);
  check_plain(bits, "bits", ScalarType::Byte, {rows, row_bytes});
  check_plain(mask, "mask", ScalarType::Bool, {rows, columns});
  const uint8_t* source = static_cast<const uint8_t*>(bits.const_data_ptr());
  char* target = static_cast<char*>(mask.mutable_data_ptr());
  over_bytes(rows, columns, [&](int64_t row, int64_t byte, size_t count) {
    std::memcpy(target + row * columns + 8 * byte, &kSpread[source[row * row_bytes + byte]], count);
  });
}

}  // namespace persona
