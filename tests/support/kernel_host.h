// Lets the host compile the CUDA sources of service/engines/kernels and run them thread by thread.
// tests/support/kernel_host.py includes each source after this file and registers its kernels.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

static thread_local Dim3 gridDim, blockDim, blockIdx, threadIdx;

#define __global__
#define __device__
#define __forceinline__ inline

static inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline int __popc(unsigned value) { return __builtin_popcount(value); }
static inline int __ffs(int value) { return __builtin_ffs(value); }
static inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }

// One thread runs after the other, so nothing needs to be atomic.
template <typename T>
static inline T atomicAdd(T* target, T value) {
  const T before = *target;
  *target += value;
  return before;
}
static inline int atomicMin(int* target, int value) {
  const int before = *target;
  *target = value < before ? value : before;
  return before;
}
static inline int atomicMax(int* target, int value) {
  const int before = *target;
  *target = value > before ? value : before;
  return before;
}

template <typename... A, std::size_t... I>
static void run_threads(void (*kernel)(A...), const unsigned* grid, unsigned block, void** arguments,
                        std::index_sequence<I...>) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block, 1, 1};
  for (unsigned z = 0; z < grid[2]; ++z)
    for (unsigned y = 0; y < grid[1]; ++y)
      for (unsigned x = 0; x < grid[0]; ++x)
        for (unsigned t = 0; t < block; ++t) {
          blockIdx = {x, y, z};
          threadIdx = {t, 0, 0};
          kernel(*static_cast<A*>(arguments[I])...);
        }
}

// `count` of the arguments, or 0 from a driver, which is not told.
template <typename... A>
static int run_kernel(void (*kernel)(A...), const unsigned* grid, unsigned block, void** arguments,
                      unsigned count) {
  if (count != 0 && count != sizeof...(A)) return 1;
  run_threads(kernel, grid, block, arguments, std::index_sequence_for<A...>{});
  return 0;
}

// The address of `run_NAME` is what the host launcher calls.
#define REGISTER(NAME)                                                                              \
  extern "C" int run_##NAME(const unsigned* grid, unsigned block, void** arguments,                 \
                            unsigned count) {                                                       \
    return run_kernel(NAME, grid, block, arguments, count);                                         \
  }
