// Runs the threads of a launch: blocks one after another, threads one after another where none waits, else by turns.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "block.h"

namespace simulated_gpu {

const KernelFacts& facts_of(const KernelCode& code) { return code.facts; }

static std::string triple(const uint32_t (&at)[3]) {
  return "(" + std::to_string(at[0]) + ", " + std::to_string(at[1]) + ", " + std::to_string(at[2]) + ")";
}

static void split(uint64_t index, const Dim& of, uint32_t* at) {
  at[0] = uint32_t(index % of.x);
  at[1] = uint32_t(index / of.x % of.y);
  at[2] = uint32_t(index / of.x / of.y);
}

void fail(const Thread& thread, uint32_t site, const std::string& what, bool is_race) {
  const KernelCode& code = thread.block->run.code;
  Fault fault;
  fault.text = code.facts.name + ", block " + triple(thread.ctaid) + ", thread " + triple(thread.tid) + ", " +
               (site < code.table->site_count ? code.table->sites[site] : "?") + ": " + what;
  fault.is_race = is_race;
  throw fault;
}

// --- a block

void Block::begin(uint32_t block_number) {
  number = block_number;
  const Launch& launch = run.launch;
  const KernelTable& table = *run.code.table;
  const uint32_t count = launch.block.x * launch.block.y * launch.block.z;
  split(run.block_order[number], launch.grid, at.data());

  const uint64_t garbage = uint64_t(run.random()) << 32 | run.random();
  for (size_t i = 0; i < shared.size(); ++i) shared[i] = static_cast<unsigned char>(garbage >> 8 * (i % 7));
  shared_shadow.clear();

  threads.resize(count);
  knowledge.assign(count, {});
  local.resize(size_t(count) * table.local_bytes);
  for (size_t i = 0; i < local.size(); ++i) local[i] = static_cast<unsigned char>(garbage >> 8 * (i % 5));
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.block = this;
    thread.index = i;
    thread.lane = i % 32;
    thread.warp = i / 32;
    split(i, launch.block, thread.tid);
    const Dim sizes[] = {launch.block, launch.grid};
    for (int which = 0; which < 2; ++which) {
      uint32_t* to = which == 0 ? thread.ntid : thread.nctaid;
      to[0] = sizes[which].x, to[1] = sizes[which].y, to[2] = sizes[which].z;
    }
    std::copy(at.begin(), at.end(), thread.ctaid);
    thread.parameters = static_cast<const unsigned char*>(launch.parameters);
    thread.parameter_bytes = run.code.facts.parameter_bytes;
    thread.epoch = Epoch(number) << kBlockShift | Epoch(i) << kClockBits | 1;
    thread.random = uint32_t(run.random());
    thread.garbage = garbage * (2 * i + 1);
    thread.local = local.data() + size_t(i) * table.local_bytes;
    thread.counts = run.counts.data();
  }
}

void Block::execute() {
  std::vector<uint32_t>& order = runnable;
  order.resize(threads.size());
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), run.random);
  if (!run.code.table->waits) {
    for (const uint32_t index : order) run.code.table->run(threads[index]);
    return;
  }

  begin_collectives();
  failure = nullptr;
  fibers.reserve(threads.size(), (size_t(96) << 10) + 3 * run.code.table->register_bytes);
  for (Thread& thread : threads) {
    fibers.start(
        thread.index,
        [](void* argument) {
          Thread& self = *static_cast<Thread*>(argument);
          Block& block = *self.block;
          try {
            block.run.code.table->run(self);
            block.ended(self.index);
          } catch (...) {
            block.failure = std::current_exception();
          }
        },
        &thread);
  }
  while (alive != 0) {
    if (runnable.empty()) {
      uint32_t first = 0;
      while (waiting_at[first] == kEnded) ++first;
      std::map<uint32_t, uint32_t> where;
      for (const uint32_t site : waiting_at) ++where[site];
      std::string what = "all threads wait, and nobody is left to wake them:";
      for (const auto& [site, count] : where)
        what += " " + std::to_string(count) + (site == kEnded ? " have ended;" : " at ") +
                (site == kEnded ? "" : std::string(run.code.table->sites[site]) + ";");
      what.pop_back();
      fail(threads[first], waiting_at[first], what);
    }
    std::swap(runnable[run.random() % runnable.size()], runnable.back());
    const uint32_t next = runnable.back();
    runnable.pop_back();
    waiting_at[next] = kRuns;
    fibers.resume(next);
    if (failure) std::rethrow_exception(failure);
  }
}

void Block::wait(Thread& thread, uint32_t site) {
  waiting_at[thread.index] = site;
  fibers.pause();
}

// --- a launch

static thread_local std::string counts;

static void note_counts(const Run& run) {
  std::string json = "{";
  for (uint32_t i = 0; i < run.code.table->opcode_count; ++i)
    if (run.counts[i] != 0)
      json += (json.size() > 1 ? ", \"" : "\"") + std::string(run.code.table->opcodes[i]) +
              "\": " + std::to_string(run.counts[i]);
  counts = json + "}";
}
std::string counts_as_json() {
  const char* counting = std::getenv("SIMULATED_GPU_COUNT");
  return counting != nullptr && std::strcmp(counting, "1") == 0 ? counts : "";
}

static std::atomic<uint64_t> first_block{0};

static void run_blocks(Run& run) {
  const Launch& launch = run.launch;
  const KernelTable& table = *run.code.table;
  const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  for (uint64_t i = first_block; i < blocks; ++i) run.block_order.push_back(i);
  std::shuffle(run.block_order.begin(), run.block_order.end(), run.random);

  Block block(run);
  const size_t fixed =
      (table.shared_bytes + table.shared_alignment - 1) / table.shared_alignment * table.shared_alignment;
  block.shared.resize(fixed + launch.dynamic_shared_bytes);
  block.shared_shadow = Shadow(block.shared.size());
  for (size_t number = 0; number < run.block_order.size(); ++number) {
    block.begin(uint32_t(number));
    block.execute();
  }
}

std::vector<Touched> run_kernel(const KernelCode& code, const Launch& launch) {
  const uint64_t threads = uint64_t(launch.block.x) * launch.block.y * launch.block.z;
  if (threads == 0 || threads > 1024)
    throw Fault{code.facts.name + ": a block of " + std::to_string(threads) + " threads"};
  Run run{code, launch, std::minstd_rand(uint32_t((launch.seed + 1) * 0x9e3779b97f4a7c15u >> 33)), {}, {}, {}, {}};
  run.of_site.resize(code.table->site_count);
  run.counts.resize(code.table->opcode_count);
  run_blocks(run);
  note_counts(run);

  std::vector<Touched> touched;
  for (const auto& [begin, region] : run.regions)
    region->shadow.for_each_range([&](uint64_t from, uint64_t to, bool writes) {
      const uint64_t end = region->begin + region->bytes;
      touched.push_back({std::max(region->base + from, begin), std::min(region->base + to, end), writes});
    });
  return touched;
}

}  // namespace simulated_gpu

extern "C" {
void simulated_gpu_first_block(uint64_t block) { simulated_gpu::first_block = block; }
void simulated_gpu_fault(simulated_gpu::Thread& thread, uint32_t site, const char* what) {
  simulated_gpu::fail(thread, site, what);
}
void simulated_gpu_fault_at(simulated_gpu::Thread& thread, uint32_t site, const char* what, uint64_t address) {
  char hexadecimal[32];
  std::snprintf(hexadecimal, sizeof hexadecimal, "%#llx", static_cast<unsigned long long>(address));
  simulated_gpu::fail(thread, site, std::string(what) + " at " + hexadecimal);
}
}
