// Walks strided operands on the CPU, a run of the innermost dimension at a time. Used by walk.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/tensor_table.h"

namespace wd_fused {

// Where an index of a strided layout lies, moved forward a run at a time.
class Position {
 public:
  Position(const StridedLayout& layout, int64_t index) : layout_(layout), at_(layout.sizes.size()) {
    for (size_t d = at_.size(); d-- > 0; index /= layout.sizes[d]) at_[d] = index % layout.sizes[d];
  }
  int64_t run() const { return layout_.sizes.back() - at_.back(); }
  int64_t offset(StridedLayout::Operand operand) const {
    int64_t offset = 0;
    for (size_t d = 0; d < at_.size(); ++d) offset += at_[d] * layout_.strides[operand][d];
    return offset;
  }
  void advance(int64_t count) {  // at most run()
    at_.back() += count;
    for (size_t d = at_.size() - 1; d > 0 && at_[d] == layout_.sizes[d]; --d) {
      at_[d] = 0;
      ++at_[d - 1];
    }
  }

 private:
  const StridedLayout& layout_;
  std::vector<int64_t> at_;
};

// Calls move(position, place in the chunk, length) for each run of the next `chunk` elements.
template <class Move>
void for_runs(Position& position, int64_t chunk, Move&& move) {
  for (int64_t done = 0; done < chunk;) {
    const int64_t length = position.run() < chunk - done ? position.run() : chunk - done;
    move(position, done, length);
    position.advance(length);
    done += length;
  }
}
template <class Word>
void gather(Word* to, const Word* from, int64_t stride, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] = from[i * stride];
}
template <class Word>
void scatter(Word* to, const Word* from, int64_t stride, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i * stride] = from[i];
}

}  // namespace wd_fused
