#include "races.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "memory.h"

namespace simulated_gpu {
namespace {

struct Access {
  std::uint32_t lane = 0, number = 0;
  std::shared_ptr<const std::string> who;  // null: nobody yet
};

struct Bytes {  // of one range: who wrote last, who has read since
  std::uint64_t end;
  Access write;
  std::vector<Access> reads;
};

std::mutex mutex;
std::map<std::uint64_t, Bytes>& accesses() {  // by the range's first byte; ranges do not overlap
  static auto* instance = new std::map<std::uint64_t, Bytes>;
  return *instance;
}

// A range begins at the address, if one reaches over it.
std::map<std::uint64_t, Bytes>::iterator split(std::uint64_t address) {
  auto& all = accesses();
  auto next = all.lower_bound(address);
  if (next != all.begin()) {
    auto before = std::prev(next);
    if (before->second.end > address) {
      Bytes rest = before->second;
      before->second.end = address;
      return all.emplace_hint(next, address, std::move(rest));
    }
  }
  return next;
}

bool is_ordered(const Access& before, const Clock& now) {
  return before.who == nullptr || (before.lane < now.size() && before.number <= now[before.lane]);
}

[[noreturn]] void found(const Access& before, bool wrote, const std::string& who, bool writes, std::uint64_t begin,
                        std::uint64_t end) {
  throw Fault{who + (writes ? " writes " : " reads ") + describe(begin, end) + ", which " + *before.who +
                  (wrote ? " writes" : " reads") +
                  ", and nothing orders the two: no event, no wait of the host, no common stream",
              true};
}

}  // namespace

void look_for_races(const Queue& queue, const Entry& entry, const std::vector<Touched>& touched) {
  if (touched.empty()) return;
  const std::lock_guard<std::mutex> lock(mutex);
  const Access now{queue.lane, static_cast<std::uint32_t>(entry.number),
                   std::make_shared<const std::string>(entry.work->name + " on " + queue.name)};
  for (const Touched& range : touched) {
    const bool writes = range.writes;
    auto at = split(range.begin);
    for (std::uint64_t begin = range.begin; begin < range.end;) {
      if (at == accesses().end() || at->first > begin) {  // nobody's so far
        const std::uint64_t end = at == accesses().end() ? range.end : std::min(range.end, at->first);
        at = accesses().emplace_hint(at, begin, Bytes{end, {}, {}});
      }
      split(range.end);
      Bytes& bytes = at->second;
      const std::uint64_t end = bytes.end;
      if (!is_ordered(bytes.write, *entry.clock)) found(bytes.write, true, *now.who, writes, begin, end);
      if (writes) {
        for (const Access& read : bytes.reads)
          if (!is_ordered(read, *entry.clock)) found(read, false, *now.who, writes, begin, end);
        bytes.write = now;
        bytes.reads.clear();
      } else {
        // What is ordered before this read is ordered before whatever is ordered after it.
        bytes.reads.erase(std::remove_if(bytes.reads.begin(), bytes.reads.end(),
                                         [&](const Access& read) { return is_ordered(read, *entry.clock); }),
                          bytes.reads.end());
        bytes.reads.push_back(now);
      }
      begin = end;
      ++at;
    }
  }
}

void forget_accesses(std::uint64_t begin, std::uint64_t end) {
  const std::lock_guard<std::mutex> lock(mutex);
  split(end);
  accesses().erase(split(begin), accesses().lower_bound(end));
}

void forget_all_accesses() {
  const std::lock_guard<std::mutex> lock(mutex);
  accesses().clear();
}

}  // namespace simulated_gpu
