// A device's rows as its kernels read them: cut into tiles, by the kernel that steps them. Plain C++: no torch, no
// CUDA. A backend says through a TableFormat which kernel takes what; its launches and parameters are its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "plan/tensor_table.h"
#include "update/options.h"

namespace wd_fused {

// What a row has for operands and how each is stored; the gradient as the parameter is. What a kernel is compiled for.
struct Kind {
  Storage param = Storage::float32;
  Storage momentum = Storage::float32;
  Storage average = Storage::float32;  // where there is one
  Weights weights = Weights::parameter;
  bool averages = false;
  bool stochastic = false;
  bool rounds = false;   // every intermediate to the parameter's storage, of 16 bits
  bool options = false;  // some option is on: else the row is a parameter, a gradient and a momentum buffer

  WD_FUSED_INLINE constexpr uint32_t code() const {
    return static_cast<uint32_t>(param) | static_cast<uint32_t>(momentum) << 4 | static_cast<uint32_t>(average) << 8 |
           static_cast<uint32_t>(weights) << 12 | uint32_t{averages} << 16 | uint32_t{stochastic} << 17 |
           uint32_t{rounds} << 18 | uint32_t{options} << 19;
  }
  static WD_FUSED_INLINE constexpr Kind of(uint32_t code) {
    Kind kind;
    kind.param = static_cast<Storage>(code & 15);
    kind.momentum = static_cast<Storage>(code >> 4 & 15);
    kind.average = static_cast<Storage>(code >> 8 & 15);
    kind.weights = static_cast<Weights>(code >> 12 & 15);
    kind.averages = (code >> 16 & 1) != 0;
    kind.stochastic = (code >> 17 & 1) != 0;
    kind.rounds = (code >> 18 & 1) != 0;
    kind.options = (code >> 19 & 1) != 0;
    return kind;
  }
};
Kind kind_of(const Row& row, const RowOptions& options, Numerics numerics);

// Elements [begin, begin + count) of a row, begin being piece times the elements of a full tile, with all that a block
// must know to begin.
struct alignas(16) DeviceTile {
  void* param;  // of the tile's first element; of the row's where the row is strided
  void* momentum_buffer;
  int32_t piece;
  int32_t row;     // which word of its launch is the row's
  int32_t layout;  // where in the table of layouts; below 0: flat; other than -1: see PackedLayouts
  uint16_t count;
  uint16_t group;  // which of its launch's
};
static_assert(sizeof(DeviceTile) == 32, "read as two 16-byte accesses");

// The same of a row with options.
struct alignas(16) OptionsTile : DeviceTile {
  void* extra;  // these two as DeviceTile's addresses; null: none
  void* average;
  float* momentum_scale;  // of the tile's first block
  int32_t position;       // of the row, in its group
  uint32_t kind;          // its code, and kZeroesGradient
};
static_assert(sizeof(OptionsTile) == 64, "read as four 16-byte accesses");
inline constexpr uint32_t kZeroesGradient = 1u << 31;

// Which kernel takes the rows of a kind: rows with the same id share launches.
struct KernelFormat {
  uint32_t id;
  size_t words;  // of a launch, room for a word a row and words_of_group a group
  bool options;  // its tiles are OptionsTiles
};
struct TableFormat {
  std::function<KernelFormat(size_t row, const Kind& kind)> kernel_of;
  std::function<int32_t(const Kind& kind)> tile_elements;
  size_t words_of_group;
  int32_t small_tile_elements;  // tiles of at most so many come first in their launch
};

// Layouts as kernels read them: number of dimensions, sizes, then the strides of each operand. The word before is the
// first element's place in the whole parameter; -1: elements have the places that they have in the row.
struct PackedLayouts {
  std::vector<int64_t> words;
  std::vector<int64_t> at;  // where each row's begins; of a flat row -1, or, of one that has but a word before, ~where
};
PackedLayouts packed(const std::vector<const StridedLayout*>& layouts, const std::vector<RowOptions>& row_options);

class Table {
 public:
  // A group's hyperparameters are written once for each storage that its rows have.
  struct Group {
    int32_t group;
    Storage storage;
    bool operator==(const Group& other) const { return group == other.group && storage == other.storage; }
  };
  struct Launch {
    KernelFormat kernel;
    std::vector<int32_t> rows;  // in the order of their words
    std::vector<Group> groups;
    size_t tiles_at = 0;  // in bytes()
    int32_t small_tiles = 0;
    int32_t tiles = 0;
  };

