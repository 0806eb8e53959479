// The work of a step as data: a row for each tensor, cut into tiles, equal pieces of work. Plain C++: no torch, no
// CUDA. Built by step_plan.cpp, walked by cpu/walk.cpp; table.cpp cuts the rows of a GPU.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "update/sgd_update.h"

namespace wd_fused {

// Elements in a full tile. 16 Ki float32 elements of three streams are 192 KiB: less than an L2 cache, and 10 us of
// work, far above what it costs to find the tile.
inline constexpr int64_t kTileElements = 16384;

// One tensor to step. Addresses of the first element; numel elements; group indexes the scalars.
struct Row {
  void* param;
  void* momentum_buffer;  // null as long as there is none
  int64_t numel;
  int32_t group;
  Storage storage;
};

// Elements [begin, begin + count) of a row, counted in the row's own order.
struct Tile {
  int64_t begin;
  int32_t count;
  int32_t row;
};

// How a row's operands lie where they are not one flat piece each in the same order: strides in elements, the dimension
// with the parameter's smallest stride last. extra and average, of options, have none where the row has no such
// operand. place is not in memory: an element's place in the whole parameter, of which the row is a shard; none where
// it is the element's place in the row.
struct StridedLayout {
  enum Operand { param, gradient, momentum_buffer, extra, average, place };
  static constexpr size_t kOperands = 6;
  std::vector<int64_t> sizes;
  std::array<std::vector<int64_t>, kOperands> strides;
};

// What changes from step to step about a row.
struct RowInput {
  const void* gradient;         // null: the row is not stepped
  const StridedLayout* layout;  // null: all operands are flat and in one order
  Momentum momentum;
  Storage gradient_storage = Storage::float32;  // of a row with options; else it is the parameter's
  bool is_averaged = false;                     // although there is no gradient
};

// Drops dimensions of size 1, orders the rest by the parameter's strides, and joins those that follow one another in
// every operand. A layout that is flat ends with at most one dimension, of stride 1 for every operand.
StridedLayout simplified(const StridedLayout& layout);
bool is_flat(const StridedLayout& simplified_layout);

// Whether no two indices meet in one element, told from the operand's strides alone; false also where it cannot tell.
bool surely_distinct(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);

// A half-open range of addresses, and whose it is.
struct Extent {
  uintptr_t begin;
  uintptr_t end;
  int32_t row;
};

// Answers whether an extent meets any of a set.
class ExtentSet {
 public:
  ExtentSet() = default;
  explicit ExtentSet(std::vector<Extent> extents);
  void add(std::vector<Extent> extents);
  bool meets(const Extent& extent) const;

 private:
  std::vector<Extent> merged_;  // sorted, disjoint, none empty
};

// For each of `rows` rows, whether one of its extents meets an extent of another row.
std::vector<bool> rows_that_meet(std::vector<Extent> extents, int64_t rows);

class TensorTable {
 public:
  // Rows marked in `serial` are kept out of the tiles: they may share memory and must run in order, one by one.
  TensorTable(std::vector<Row> rows, const std::vector<bool>& serial);

  std::vector<Row>& rows() { return rows_; }
  const std::vector<Row>& rows() const { return rows_; }
  const std::vector<Tile>& tiles() const { return tiles_; }
  const std::vector<int32_t>& serial_rows() const { return serial_rows_; }
  // Elements in all tiles together.
  int64_t tiled_elements() const { return tile_starts_.back(); }
  // The tiles whose first element, in the order of all tiles, lies in [begin, end): a partition of the elements gives
  // a partition of the tiles, balanced however small or large the tensors are.
  std::pair<int64_t, int64_t> tiles_between(int64_t begin, int64_t end) const;

 private:
  std::vector<Row> rows_;
  std::vector<Tile> tiles_;
  std::vector<int64_t> tile_starts_;
  std::vector<int32_t> serial_rows_;
};

}  // namespace wd_fused
