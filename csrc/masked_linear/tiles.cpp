// The products in bfloat16 on matrix tiles, where the processor has them.
#include <algorithm>
#include <vector>

#include "../checks.h"
#include "launch.h"

namespace persona {
namespace {

/// Tiles of x that are multiplied in one pass over the weight: their strips stay in the second cache.
constexpr int64_t kMostTiles = 32;
/// So much of x stays there from one block of the weight to the next, and rows of the weight are read to their end.
constexpr int64_t kShortBytes = 7 << 18;
/// Rows of a panel of the weight otherwise: the sums stay there, and the pages of the rows are at hand.
constexpr int64_t kTilePanel = 256;

/// Whether tiles are faster than rows. A mask costs about as much on tiles as two rows of x do without them, and less
/// than that where all are gated from one copy of the weight (4096 x 4096, one thread, milliseconds, rows and tiles: 4
/// rows of one persona 2.4 and 3.1, 8 rows 3.8 and 3.1; 16 rows of 4 personas 10 and 5.7, of 8 personas 11 and 9.3, of
/// 16 personas 11 and 13; 32 rows of 16 personas 25 and 16).
bool worth_tiles(int64_t tiles, int64_t rows, bool narrow) { return rows >= 4 + (narrow ? tiles * 5 / 4 : 2 * tiles); }

/// Tiles in a row that share a mask, at most.
int64_t longest_run(const TileRows* tile, int64_t tiles) {
  int64_t longest = 0;
  for (int64_t t = 0, begin = 0; t < tiles; ++t) {
    if (tile[t].mask.bits != tile[begin].mask.bits) begin = t;
    longest = std::max(longest, t + 1 - begin);
  }
  return longest;
}

}  // namespace

void multiply_by_tiles(const Tensor& x, const std::vector<TileRows>& tiles, const TileLayout& layout,
                       const std::optional<Tensor>& bias, Tensor& y,
                       const std::function<void(const TileArguments&, int64_t, int64_t, float*)>& multiply) {
  const int64_t count = static_cast<int64_t>(tiles.size()), outputs = y.size(1), columns = x.size(1);
  const int64_t bytes = layout.bytes(columns), strip = layout.strip_bytes();
  const int64_t parts = parts_of(outputs, kLeastWeights / std::max<int64_t>(columns, 1));
  Lines<uint8_t> prepared(std::min(count, kMostTiles) * bytes);
  for (int64_t first = 0; first < count; first += kMostTiles) {
    const int64_t some = std::min(count - first, kMostTiles);
    parallel_parts(some, parts_of(some, kLeastWeights / std::max<int64_t>(bytes, 1)),
                   [&](int64_t, int64_t begin, int64_t end) {
                     for (int64_t t = begin; t < end; ++t)
                       kernels().prepare_tile(tiles[static_cast<size_t>(first + t)], matrix_of(x), layout,
                                              prepared.get() + t * strip, some * strip);
                   });
    const int64_t alike = longest_run(tiles.data() + first, some);
    const int64_t panel_rows = alike * bytes <= kShortBytes ? 32 : kTilePanel;
    const TileArguments arguments{prepared.get(),
                                  tiles.data() + first,
                                  some,
                                  columns,
                                  panel_rows,
                                  layout.width,
                                  bias.has_value() ? bias->const_data_ptr() : nullptr,
                                  bias.has_value() ? bias->stride(0) : 0,
                                  y.mutable_data_ptr(),
                                  outputs};
    parallel_parts(outputs, parts, [&](int64_t, int64_t begin, int64_t end) {
      // Of all masks at once, or of one after the other.
      const int64_t together = layout.strip == kNarrowStrip ? some : alike;
      Lines<float> sums(together * tile_sums(std::min(panel_rows, end - begin)));
      multiply(arguments, begin, end, sums.get());
    });
  }
}

bool multiply_tiles(const Tensor& x, const Tensor& weight, const Gates& gates, const std::optional<Tensor>& bias,
                    Tensor& y) {
  if (kernels().masked_tiles == nullptr || x.scalar_type() != ScalarType::BFloat16) return false;
  const std::vector<TileRows> tiles = rows_alike<TileRows>(gates.masks, x.size(0));
  const int64_t count = static_cast<int64_t>(tiles.size());
  const bool narrow = count >= 3 && longest_run(tiles.data(), count) == 1;
  if (!worth_tiles(count, x.size(0), narrow)) return false;
  const auto kernel = narrow ? kernels().narrow_tiles : kernels().masked_tiles;
  int64_t width = 16;
  if (narrow) {
    width = 1;
    for (const TileRows& tile : tiles) width = std::max(width, tile.count);
  }
  multiply_by_tiles(x, tiles, {narrow ? kNarrowStrip : kTileStrip, width}, bias, y,
                    [&](const TileArguments& a, int64_t first, int64_t last, float* sums) {
                      kernel({a, matrix_of(weight), gates.gamma}, first, last, sums);
                    });
  return true;
}

}  // namespace persona
