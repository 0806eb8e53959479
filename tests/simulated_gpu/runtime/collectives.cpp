// What threads of a block do together: barriers, and what the lanes of a warp tell one another.
#include "block.h"

namespace simulated_gpu {

void Block::begin_collectives() {
  alive = uint32_t(threads.size());
  waiting_at.assign(threads.size(), kRuns);
  read_by.assign(threads.size(), nullptr);
  barrier_counts.assign(threads.size(), 0);
  meetings.clear();
  for (Barrier& barrier : barriers) {
    barrier = {};
    barrier.site_of_warp.assign((threads.size() + 31) / 32, ~0u);
  }
}

// --- barriers

static bool is_complete(const Block& block, const Barrier& barrier) {
  return barrier.arrived != 0 && barrier.arrived >= (barrier.wanted != 0 ? barrier.wanted : block.alive);
}

static void complete(Block& block, Barrier& barrier, uint32_t but) {
  const Exchanged exchanged(barrier.exchange);
  for (const uint32_t thread : barrier.waiting) {
    exchanged.take(block.knowledge[thread]);
    block.barrier_counts[thread] = barrier.count;
    if (thread != but) block.runnable.push_back(thread);
  }
  auto sites = std::move(barrier.site_of_warp);
  sites.assign(sites.size(), ~0u);
  barrier = {};
  barrier.site_of_warp = std::move(sites);
}

static void arrive(Thread& thread, uint32_t which, uint32_t wanted, uint32_t site, bool waits, bool value) {
  Block& block = *thread.block;
  if (which >= block.barriers.size()) fail(thread, site, "barrier " + std::to_string(which) + " of 16");
  if (wanted % 32 != 0) fail(thread, site, std::to_string(wanted) + " threads: no multiple of a warp's 32");
  Barrier& barrier = block.barriers[which];
  if (barrier.arrived != 0 && barrier.wanted != wanted)
    fail(thread, site,
         "waits for " + std::to_string(wanted) + " threads, others there for " + std::to_string(barrier.wanted));
  uint32_t& of_warp = barrier.site_of_warp[thread.warp];
  if (of_warp != ~0u && of_warp != site)
    fail(thread, site,
         std::string("a thread of the same warp waits at another barrier, ") + block.run.code.table->sites[of_warp]);
  of_warp = site;
  barrier.wanted = wanted;
  barrier.count += value;
  ++barrier.arrived;
  barrier.exchange.give(thread.epoch, block.knowledge[thread.index]);
  if (waits) barrier.waiting.push_back(thread.index);
  if (is_complete(block, barrier))
    complete(block, barrier, thread.index);
  else if (waits)
    block.wait(thread, site);
}

// --- meetings of lanes

static uint32_t alive_lanes(const Block& block, uint32_t warp, uint32_t mask) {
  uint32_t result = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t thread = 32 * warp + lane;
    if (thread < block.threads.size() && block.waiting_at[thread] != Block::kEnded) result |= 1u << lane;
  }
  return result & mask;
}

static void leave(Block& block, uint32_t thread) {
  Meeting*& last = block.read_by[thread];
  if (last == nullptr) return;
  Meeting* const left = last;
  last = nullptr;
  if (--left->reading != 0) return;
  for (auto& meeting : block.meetings)
    if (meeting.get() == left) {
      std::swap(meeting, block.meetings.back());
      block.meetings.pop_back();
      return;
    }
}

static void finish(Block& block, Meeting& meeting, uint32_t warp, uint32_t but) {
  const Exchanged exchanged(meeting.exchange);
  for (uint32_t lanes = meeting.arrived; lanes != 0; lanes &= lanes - 1) {
    const uint32_t thread = 32 * warp + uint32_t(__builtin_ctz(lanes));
    block.read_by[thread] = &meeting;
    ++meeting.reading;
    exchanged.take(block.knowledge[thread]);
    if (thread != but) block.runnable.push_back(thread);
  }
  meeting.mask = 0;  // nobody comes to it any more
}

static const uint64_t* meet(Thread& thread, uint32_t mask, uint64_t value, uint32_t site, bool orders) {
  Block& block = *thread.block;
  leave(block, thread.index);
  const uint32_t own = 1u << thread.lane;
  if (!(mask & own)) fail(thread, site, "the lane is not in its own mask");
  // Barriers of a warp meet whatever their instruction is; all else is one instruction of all lanes.
  Meeting* meeting = nullptr;
  for (auto& each : block.meetings)
    if (each->warp == thread.warp && each->mask == mask && !(each->arrived & own) && each->orders == orders &&
        (orders || each->site == site))
      meeting = each.get();
  if (meeting == nullptr) {
    block.meetings.push_back(std::make_unique<Meeting>());
    meeting = block.meetings.back().get();
    meeting->warp = thread.warp;
    meeting->mask = mask;
    meeting->site = site;
    meeting->orders = orders;
  }
  meeting->values[thread.lane] = value;
  meeting->arrived |= own;
  Knowledge& knowledge = block.knowledge[thread.index];
  orders ? meeting->exchange.give(thread.epoch, knowledge) : meeting->exchange.give_read(thread.epoch, knowledge);
  if (meeting->arrived == alive_lanes(block, thread.warp, mask))
    finish(block, *meeting, thread.warp, thread.index);
  else
    block.wait(thread, site);
  return meeting->values;
}

void Block::ended(uint32_t thread) {
  leave(*this, thread);
  waiting_at[thread] = kEnded;
  --alive;
  for (Barrier& barrier : barriers)
    if (is_complete(*this, barrier)) complete(*this, barrier, ~0u);
  const uint32_t warp = thread / 32;
  for (size_t i = 0; i < meetings.size(); ++i) {
    Meeting& meeting = *meetings[i];
    if (meeting.warp == warp && meeting.mask != 0 && meeting.arrived == alive_lanes(*this, warp, meeting.mask))
      finish(*this, meeting, warp, ~0u);
  }
}

}  // namespace simulated_gpu

using namespace simulated_gpu;

extern "C" {

void simulated_gpu_barrier(Thread& thread, uint32_t barrier, uint32_t threads, uint32_t site, bool waits) {
  arrive(thread, barrier, threads, site, waits, false);
}
uint32_t simulated_gpu_barrier_count(Thread& thread, uint32_t barrier, uint32_t threads, uint32_t site, bool value) {
  arrive(thread, barrier, threads, site, true, value);
  return thread.block->barrier_counts[thread.index];
}
const uint64_t* simulated_gpu_meet(Thread& thread, uint32_t mask, uint64_t value, uint32_t site) {
  return meet(thread, mask, value, site, false);
}
void simulated_gpu_warp_barrier(Thread& thread, uint32_t mask, uint32_t site) { meet(thread, mask, 0, site, true); }
}
