// Attention, for one instruction set: how its work is cut and shared out. See attention.hpp.
#include "attention_pages.inl"
#include "attention_tile.inl"
#if defined(__AVX512BF16__)
#include "attention_pairs.inl"
#endif

namespace strongroom {
namespace STRONGROOM_ISA {

constexpr int PARTS_PER_THREAD = 4;  // enough that the last part to end is short

// One call, as every thread of the team sees it.
template <class T>
class Attending {
 public:
  Attending(const AttentionLayer& layer, const Paging& paging, const Row* rows, int row_count, const float* qkv,
            float* out, float* scratch, std::int64_t scratch_floats, int threads)
      : layer_(layer),
        paging_(paging),
        rows_(rows),
        row_count_(row_count),
        group_(layer.heads / layer.kv_heads),
        segment_tokens_(segment_tokens(paging)),
        qkv_(qkv),
        out_(out),
        scratch_(scratch) {
    const int items = row_count * layer.kv_heads;
    parts_ = threads == 1 || items == 0 ? 1 : (PARTS_PER_THREAD * threads + items - 1) / items;
    share_floats_ = items == 0 ? 0 : scratch_floats / items;
  }

  void run(Member& member) {
    // A short row's keys are written by the thread that reads them; those of a long one before anybody does.
    const int items = layer_.kv_heads * row_count_;
    member.share(items * parts_, [&](int item) { begin(item / parts_, item % parts_); });
    member.barrier();
    int tiles = 0;
    bool more = false;
    for (int row = 0; row < row_count_; ++row) {
      if (!is_short(rows_[row])) tiles += tiles_of(rows_[row]) * layer_.kv_heads;
      more = more || is_split(rows_[row]);
    }
    if (tiles == 0 && !more) return;
    member.share(tiles + (more ? items : 0), [&](int item) {
      if (item < tiles) {
        attend_tile(item);
      } else {
        combine(item - tiles);
      }
    });
    member.barrier();
  }

 private:
  bool is_short(const Row& row) const { return row.count == 1 || row.count * group_ <= TILE_ROWS; }

  int tiles_of(const Row& row) const { return (row.count * group_ + TILE_ROWS - 1) / TILE_ROWS; }

  int first_segment(int position) const {
    return layer_.window > 0 ? larger(position + 1 - layer_.window, 0) / segment_tokens_ : 0;
  }

  int segments(const Row& row) const {
    return (row.start + row.count + segment_tokens_ - 1) / segment_tokens_ - first_segment(row.start);
  }

  int sums_floats(const Row& row) const { return row.count * group_ * (layer_.dim + 2); }

  bool is_split(const Row& row) const {
    return parts_ > 1 && is_short(row) && row.count * group_ <= TILE_ROWS && segments(row) > 1 &&
           std::int64_t{segments(row)} * sums_floats(row) <= share_floats_;
  }

  Tile tile(const Row& row, int head, int number) const {
    const std::int64_t width = std::int64_t{layer_.heads + 2 * layer_.kv_heads} * layer_.dim;
    const int begin = number * TILE_ROWS;
    Tile tile;
    tile.rows = smaller(row.count * group_ - begin, TILE_ROWS);
    for (int at = 0; at < tile.rows; ++at) {
      const int token = (begin + at) / group_;
      const int query = head * group_ + (begin + at) % group_;
      tile.positions[at] = row.start + token;
      tile.queries[at] = qkv_ + (row.first + token) * width + std::int64_t{query} * layer_.dim;
      tile.out[at] = out_ + (std::int64_t{row.first + token} * layer_.heads + query) * layer_.dim;
    }
    return tile;
  }

  // Where a split row's segment leaves its sums.
  Sums left(const Row& row, int item, int segment) const {
    const int count = row.count * group_;
    float* at = scratch_ + item * share_floats_ + std::int64_t{segment} * sums_floats(row);
    return {at, at + count, at + 2 * count};
  }

