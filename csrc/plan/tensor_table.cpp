// Builds the table of rows and tiles, and tells how strided operands lie. Called by step_plan.cpp.
#include "plan/tensor_table.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace wd_fused {

StridedLayout simplified(const StridedLayout& layout) {
  std::vector<size_t> dims;
  for (size_t d = 0; d < layout.sizes.size(); ++d)
    if (layout.sizes[d] != 1) dims.push_back(d);
  const auto& param_strides = layout.strides[StridedLayout::param];
  std::stable_sort(dims.begin(), dims.end(), [&](size_t a, size_t b) { return param_strides[a] > param_strides[b]; });

  std::vector<size_t> operands;
  for (size_t o = 0; o < StridedLayout::kOperands; ++o)
    if (layout.strides[o].size() == layout.sizes.size()) operands.push_back(o);
  StridedLayout result;
  for (const size_t d : dims) {
    const bool joins = !result.sizes.empty() && std::all_of(operands.begin(), operands.end(), [&](size_t o) {
      return result.strides[o].back() == layout.strides[o][d] * layout.sizes[d];
    });
    if (joins)
      result.sizes.back() *= layout.sizes[d];
    else
      result.sizes.push_back(layout.sizes[d]);
    for (const size_t o : operands) {
      if (joins) result.strides[o].pop_back();
      result.strides[o].push_back(layout.strides[o][d]);
    }
  }
  return result;
}

bool is_flat(const StridedLayout& layout) {
  if (layout.sizes.empty()) return true;
  return layout.sizes.size() == 1 && std::all_of(layout.strides.begin(), layout.strides.end(),
                                                 [](const auto& s) { return s.empty() || s[0] == 1; });
}

bool surely_distinct(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // the largest offset that the dimensions so far arrive at
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

ExtentSet::ExtentSet(std::vector<Extent> extents) { add(std::move(extents)); }

void ExtentSet::add(std::vector<Extent> extents) {
  extents.insert(extents.end(), merged_.begin(), merged_.end());
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  merged_.clear();
  for (const Extent& extent : extents) {
    if (extent.begin == extent.end) continue;
    if (!merged_.empty() && extent.begin <= merged_.back().end)
      merged_.back().end = std::max(merged_.back().end, extent.end);
    else
      merged_.push_back(extent);
  }
}

bool ExtentSet::meets(const Extent& extent) const {
  // The first piece that ends behind the extent's begin: if that does not begin before its end, none meets it.
  const auto piece = std::upper_bound(merged_.begin(), merged_.end(), extent.begin,
                                      [](uintptr_t begin, const Extent& other) { return begin < other.end; });
  return extent.begin != extent.end && piece != merged_.end() && piece->begin < extent.end;
}

std::vector<bool> rows_that_meet(std::vector<Extent> extents, int64_t rows) {
  std::vector<bool> meets(static_cast<size_t>(rows), false);
  extents.erase(std::remove_if(extents.begin(), extents.end(), [](const Extent& e) { return e.begin == e.end; }),
                extents.end());
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  // A cluster is a run of extents that hang together; rows of a cluster with more than one row meet.
  for (size_t first = 0; first < extents.size();) {
    uintptr_t end = extents[first].end;
    size_t last = first + 1;
    bool several_rows = false;
    for (; last < extents.size() && extents[last].begin < end; ++last) {
      several_rows |= extents[last].row != extents[first].row;
      end = std::max(end, extents[last].end);
    }
    if (several_rows)
      for (size_t i = first; i < last; ++i) meets[static_cast<size_t>(extents[i].row)] = true;
    first = last;
  }
  return meets;
}

TensorTable::TensorTable(std::vector<Row> rows, const std::vector<bool>& serial)
    : rows_(std::move(rows)), tile_starts_{0} {
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (serial[r]) {
      serial_rows_.push_back(static_cast<int32_t>(r));
      continue;
    }
    for (int64_t begin = 0; begin < rows_[r].numel; begin += kTileElements) {
      const int64_t count = std::min(kTileElements, rows_[r].numel - begin);
      tiles_.push_back({begin, static_cast<int32_t>(count), static_cast<int32_t>(r)});
      tile_starts_.push_back(tile_starts_.back() + count);
    }
  }
}

std::pair<int64_t, int64_t> TensorTable::tiles_between(int64_t begin, int64_t end) const {
  const auto first_at = [this](int64_t element) {
    return std::lower_bound(tile_starts_.begin(), tile_starts_.end() - 1, element) - tile_starts_.begin();
  };
  return {first_at(begin), first_at(end)};
}

}  // namespace wd_fused
