// Races inside a kernel, by happens-before: two accesses of the same bytes by different threads, one of them writing,
// of which neither is ordered before the other by barriers, or by atomics with fences.
//
// What orders (PTX manual, memory consistency model):
//   bar.sync, bar.arrive, bar.warp.sync   all that the threads did before with all that they do after
//   a release, then an acquire that reads it: atomics and strong loads and stores of one address
//   a fence, then a strong write; a strong read of it, then a fence: each pair in one thread
//   sequential fences (membar.gl, __threadfence): theirs is one order, so the first and the last need not be in the
//   threads that write and read the flag, if barriers lie between
// A fence or an atomic alone orders nothing. Shuffles and votes order what lanes read before with what they write
// after, for what they give has been made of it; not writes with reads: the manual promises that of bar.warp.sync only.
// Fences of a block's scope are taken for nothing.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "thread.h"

namespace simulated_gpu {

// Who, and how far that thread was: its clock goes up whenever it lets others know.
using Epoch = uint64_t;  // 1 bit unused, 31 bits block (as they run), 10 thread, 22 clock; 0: none
inline constexpr int kClockBits = 22, kBlockShift = 32;
inline uint32_t block_of(Epoch epoch) { return uint32_t(epoch >> kBlockShift); }
inline uint32_t thread_of(Epoch epoch) { return uint32_t(epoch >> kClockBits) & 1023; }
inline uint32_t clock_of(Epoch epoch) { return uint32_t(epoch) & ((1u << kClockBits) - 1); }
inline bool is_same_thread(Epoch a, Epoch b) { return (a ^ b) >> kClockBits == 0; }

// What has happened: up to which clock of each thread.
using Clocks = std::vector<uint32_t>;  // of a block's threads; of those beyond its end nothing
struct Order {
  std::vector<std::pair<uint32_t, std::shared_ptr<const Clocks>>> blocks;  // by number
  const Clocks* of(uint32_t block) const;
};
using OrderPointer = std::shared_ptr<const Order>;
OrderPointer joined(const OrderPointer&, const OrderPointer&);

struct Known {
  OrderPointer order;
  Epoch own = 0;  // and what this thread did up to then
  OrderPointer whole() const;
};

// Of a thread.
struct Knowledge {
  OrderPointer before;   // all this happens before what the thread does now
  OrderPointer read;     // and this has been read before, by whom it had something of by a shuffle
  Known released;        // as of its last fence: goes with what it writes to flags
  OrderPointer pending;  // of flags that it has read: known from its next fence on
  Known fenced;          // as of sequential fences, its own and those of whom it met: goes with flags and barriers
};

// What the threads bring to a barrier.
class Gathering {
 public:
  void add(const OrderPointer&, Epoch own);
  OrderPointer result() const;

 private:
  OrderPointer order_;
  Clocks clocks_;
  uint32_t block_ = 0;
};

// Threads of a block that did something at one clock.
struct Crowd {
  uint32_t block, clock;
  bool writes;
  uint64_t threads[16];
};

// What threads know when they meet, and from then on.
struct Exchange {
  Gathering before, fenced, read;
  void give(Epoch& mine, Knowledge&);
  void give_read(Epoch& mine, Knowledge&);  // of a shuffle
};
struct Exchanged {
  OrderPointer before, fenced, read;
  explicit Exchanged(const Exchange&);
  void take(Knowledge&) const;
};

// What is known of bytes that several threads read, or that atomics touch.
struct Shared {
  std::vector<Crowd> readers, strong;
  OrderPointer released, fenced;  // what the flag there carries
  bool was_written = false;
};

struct Cell {
  Epoch write = 0, read = 0;  // the last; kIsShared with an index in `read`
};

struct Conflict {  // thrown
  Epoch other;
  bool other_writes, is_strong;
};

// Of a range of memory whose begin is a multiple of kPage: by page, in cells as small as the smallest access.
class Shadow {
 public:
  static constexpr int kPageBits = 12;
  static constexpr Epoch kIsShared = Epoch(1) << 63;

  explicit Shadow(uint64_t bytes = 0) : pages_((bytes >> kPageBits) + 1) {}
  void read(uint64_t offset, uint32_t size, Epoch mine, const Knowledge&);
  // Lanes of a warp may write the same to the same bytes. `memory` is what they are now, `value` what they become.
  void write(uint64_t offset, uint32_t size, Epoch mine, const Knowledge&, const void* memory, const void* value);
  // A strong access. Changes what the thread knows, and its epoch.
  void strong(uint64_t offset, uint32_t size, Epoch& mine, Knowledge&, bool reads, bool writes, Ordering);
  void clear();

  // Ranges that were touched, merged: function(begin, end, writes).
  template <class Function>
  void for_each_range(Function function) const;

 private:
  struct Page {
    int shift = 4;
    std::vector<Cell> cells;
  };
  Page& page_of(uint64_t offset, uint32_t size);
  void refine(Page&, uint32_t size);
  Shared& shared_of(Cell&);
  void read_shared(Cell&, Epoch mine, const Knowledge&);

  std::vector<Page> pages_;
  std::deque<Shared> shared_;
};

void advance(Epoch&);  // its clock
void fence(Epoch& mine, Knowledge&, bool is_sequential);

template <class Function>
void Shadow::for_each_range(Function function) const {
  uint64_t begin = 0, end = 0;
  bool writes = false;
  for (uint64_t number = 0; number < pages_.size(); ++number) {
    const Page& page = pages_[number];
    for (uint64_t i = 0; i < page.cells.size(); ++i) {
      const Cell& cell = page.cells[i];
      if (cell.write == 0 && cell.read == 0) continue;
      const bool is_written = cell.write != 0 || (cell.read & kIsShared && shared_[uint32_t(cell.read)].was_written);
      const uint64_t at = (number << kPageBits) + (i << page.shift);
      if (at != end || is_written != writes || begin == end) {
        if (begin != end) function(begin, end, writes);
        begin = at;
        writes = is_written;
      }
      end = at + (uint64_t(1) << page.shift);
    }
  }
  if (begin != end) function(begin, end, writes);
}

}  // namespace simulated_gpu