  // row_options: what the options make of the rows, one each, or none. serial: rows that may share memory: they come
  // last, in order, each in a launch of its own. layouts: null where a row's operands are flat.
  Table(const std::vector<Row>& rows, const std::vector<RowOptions>& row_options, const std::vector<bool>& serial,
        const std::vector<const StridedLayout*>& layouts, Numerics numerics, const TableFormat& format);

  const std::vector<Launch>& launches() const { return launches_; }
  // What must lie in device memory, at an address of 16 bytes' alignment.
  const std::vector<std::byte>& bytes() const { return bytes_; }
  // Where the layouts begin.
  size_t layouts_at() const { return layouts_at_; }
  // Where each row's layout begins among these, as in PackedLayouts; below 0: flat.
  const std::vector<int64_t>& layout_of() const { return layout_of_; }

  // Appends what a backend wants there, too, and returns where.
  template <class T>
  size_t append(const std::vector<T>& items) {
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
    const size_t at = bytes_.size();
    const auto* begin = reinterpret_cast<const std::byte*>(items.data());
    bytes_.insert(bytes_.end(), begin, begin + items.size() * sizeof(T));
    return at;
  }

 private:
  void pack_row(int32_t row, const Row& of, const KernelFormat& kernel, size_t words_of_group, bool alone);
  template <class T>
  void add_tiles(Launch& launch, const std::vector<Row>& rows, const std::vector<RowOptions>& row_options,
                 Numerics numerics, const TableFormat& format);

  std::vector<Launch> launches_;
  std::vector<std::byte> bytes_;
  size_t layouts_at_ = 0;
  std::vector<int64_t> layout_of_;
};

// A piece of a gradient whose squares are summed at once.
struct alignas(16) NormTile {
  int64_t begin;
  int32_t count;
  int32_t row;     // which word of its launch is the row's
  int32_t layout;  // as DeviceTile's
  int32_t slot;    // which of the partial sums is this tile's
  uint32_t kind;   // the row's
  uint32_t unused;
};
static_assert(sizeof(NormTile) == 32, "read as two 16-byte accesses");
// A group's partial sums: the slots [begin, end); before begin where the group does not clip.
struct NormGroup {
  int32_t begin;
  int32_t end;
};

// The tiles of the rows whose gradients count in a norm.
struct NormTiles {
  struct Launch {
    std::vector<int32_t> rows;
    size_t first_tile = 0;
    int32_t small_tiles = 0;
    int32_t tiles = 0;
    uint32_t kernel = 0;
  };
  std::vector<Launch> launches;  // one at least
  std::vector<NormTile> tiles;
  std::vector<NormGroup> groups;  // of the plan
  size_t slots = 0;
};
// Full tiles of the norm: several rounds of the largest GPU's blocks, and few enough that one adds up what all have
// left.
inline constexpr int64_t kNormTiles = 1536;
// kernel_of: rows with the same answer share launches; null: all do. words: of a launch, one a row. About so many full
// tiles are made, of as many elements at least as are named.
struct NormFormat {
  std::function<uint32_t(size_t row)> kernel_of;
  size_t words;
  int64_t full_tiles;
  int64_t tile_elements;
  int32_t small_tile_elements;
};
NormTiles norm_tiles(const std::vector<Row>& rows, const std::vector<RowOptions>& row_options,
                     const std::vector<int64_t>& layout_of, size_t groups, Numerics numerics, const NormFormat& format);

}  // namespace wd_fused
