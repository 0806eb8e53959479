#include "fibers.h"

#include <sys/mman.h>

#include <new>

// swapcontext() asks the kernel for the signal mask each time, a hundred times what the switch itself takes.
#if defined(__x86_64__)
extern "C" void simulated_gpu_switch(void** from, void* to);
extern "C" void simulated_gpu_enter();
asm(R"(
.text
.globl simulated_gpu_switch
.hidden simulated_gpu_switch
.type simulated_gpu_switch,@function
simulated_gpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simulated_gpu_switch,.-simulated_gpu_switch
.globl simulated_gpu_enter
.hidden simulated_gpu_enter
.type simulated_gpu_enter,@function
simulated_gpu_enter:
  movq %r12, %rdi
  call *%rbx
  ud2
.size simulated_gpu_enter,.-simulated_gpu_enter
)");
#else
#error "a switch of stacks for this processor, please: six registers and the stack pointer"
#endif

namespace simulated_gpu {

void Fibers::run(void* self) {
  auto* context = static_cast<Context*>(self);
  context->function(context->argument);
  context->owner->pause();
}

static constexpr size_t kPage = 4096;

Fibers::~Fibers() { release(); }

void Fibers::release() {
  if (stacks_ != nullptr) munmap(stacks_, count_ * bytes_);
  stacks_ = nullptr;
}

void Fibers::reserve(size_t count, size_t stack_bytes) {
  fibers_.resize(count);
  stack_bytes = (stack_bytes + kPage - 1) / kPage * kPage + kPage;
  if (stacks_ != nullptr && count <= count_ && stack_bytes <= bytes_) return;
  release();
  count_ = count;
  bytes_ = stack_bytes;
  void* memory =
      mmap(nullptr, count_ * bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks_ = static_cast<char*>(memory);
  for (size_t i = 0; i < count_; ++i) mprotect(stacks_ + i * bytes_, kPage, PROT_NONE);  // who overflows hits this
}

void Fibers::start(size_t index, void (*function)(void*), void* argument) {
  Context& fiber = fibers_[index];
  fiber.owner = this;
  fiber.function = function;
  fiber.argument = argument;
  auto** top = reinterpret_cast<void**>(stacks_ + (index + 1) * bytes_);
  *--top = nullptr;
  *--top = nullptr;  // so that the stack is aligned where simulated_gpu_enter calls
  *--top = reinterpret_cast<void*>(&simulated_gpu_enter);
  *--top = nullptr;                                // rbp
  *--top = reinterpret_cast<void*>(&Fibers::run);  // rbx
  *--top = &fiber;                                 // r12
  for (int i = 0; i < 3; ++i) *--top = nullptr;    // r13 to r15
  fiber.stack = top;
}
void Fibers::resume(size_t index) {
  current_ = index;
  simulated_gpu_switch(&outside_, fibers_[index].stack);
}
void Fibers::pause() { simulated_gpu_switch(&fibers_[current_].stack, outside_); }

}  // namespace simulated_gpu
