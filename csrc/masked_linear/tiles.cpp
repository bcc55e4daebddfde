// The masked product of a few dozen rows in bfloat16 on matrix tiles, where the processor has them.
#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "launch.h"

namespace persona {
namespace {

/// Tiles of x that every block of the weight meets. More rows than these read the weight again (64 rows of 14336
/// columns by halves: 36 instead of 24 ms).
constexpr int64_t kTilesBytes = 1 << 22;

/// Whole cache lines.
class Lines {
 public:
  explicit Lines(int64_t bytes) : data_(static_cast<size_t>(bytes) + 63) {}
  uint8_t* get() { return data_.data() + (64 - reinterpret_cast<uintptr_t>(data_.data()) % 64) % 64; }

 private:
  std::vector<uint8_t> data_;
};

/// The rows of each mask, 16 at a time; `masks` is [M] or [1].
std::vector<TileRows> tiles_of(const std::vector<MaskRows>& masks, int64_t rows) {
  const auto mask = [&](int64_t m) { return masks[masks.size() == 1 ? 0 : static_cast<size_t>(m)]; };
  std::vector<int64_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return std::less<>()(mask(a).bits, mask(b).bits); });
  std::vector<TileRows> tiles;
  for (const int64_t m : order) {
    if (tiles.empty() || tiles.back().count == 16 || tiles.back().mask.bits != mask(m).bits)
      tiles.push_back({mask(m), {}, 0});
    tiles.back().row[tiles.back().count++] = m;
  }
  return tiles;
}

/// Whether tiles are faster than rows. A mask costs about as much on tiles as two rows of x do without them
/// (4096 x 4096, one thread, milliseconds, rows and tiles: 4 rows of one persona 2.4 and 3.1, 8 rows 3.8 and 3.1;
/// 16 rows of 4 personas 10 and 5.9, of 16 personas 11 and 18).
bool worth_tiles(const std::vector<TileRows>& tiles, int64_t rows) {
  return rows >= 4 + 2 * static_cast<int64_t>(tiles.size());
}

}  // namespace

bool multiply_tiles(const Tensor& x, const Tensor& weight, const Gates& gates, const std::optional<Tensor>& bias,
                    Tensor& y) {
  if (kernels().masked_tiles == nullptr || x.scalar_type() != ScalarType::BFloat16) return false;
  const std::vector<TileRows> tiles = tiles_of(gates.masks, x.size(0));
  if (!worth_tiles(tiles, x.size(0))) return false;
  const int64_t count = static_cast<int64_t>(tiles.size()), outputs = weight.size(0), columns = weight.size(1);
  const int64_t bytes = tile_bytes(columns);
  // In twos, as they are multiplied.
  const int64_t most = std::max<int64_t>(kTilesBytes / std::max<int64_t>(bytes, 1) / 2 * 2, 2);
  const int64_t parts = parts_of(outputs, kLeastWeights / std::max<int64_t>(columns, 1));
  Lines prepared(std::min(count, most) * bytes);
  for (int64_t first = 0; first < count; first += most) {
    const int64_t some = std::min(count - first, most);
    for (int64_t t = 0; t < some; ++t)
      kernels().prepare_tile(tiles[static_cast<size_t>(first + t)], matrix_of(x), prepared.get() + t * bytes);
    const TileArguments arguments{prepared.get(),
                                  tiles.data() + first,
                                  some,
                                  matrix_of(weight),
                                  gates.gamma,
                                  bias.has_value() ? bias->const_data_ptr() : nullptr,
                                  bias.has_value() ? bias->stride(0) : 0,
                                  y.mutable_data_ptr(),
                                  outputs};
    parallel_parts(outputs, parts,
                   [&](int64_t, int64_t begin, int64_t end) { kernels().masked_tiles(arguments, begin, end); });
  }
  return true;
}

}  // namespace persona
