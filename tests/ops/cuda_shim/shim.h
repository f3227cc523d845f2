// Runs CUDA kernels on the CPU, thread by thread, so that they can be tested without a GPU.
//
// Compile a `.cu` file as C++ with this header included first. Each CUDA thread is a fiber that
// runs until it meets a barrier or a shuffle; one block of threads runs at a time, in either order
// of threads. The compiler's sanitizers see every access. What it cannot show: the memory model,
// and races that need true concurrency.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// The scheduler is not what is tested, and runs more often than any line of a kernel.
#define CUDA_SHIM_UNCHECKED \
  __attribute__((noinline, optimize("O2"), no_sanitize("address", "undefined")))

namespace cuda_shim {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 192 * 1024;

// A barrier is a count of arrivals and a generation that waiting threads watch.
struct Barrier {
  unsigned arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t start;
  void* resume[5];
  bool started;
  std::unique_ptr<char[]> stack;
  bool done;
  const Barrier* waiting;
  unsigned generation;
};

struct Warp {
  Barrier barrier;
  // Two sets of slots: a lane that is ahead by one shuffle must not overwrite what others yet read.
  uint64_t slots[2][kWarp];
};

inline bool reverse_order = false;
// Grids with more blocks than this skip the first ones: a far end costs no walk there.
inline unsigned first_block = 0;

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline ucontext_t idle;
inline void* scheduler[5];
inline Fiber* current;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::exit(3);
}

// Not the C library's: AddressSanitizer makes a system call of each.
[[noreturn]] CUDA_SHIM_UNCHECKED inline void jump(void** target) { __builtin_longjmp(target, 1); }

CUDA_SHIM_UNCHECKED inline void entry() {
  body();
  current->done = true;
  jump(scheduler);
}

CUDA_SHIM_UNCHECKED inline void wait(Barrier& barrier, unsigned expected) {
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waiting = &barrier;
  current->generation = barrier.generation;
  if (__builtin_setjmp(current->resume) == 0) jump(scheduler);
  current->waiting = nullptr;
}

// Runs the current fiber up to its next wait. Only its start takes a context switch: a jump is many
// times cheaper, for it leaves the signal mask alone.
CUDA_SHIM_UNCHECKED inline void run_current() {
  if (__builtin_setjmp(scheduler) != 0) return;
  if (current->started) jump(current->resume);
  current->started = true;
  swapcontext(&idle, &current->start);
}

CUDA_SHIM_UNCHECKED inline void run_block() {
  const unsigned count = blockDim.x;
  fibers.resize(count);
  warps.assign(count / kWarp, {});
  block_barrier = {};
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.started = fiber.done = false;
    fiber.waiting = nullptr;
    makecontext(&fiber.start, entry, 0);
  }
  for (unsigned done = 0; done < count;) {
    bool progress = false;
    for (unsigned k = 0; k < count; ++k) {
      const unsigned thread = reverse_order ? count - 1 - k : k;
      Fiber& fiber = fibers[thread];
      const bool waits = fiber.waiting && fiber.waiting->generation == fiber.generation;
      if (fiber.done || waits) continue;
      progress = true;
      current = &fiber;
      threadIdx = {thread, 0, 0};
      run_current();
      done += fiber.done;
    }
    if (!progress) fail("threads wait at a barrier that others never reach");
  }
}

template <typename T>
T shuffle_xor(unsigned mask, T value, int distance) {
  if (mask != 0xffffffff) fail("only full-warp shuffles are supported");
  const unsigned thread = threadIdx.x;
  const unsigned lane = thread % kWarp;
  Warp& warp = warps[thread / kWarp];
  auto& slots = warp.slots[warp.barrier.generation % 2];
  std::memcpy(&slots[lane], &value, sizeof(T));
  wait(warp.barrier, kWarp);
  std::memcpy(&value, &slots[lane ^ distance], sizeof(T));
  return value;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  const bool shaped =
      config->blockDim.x > 0 && config->blockDim.x <= 1024 && config->blockDim.x % kWarp == 0;
  if (config->gridDim.x == 0 || !shaped) return cudaErrorInvalidConfiguration;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  body = [&] { kernel(arguments...); };
  const unsigned first = first_block < gridDim.x ? first_block : 0;
  for (unsigned block = first; block < gridDim.x; ++block) {
    blockIdx = {block, 0, 0};
    run_block();
  }
  return cudaSuccess;
}

}  // namespace cuda_shim

inline void __syncthreads() { cuda_shim::wait(cuda_shim::block_barrier, blockDim.x); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return cuda_shim::shuffle_xor(mask, value, distance);
}

template <typename T>
T __ldcs(const T* p) {
  return *p;
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Selectors below 8: bytes of `low`, then of `high`.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int k = 0; k < 4; ++k) {
    const unsigned chosen = selector >> 4 * k & 0xf;
    if (chosen > 7) cuda_shim::fail("__byte_perm cannot replicate signs");
    result |= static_cast<unsigned>(bytes >> 8 * chosen & 0xff) << 8 * k;
  }
  return result;
}

using std::min;

#define cudaLaunchKernelEx cuda_shim::launch
#define cudaFuncGetAttributes(attributes, kernel) (void(attributes), void(kernel), cudaSuccess)
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(error) ""
