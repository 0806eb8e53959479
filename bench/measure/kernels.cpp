// Plain kernels that read and write what a step reads and writes, and compute next to nothing: what limit.py takes for
// the CPU's limit. Each reads p, g and b and writes p and b unchanged, over all of a list of tensors, with torch's
// threads.
//
// No optimizer: no formula, no dtypes, no checks. limit.py compiles this file and calls it by ctypes.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Of one tensor: `size` bytes each at p, g and b. `zero` is 0, which the compiler does not know: g has to be read.
using Stream = void (*)(char* p, const char* g, char* b, std::ptrdiff_t size, std::uint64_t zero);

// A kernel with accesses of WIDTH bytes, four of them in flight an operand. PREFETCH: how far ahead, in bytes, or 0.
// STORE(address, value) writes; ALIGNED: it needs an address that is a multiple of WIDTH.
#define STREAM_KERNEL(NAME, TARGET, WIDTH, PREFETCH, ALIGNED, STORE)                                         \
  TARGET void NAME(char* p, const char* g, char* b, std::ptrdiff_t size, std::uint64_t zero) {               \
    using Vector = std::uint64_t __attribute__((vector_size(WIDTH), aligned(1), may_alias));                 \
    const Vector mask = Vector{} + zero;                                                                     \
    std::ptrdiff_t i = 0;                                                                                    \
    if (ALIGNED) {                                                                                           \
      const auto past = static_cast<std::ptrdiff_t>(reinterpret_cast<std::uintptr_t>(p) % (WIDTH));          \
      const bool alike = reinterpret_cast<std::uintptr_t>(b) % (WIDTH) == static_cast<std::uintptr_t>(past); \
      i = !alike ? size : past == 0 ? 0 : std::min<std::ptrdiff_t>(size, (WIDTH) - past);                    \
      bytes(p, g, b, 0, i, zero);                                                                            \
    }                                                                                                        \
    for (; i + 4 * (WIDTH) <= size; i += 4 * (WIDTH)) {                                                      \
      if constexpr ((PREFETCH) > 0) {                                                                        \
        for (int line = 0; line < 4 * (WIDTH); line += 64) {                                                 \
          __builtin_prefetch(p + i + (PREFETCH) + line, 1);                                                  \
          __builtin_prefetch(g + i + (PREFETCH) + line, 0);                                                  \
          __builtin_prefetch(b + i + (PREFETCH) + line, 1);                                                  \
        }                                                                                                    \
      }                                                                                                      \
      Vector pv[4], gv[4], bv[4];                                                                            \
      for (int k = 0; k < 4; ++k) pv[k] = *reinterpret_cast<const Vector*>(p + i + k * (WIDTH));             \
      for (int k = 0; k < 4; ++k) gv[k] = *reinterpret_cast<const Vector*>(g + i + k * (WIDTH)) & mask;      \
      for (int k = 0; k < 4; ++k) bv[k] = *reinterpret_cast<const Vector*>(b + i + k * (WIDTH));             \
      for (int k = 0; k < 4; ++k) STORE(reinterpret_cast<Vector*>(b + i + k * (WIDTH)), bv[k] | gv[k]);      \
      for (int k = 0; k < 4; ++k) STORE(reinterpret_cast<Vector*>(p + i + k * (WIDTH)), pv[k] | gv[k]);      \
    }                                                                                                        \
    bytes(p, g, b, i, size, zero);                                                                           \
  }

inline void bytes(char* p, const char* g, char* b, std::ptrdiff_t begin, std::ptrdiff_t end, std::uint64_t zero) {
  for (std::ptrdiff_t i = begin; i < end; ++i) {
    const char masked = static_cast<char>(g[i] & static_cast<char>(zero));
    b[i] = static_cast<char>(b[i] | masked);
    p[i] = static_cast<char>(p[i] | masked);
  }
}

#define PLAIN(address, value) *(address) = (value)
STREAM_KERNEL(baseline_16, , 16, 0, false, PLAIN)

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f")))
#define PAST_CACHES_32(address, value) \
  _mm256_stream_si256(reinterpret_cast<__m256i*>(address), reinterpret_cast<__m256i>(value))
#define PAST_CACHES_64(address, value) \
  _mm512_stream_si512(reinterpret_cast<__m512i*>(address), reinterpret_cast<__m512i>(value))
STREAM_KERNEL(avx2_32, AVX2, 32, 0, false, PLAIN)
STREAM_KERNEL(avx2_32_prefetched, AVX2, 32, 1024, false, PLAIN)
STREAM_KERNEL(avx2_32_past_caches, AVX2, 32, 0, true, PAST_CACHES_32)
STREAM_KERNEL(avx512_64, AVX512, 64, 0, false, PLAIN)
STREAM_KERNEL(avx512_64_prefetched, AVX512, 64, 1024, false, PLAIN)
STREAM_KERNEL(avx512_64_past_caches, AVX512, 64, 0, true, PAST_CACHES_64)
#endif

