// The threads of a block on one processor: each runs on a stack of its own until it waits for its warp or its block,
// and goes on when all have come. Included by sgd_cuda_on_cpu.cpp.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <functional>
#include <memory>
#include <vector>

#include "cuda_on_cpu.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

class Block {
 public:
  explicit Block(int threads) : threads_(static_cast<size_t>(threads)) {}

  // One for each thread of the operating system: stacks are made once.
  static Block& of_this_thread(int threads) {
    static thread_local Block block(threads);
    return block;
  }
  static Block& running() { return *running_; }

  // Calls kernel() as each thread; order(i): which comes i-th.
  void run(const std::function<void()>& kernel, const std::function<int(int)>& order) {
    running_ = this;
    kernel_ = &kernel;
    const int count = static_cast<int>(threads_.size());
    for (Thread& thread : threads_) thread.state = State::ready;
    for (int left = count; left > 0;) {
      bool moved = false;
      for (int i = 0; i < count; ++i) {
        Thread& thread = threads_[static_cast<size_t>(order(i))];
        if (thread.state != State::ready) continue;
        resume(order(i));
        moved = true;
        if (thread.state == State::done) --left;
      }
      if (left > 0 && !release() && !moved) fail("threads wait for others that never come");
    }
  }

  void wait(bool for_block) {
    Thread& thread = threads_[static_cast<size_t>(current_)];
    thread.state = for_block ? State::waits_for_block : State::waits_for_warp;
    leave(thread);
  }

  uint64_t exchange(uint64_t mine, unsigned lane) {
    threads_[static_cast<size_t>(current_)].value = mine;
    wait(/*for_block=*/false);
    const uint64_t other = threads_[static_cast<size_t>(current_) / kWarp * kWarp + lane].value;
    wait(/*for_block=*/false);
    return other;
  }

 private:
  static constexpr size_t kWarp = 32;
  static constexpr size_t kStackBytes = size_t{1} << 18;
  enum class State { ready, waits_for_warp, waits_for_block, done };
  struct Thread {
    State state = State::done;
    uint64_t value = 0;
    ucontext_t context;
    std::unique_ptr<char[]> stack;
  };

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "a kernel on the CPU: %s\n", what);
    std::abort();
  }

  // Lets those go on that waited, where all have come. A warp waits for all of its lanes; a block for those that are
  // not done.
  bool release() {
    bool any = false;
    for (size_t first = 0; first < threads_.size(); first += kWarp) {
      size_t waiting = 0, done = 0;
      for (size_t t = first; t < first + kWarp; ++t) {
        waiting += threads_[t].state == State::waits_for_warp;
        done += threads_[t].state == State::done;
      }
      if (waiting != 0 && done != 0) fail("a warp waits for a lane that has returned");
      if (waiting != kWarp) continue;
      for (size_t t = first; t < first + kWarp; ++t) threads_[t].state = State::ready;
      any = true;
    }
    size_t waiting = 0, done = 0;
    for (const Thread& thread : threads_) {
      waiting += thread.state == State::waits_for_block;
      done += thread.state == State::done;
    }
    if (waiting == 0 || waiting + done != threads_.size()) return any;
    for (Thread& thread : threads_)
      if (thread.state == State::waits_for_block) thread.state = State::ready;
    return true;
  }

  void resume(int number) {
    current_ = number;
    threadIdx.x = static_cast<unsigned>(number);
    Thread& thread = threads_[static_cast<size_t>(number)];
    if (thread.stack == nullptr) {
      thread.stack.reset(new char[kStackBytes]);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Block::live, 0);
    }
    change(main_, thread.context, thread.stack.get(), kStackBytes);
  }
  void leave(Thread& thread) { change(thread.context, main_, main_stack_, main_stack_bytes_); }

  // What a stack's first function is: a kernel's call for every launch.
  static void live() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &running_->main_stack_, &running_->main_stack_bytes_);
#endif
    for (;;) {
      Block& block = *running_;
      (*block.kernel_)();
      Thread& thread = block.threads_[static_cast<size_t>(block.current_)];
      thread.state = State::done;
      block.leave(thread);
    }
  }

  static void change(ucontext_t& from, ucontext_t& to, [[maybe_unused]] const void* stack,
                     [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack, bytes);
    swapcontext(&from, &to);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swapcontext(&from, &to);
#endif
  }

  static inline thread_local Block* running_ = nullptr;
  std::vector<Thread> threads_;
  const std::function<void()>* kernel_ = nullptr;
  int current_ = 0;
  ucontext_t main_{};
  const void* main_stack_ = nullptr;
  size_t main_stack_bytes_ = 0;
};

void wait_for_block() { Block::running().wait(/*for_block=*/true); }
void wait_for_warp() { Block::running().wait(/*for_block=*/false); }
uint64_t value_of_lane(uint64_t mine, unsigned lane) { return Block::running().exchange(mine, lane); }

}  // namespace cuda_on_cpu
