// A launch while it runs, and the block of it that runs now: what executor.cpp, accesses.cpp and collectives.cpp share.
#pragma once

#include <array>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "block_races.h"
#include "fibers.h"
#include "kernel.h"

namespace simulated_gpu {

struct KernelCode {
  KernelFacts facts;
  const KernelTable* table = nullptr;
};

// Memory as a launch sees it.
struct Region {
  uint64_t begin = 0, bytes = 0, base = 0;  // base: from which on the shadow is
  unsigned char* memory = nullptr;          // of begin
  Shadow shadow;
};

struct Run {
  const KernelCode& code;
  const Launch& launch;
  std::minstd_rand random;
  std::map<uint64_t, std::unique_ptr<Region>> regions;  // by begin
  std::vector<Region*> of_site;                         // that an instruction touched last
  std::vector<uint64_t> block_order;                    // by number, as they run
  std::vector<uint64_t> counts;
};

// Lanes that wait for one another; afterwards what each gave.
struct Meeting {
  uint32_t warp, mask, site, arrived = 0, reading = 0;
  bool orders;
  uint64_t values[32];
  Exchange exchange;
};

struct Barrier {
  uint32_t wanted = 0;  // threads; 0: all that have not ended
  uint32_t arrived = 0, count = 0;
  std::vector<uint32_t> waiting;
  std::vector<uint32_t> site_of_warp;  // ~0: none of it is there
  Exchange exchange;
};

struct Block {
  Run& run;
  uint32_t number = 0;  // as they run, from 0 on
  std::array<uint32_t, 3> at{};
  std::vector<Thread> threads;
  std::vector<Knowledge> knowledge;
  std::vector<unsigned char> shared, local;
  Shadow shared_shadow;

  Fibers fibers;
  std::vector<uint32_t> runnable;
  std::vector<uint32_t> waiting_at;  // site by thread; kRuns, kEnded
  uint32_t alive = 0;
  std::vector<std::unique_ptr<Meeting>> meetings;
  std::vector<Meeting*> read_by;  // by thread: the meeting whose values it may still look at
  std::array<Barrier, 16> barriers;
  std::vector<uint32_t> barrier_counts;  // by thread
  std::exception_ptr failure;

  static constexpr uint32_t kRuns = ~0u, kEnded = ~0u - 1;
  explicit Block(Run& of) : run(of) {}
  void begin(uint32_t block_number);
  void execute();
  void wait(Thread&, uint32_t site);
  void ended(uint32_t thread);  // collectives.cpp: barriers do not wait for it any more
  void begin_collectives();
};

[[noreturn]] void fail(const Thread&, uint32_t site, const std::string& what, bool is_race = false);

}  // namespace simulated_gpu