enum class Needs { nothing, avx2, avx512 };

struct Kernel {
  const char* name;
  Stream stream;
  Needs needs;
  enum Walk {
    forth,           // each thread takes one run of all the bytes
    in_turns,        // each takes a block of them in turns with the others
    back_and_forth,  // as forth, but every other call from the end: what is left in a cache is met first
  } walk;
};

constexpr std::int64_t block_bytes = 64 << 10;
bool is_backwards = false;  // whether the last call that goes back and forth went back

const Kernel kernels[] = {
    {"16 bytes", baseline_16, Needs::nothing, Kernel::forth},
    {"16 bytes, in turns", baseline_16, Needs::nothing, Kernel::in_turns},
    {"16 bytes, back and forth", baseline_16, Needs::nothing, Kernel::back_and_forth},
#if defined(__x86_64__)
    {"AVX2", avx2_32, Needs::avx2, Kernel::forth},
    {"AVX2, in turns", avx2_32, Needs::avx2, Kernel::in_turns},
    {"AVX2, back and forth", avx2_32, Needs::avx2, Kernel::back_and_forth},
    {"AVX2, prefetched", avx2_32_prefetched, Needs::avx2, Kernel::forth},
    {"AVX2, stores past the caches", avx2_32_past_caches, Needs::avx2, Kernel::forth},
    {"AVX-512", avx512_64, Needs::avx512, Kernel::forth},
    {"AVX-512, in turns", avx512_64, Needs::avx512, Kernel::in_turns},
    {"AVX-512, back and forth", avx512_64, Needs::avx512, Kernel::back_and_forth},
    {"AVX-512, prefetched", avx512_64_prefetched, Needs::avx512, Kernel::forth},
    {"AVX-512, stores past the caches", avx512_64_past_caches, Needs::avx512, Kernel::forth},
#endif
};

// Fewer bytes an operand are not worth a second thread.
constexpr std::int64_t grain = 64 << 10;

}  // namespace

// Tensors as if one lay behind the other: tensor i has the bytes starts[i] to starts[i + 1], of each operand.
struct Tensors {
  std::int64_t count;
  char* const* p;
  char* const* g;
  char* const* b;
  const std::int64_t* starts;
};

static void run(const Kernel& kernel, const Tensors& tensors, std::int64_t begin, std::int64_t end,
                std::uint64_t zero) {
  const std::int64_t* const last = tensors.starts + tensors.count;
  std::int64_t i = std::upper_bound(tensors.starts, last, begin) - tensors.starts - 1;
  for (; begin < end; ++i) {
    const std::int64_t offset = begin - tensors.starts[i];
    const std::int64_t stop = std::min(end, tensors.starts[i + 1]);
    kernel.stream(tensors.p[i] + offset, tensors.g[i] + offset, tensors.b[i] + offset, stop - begin, zero);
    begin = stop;
  }
}

extern "C" {

int variants() { return static_cast<int>(sizeof kernels / sizeof kernels[0]); }

const char* variant_name(int variant) { return kernels[variant].name; }

// Whether this machine can run it.
int variant_runs(int variant) {
#if defined(__x86_64__)
  switch (kernels[variant].needs) {
    case Needs::nothing:
      return 1;
    case Needs::avx2:
      return __builtin_cpu_supports("avx2") ? 1 : 0;
    case Needs::avx512:
      return __builtin_cpu_supports("avx512f") ? 1 : 0;
  }
#endif
  return kernels[variant].needs == Needs::nothing ? 1 : 0;
}

// Moves all of the tensors; changes nothing. `zero` must be 0.
void stream(int variant, const Tensors* tensors, std::uint64_t zero) {
  const Kernel& kernel = kernels[variant];
  const std::int64_t all = tensors->starts[tensors->count];
  if (kernel.walk != Kernel::in_turns) {
    is_backwards = kernel.walk == Kernel::back_and_forth && !is_backwards;
    at::parallel_for(0, all, grain, [&](std::int64_t begin, std::int64_t end) {
      if (!is_backwards) return run(kernel, *tensors, begin, end, zero);
      for (; end > begin; end -= block_bytes) run(kernel, *tensors, std::max(begin, end - block_bytes), end, zero);
    });
    return;
  }
  const std::int64_t blocks = (all + block_bytes - 1) / block_bytes;
  const std::int64_t threads = std::min<std::int64_t>(at::get_num_threads(), blocks);
  at::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      for (std::int64_t block = thread; block < blocks; block += threads) {
        run(kernel, *tensors, block * block_bytes, std::min(all, (block + 1) * block_bytes), zero);
      }
    }
  });
}

}  // extern "C"
