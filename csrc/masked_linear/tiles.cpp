// The masked product of a few dozen rows in bfloat16 on matrix tiles, where the processor has them.
#include <algorithm>
#include <vector>

#include "../checks.h"
#include "launch.h"

namespace persona {
namespace {

/// Tiles of x that every block of the weight meets. More rows than these read the weight again (64 rows of 14336
/// columns by halves: 36 instead of 24 ms).
constexpr int64_t kTilesBytes = 1 << 22;

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
  const std::vector<TileRows> tiles = rows_alike<TileRows>(gates.masks, x.size(0));
  if (!worth_tiles(tiles, x.size(0))) return false;
  const int64_t count = static_cast<int64_t>(tiles.size()), outputs = weight.size(0), columns = weight.size(1);
  const int64_t bytes = tile_bytes(columns);
  // In twos, as they are multiplied.
  const int64_t most = std::max<int64_t>(kTilesBytes / std::max<int64_t>(bytes, 1) / 2 * 2, 2);
  const int64_t parts = parts_of(outputs, kLeastWeights / std::max<int64_t>(columns, 1));
  Lines<uint8_t> prepared(std::min(count, most) * bytes);
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
