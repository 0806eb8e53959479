// Stacks of their own for functions that wait for one another.
#pragma once

#include <cstddef>
#include <vector>

namespace simulated_gpu {

class Fibers {
 public:
  Fibers() = default;
  Fibers(const Fibers&) = delete;
  ~Fibers();

  // Room for so many, each with a stack of so many bytes. What ran before is forgotten.
  void reserve(size_t count, size_t stack_bytes);
  void start(size_t index, void (*function)(void*), void* argument);  // runs at the first resume()
  void resume(size_t index);  // until it calls pause() or its function returns; that must not throw
  void pause();               // of the one that runs

 private:
  struct Context {
    Fibers* owner;
    void (*function)(void*);
    void* argument;
    void* stack;  // where it paused
  };
  static void run(void* context);
  void release();

  std::vector<Context> fibers_;
  char* stacks_ = nullptr;
  size_t count_ = 0, bytes_ = 0, current_ = 0;
  void* outside_ = nullptr;
};

}  // namespace simulated_gpu