  // First round: long rows are written, short ones written and attended to. Items go kv head by kv head, so that a
  // page which several rows share is still in the cache when the next one reads it.
  void begin(int item, int part) {
    const Row& row = rows_[item % row_count_];
    const Keep<T> keep(layer_, paging_, row, item / row_count_);
    const int end = row.start + row.count;
    if (!is_short(row)) {
      write_positions(keep, qkv_, row.start + static_cast<int>(std::int64_t{row.count} * part / parts_),
                      row.start + static_cast<int>(std::int64_t{row.count} * (part + 1) / parts_));
    } else if (!is_split(row)) {
      if (part > 0) return;
      write_positions(keep, qkv_, row.start, end);
      for (int number = 0; number < tiles_of(row); ++number) attend_whole(keep, tile(row, keep.head, number));
    } else {
      const Tile queries = tile(row, keep.head, 0);
      const int base = first_segment(row.start);
      const int count = segments(row);
      for (int at = count * part / parts_; at < count * (part + 1) / parts_; ++at) {
        write_positions(keep, qkv_, larger(row.start, (base + at) * segment_tokens_),
                        smaller(end, (base + at + 1) * segment_tokens_));
        attend_segment(keep, queries, base + at, left(row, item, at));
      }
    }
  }

  void attend_whole(const Keep<T>& keep, const Tile& queries) const {
    alignas(32) float values[TILE_ROWS * ATTENTION_MAX_DIM];
    float most[TILE_ROWS], weight[TILE_ROWS], total_most[TILE_ROWS], total_weight[TILE_ROWS];
    const Sums sums = {most, weight, values};
    const int first = first_segment(queries.positions[0]);
    const int last = queries.positions[queries.rows - 1] / segment_tokens_;
    for (int segment = first; segment <= last; ++segment) {
      attend_segment(keep, queries, segment, sums);
      merge(queries, layer_.dim, sums, segment == first, total_most, total_weight);
    }
    normalize(queries, layer_.dim, total_weight);
  }

  // Second round: a long row's tiles, the latest first, since they see most keys.
  void attend_tile(int item) const {
    for (int at = 0; at < row_count_; ++at) {
      const Row& row = rows_[at];
      if (is_short(row)) continue;
      const int count = tiles_of(row) * layer_.kv_heads;
      if (item < count) {
        const Keep<T> keep(layer_, paging_, row, item % layer_.kv_heads);
        attend_whole(keep, tile(row, keep.head, tiles_of(row) - 1 - item / layer_.kv_heads));
        return;
      }
      item -= count;
    }
  }

  // Second round: what the segments of a split row left behind, in order.
  void combine(int item) const {
    const Row& row = rows_[item % row_count_];
    if (!is_split(row)) return;
    const Tile queries = tile(row, item / row_count_, 0);
    float most[TILE_ROWS], weight[TILE_ROWS];
    for (int at = 0; at < segments(row); ++at) {
      merge(queries, layer_.dim, left(row, item, at), at == 0, most, weight);
    }
    normalize(queries, layer_.dim, weight);
  }

  const AttentionLayer& layer_;
  const Paging& paging_;
  const Row* rows_;
  const int row_count_;
  const int group_;
  const int segment_tokens_;
  const float* qkv_;
  float* out_;
  float* scratch_;
  int parts_;
  std::int64_t share_floats_;
};

static void attention(Member& member, const AttentionLayer& layer, const Paging& paging, const Row* rows,
                      int row_count, const float* qkv, float* out, float* scratch, std::int64_t scratch_floats) {
  switch (paging.type) {
    case KVType::FLOAT32:
      return Attending<float>(layer, paging, rows, row_count, qkv, out, scratch, scratch_floats, member.size())
          .run(member);
    case KVType::BFLOAT16:
      return Attending<std::uint16_t>(layer, paging, rows, row_count, qkv, out, scratch, scratch_floats,
                                      member.size())
          .run(member);
    case KVType::INT8:
      return Attending<std::int8_t>(layer, paging, rows, row_count, qkv, out, scratch, scratch_floats,
                                    member.size())
          .run(member);
  }
}

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
