#include "block_races.h"

#include <algorithm>
#include <stdexcept>

namespace simulated_gpu {

// --- orders

const Clocks* Order::of(uint32_t block) const {
  if (!blocks.empty() && blocks.back().first == block) return blocks.back().second.get();  // its own: none ran later
  const auto found = std::lower_bound(blocks.begin(), blocks.end(), block,
                                      [](const auto& entry, uint32_t number) { return entry.first < number; });
  return found != blocks.end() && found->first == block ? found->second.get() : nullptr;
}

static std::shared_ptr<const Clocks> joined(const std::shared_ptr<const Clocks>& a,
                                            const std::shared_ptr<const Clocks>& b) {
  if (a == b) return a;
  auto result = std::make_shared<Clocks>(*a);
  if (result->size() < b->size()) result->resize(b->size());
  for (size_t i = 0; i < b->size(); ++i) (*result)[i] = std::max((*result)[i], (*b)[i]);
  return result;
}

OrderPointer joined(const OrderPointer& a, const OrderPointer& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  auto result = std::make_shared<Order>();
  result->blocks.reserve(std::max(a->blocks.size(), b->blocks.size()) + 1);
  auto i = a->blocks.begin(), j = b->blocks.begin();
  while (i != a->blocks.end() || j != b->blocks.end()) {
    if (j == b->blocks.end() || (i != a->blocks.end() && i->first < j->first)) {
      result->blocks.push_back(*i++);
    } else if (i == a->blocks.end() || j->first < i->first) {
      result->blocks.push_back(*j++);
    } else {
      result->blocks.emplace_back(i->first, joined(i->second, j->second));
      ++i, ++j;
    }
  }
  return result;
}

OrderPointer Known::whole() const {
  if (own == 0) return order;
  Gathering gathering;
  gathering.add(order, own);
  return gathering.result();
}

void Gathering::add(const OrderPointer& order, Epoch own) {
  order_ = joined(order_, order);
  if (own == 0) return;
  block_ = block_of(own);
  if (clocks_.size() <= thread_of(own)) clocks_.resize(thread_of(own) + 1);
  auto& clock = clocks_[thread_of(own)];
  clock = std::max(clock, clock_of(own));
}

OrderPointer Gathering::result() const {
  if (clocks_.empty()) return order_;
  auto own = std::make_shared<Order>();
  own->blocks.emplace_back(block_, std::make_shared<Clocks>(clocks_));
  return joined(order_, own);
}

void advance(Epoch& mine) {
  if (clock_of(++mine) == 0) throw std::length_error("a thread met others too often for its clock");
}

void fence(Epoch& mine, Knowledge& knowledge, bool is_sequential) {
  knowledge.before = joined(knowledge.before, knowledge.pending);
  if (is_sequential) knowledge.before = joined(knowledge.before, knowledge.fenced.order);
  knowledge.released = {knowledge.before, mine};
  if (is_sequential) knowledge.fenced = knowledge.released;
  advance(mine);
}

void Exchange::give(Epoch& mine, Knowledge& knowledge) {
  before.add(knowledge.before, mine);
  fenced.add(knowledge.fenced.order, knowledge.fenced.own);
  read.add(knowledge.read, 0);
  advance(mine);
}
void Exchange::give_read(Epoch& mine, Knowledge& knowledge) {
  read.add(knowledge.before, 0);
  read.add(knowledge.read, mine);
  advance(mine);
}
Exchanged::Exchanged(const Exchange& all)
    : before(all.before.result()), fenced(all.fenced.result()), read(all.read.result()) {}
void Exchanged::take(Knowledge& knowledge) const {
  knowledge.before = joined(knowledge.before, before);
  knowledge.fenced.order = joined(knowledge.fenced.order, fenced);
  knowledge.read = joined(knowledge.read, read);
}

// --- cells

static bool covers(const Clocks* clocks, uint32_t thread, uint32_t clock) {
  return clocks != nullptr && thread < clocks->size() && (*clocks)[thread] >= clock;
}
static bool covers(const OrderPointer& order, Epoch other) {
  return order && covers(order->of(block_of(other)), thread_of(other), clock_of(other));
}
static bool is_ordered(Epoch other, Epoch mine, const Knowledge& knowledge) {
  return is_same_thread(other, mine) || covers(knowledge.before, other);
}
static bool is_read_before(Epoch other, Epoch mine, const Knowledge& knowledge) {
  return is_ordered(other, mine, knowledge) || covers(knowledge.read, other);
}
static void check_write(Epoch other, Epoch mine, const Knowledge& knowledge) {
  if (other != 0 && !is_ordered(other, mine, knowledge)) throw Conflict{other, true, false};
}
static void check_read(Epoch other, Epoch mine, const Knowledge& knowledge) {
  if (other != 0 && !is_read_before(other, mine, knowledge)) throw Conflict{other, false, false};
}
static void check(const Crowd& crowd, bool is_strong, Epoch mine, const Knowledge& knowledge) {
  for (uint32_t word = 0; word < 16; ++word) {
    for (uint64_t left = crowd.threads[word]; left != 0; left &= left - 1) {
      const auto thread = uint32_t(64 * word + __builtin_ctzll(left));
      const Epoch other = Epoch(crowd.block) << kBlockShift | Epoch(thread) << kClockBits | crowd.clock;
      if (crowd.writes ? is_ordered(other, mine, knowledge) : is_read_before(other, mine, knowledge)) continue;
      throw Conflict{other, crowd.writes, is_strong};
    }
  }
}
static void add_to(std::vector<Crowd>& crowds, Epoch mine, bool writes) {
  const uint32_t thread = thread_of(mine);
  const auto is_mine = [&](const Crowd& crowd) {
    return crowd.block == block_of(mine) && crowd.clock == clock_of(mine) && crowd.writes == writes;
  };
  auto found = std::find_if(crowds.rbegin(), crowds.rend(), [&](const Crowd& crowd) {
    return is_mine(crowd) || crowd.block != block_of(mine);  // those of a block follow one another
  });
  if (found == crowds.rend() || !is_mine(*found)) {
    crowds.push_back({block_of(mine), clock_of(mine), writes, {}});
    found = crowds.rbegin();
  }
  found->threads[thread / 64] |= uint64_t(1) << thread % 64;
}

Shadow::Page& Shadow::page_of(uint64_t offset, uint32_t size) {
  Page& page = pages_[offset >> kPageBits];
  if (page.cells.empty()) page.cells.resize(size_t(1) << (kPageBits - page.shift));
  if (size < 1u << page.shift) refine(page, size);
  return page;
}

void Shadow::refine(Page& page, uint32_t size) {
  const int shift = __builtin_ctz(size);
  const int more = page.shift - shift;
  std::vector<Cell> cells(page.cells.size() << more);
  for (size_t i = 0; i < cells.size(); ++i) {
    cells[i] = page.cells[i >> more];
    const bool is_first = (i & ((size_t(1) << more) - 1)) == 0;
    if (cells[i].read & kIsShared && !is_first) {
      const Shared copy = shared_[uint32_t(cells[i].read)];
      shared_.push_back(copy);
      cells[i].read = kIsShared | (shared_.size() - 1);
    }
  }
  page.cells.swap(cells);
  page.shift = shift;
}

Shared& Shadow::shared_of(Cell& cell) {
  if (!(cell.read & kIsShared)) {
    shared_.emplace_back();
    if (cell.read != 0) add_to(shared_.back().readers, cell.read, false);
    cell.read = kIsShared | (shared_.size() - 1);
  }
  return shared_[uint32_t(cell.read)];
}

void Shadow::read_shared(Cell& cell, Epoch mine, const Knowledge& knowledge) {
  if (!(cell.read & kIsShared) && is_ordered(cell.read, mine, knowledge)) {
    cell.read = mine;
    return;
  }
  Shared& shared = shared_of(cell);
  for (const Crowd& crowd : shared.strong)
    if (crowd.writes) check(crowd, true, mine, knowledge);
  add_to(shared.readers, mine, false);
}

void Shadow::read(uint64_t offset, uint32_t size, Epoch mine, const Knowledge& knowledge) {
  Page& page = page_of(offset, size);
  Cell* cell = page.cells.data() + ((offset & ((1u << kPageBits) - 1)) >> page.shift);
  for (const Cell* end = cell + (size >> page.shift); cell != end; ++cell) {
    if (cell->write != 0 && !is_same_thread(cell->write, mine)) check_write(cell->write, mine, knowledge);
    if (cell->read == 0 || is_same_thread(cell->read, mine))
      cell->read = mine;
    else
      read_shared(*cell, mine, knowledge);
  }
}

static bool is_same_warp(Epoch a, Epoch b) { return (a ^ b) >> (kClockBits + 5) == 0; }

void Shadow::write(uint64_t offset, uint32_t size, Epoch mine, const Knowledge& knowledge, const void* memory,
                   const void* value) {
  Page& page = page_of(offset, size);
  Cell* cell = page.cells.data() + ((offset & ((1u << kPageBits) - 1)) >> page.shift);
  const size_t step = size_t(1) << page.shift;
  size_t at = 0;
  for (const Cell* end = cell + (size >> page.shift); cell != end; ++cell, at += step) {
    if (cell->write != 0 && !is_same_thread(cell->write, mine) &&
        !(is_same_warp(cell->write, mine) &&
          std::memcmp(static_cast<const char*>(memory) + at, static_cast<const char*>(value) + at, step) == 0))
      check_write(cell->write, mine, knowledge);
    if (cell->read & kIsShared) {
      Shared& shared = shared_[uint32_t(cell->read)];
      for (const Crowd& crowd : shared.readers) check(crowd, false, mine, knowledge);
      for (const Crowd& crowd : shared.strong) check(crowd, true, mine, knowledge);
      shared = {};
      shared.was_written = true;
    } else {
      if (cell->read != 0 && !is_same_thread(cell->read, mine)) check_read(cell->read, mine, knowledge);
      cell->read = 0;
    }
    cell->write = mine;
  }
}

void Shadow::strong(uint64_t offset, uint32_t size, Epoch& mine, Knowledge& knowledge, bool reads, bool writes,
                    Ordering ordering) {
  Page& page = page_of(offset, size);
  Cell* const first = page.cells.data() + ((offset & ((1u << kPageBits) - 1)) >> page.shift);
  const bool acquires = ordering == Ordering::acquire || ordering == Ordering::acquire_release;
  const bool releases = ordering == Ordering::release || ordering == Ordering::acquire_release;

  Shared& flag = shared_of(*first);  // what it carries; the pointers in a deque stay
  if (reads) {
    knowledge.pending = joined(knowledge.pending, flag.released);
    knowledge.fenced.order = joined(knowledge.fenced.order, flag.fenced);
    if (acquires) knowledge.before = joined(knowledge.before, flag.released);
  }
  for (Cell* cell = first; cell != first + (size >> page.shift); ++cell) {
    Shared& shared = shared_of(*cell);
    check_write(cell->write, mine, knowledge);
    if (writes)
      for (const Crowd& crowd : shared.readers) check(crowd, false, mine, knowledge);
    add_to(shared.strong, mine, writes);
    shared.was_written |= writes;
  }
  if (!writes) return;
  const Known given = releases ? Known{knowledge.before, mine} : knowledge.released;
  flag.released = reads ? joined(flag.released, given.whole()) : given.whole();
  flag.fenced = reads ? joined(flag.fenced, knowledge.fenced.whole()) : knowledge.fenced.whole();
  if (releases) advance(mine);
}

void Shadow::clear() {
  for (Page& page : pages_) page.cells.clear();  // keeps its room
  for (Page& page : pages_) page.shift = 4;
  shared_.clear();
}

}  // namespace simulated_gpu
