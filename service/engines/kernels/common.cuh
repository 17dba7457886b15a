// What all kernels share. No header of CUDA is needed, and no kernel has a barrier, shared memory or
// a warp primitive: each thread can be run alone, so the host compiles the very same source and runs
// it thread by thread (tests/support/kernel_host.h).
//
// Symbols: B batch, K candidates, N masks to paste, H W window in the original, h w mask.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

// Bit patterns of the two 16-bit floats; both become fp32 exactly.
struct Float16 {
  u16 bits;
};
struct BFloat16 {
  u16 bits;
};

// What paste.cu and runs.cu find of a mask; the host reads it.
struct Head {
  u32 edge_base, edges;
  u32 byte_base, bytes;
  u32 area;
  int top, bottom, left, right;  // the last ones inclusive
};

static __device__ __forceinline__ float widen(float value) { return value; }

static __device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<u32>(value.bits) << 16);
}

static __device__ __forceinline__ float widen(Float16 value) {
  const u32 sign = static_cast<u32>(value.bits & 0x8000u) << 16;
  const u32 magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude << 13));
  // The exponents' biases differ by 112; the product is exact, for subnormal numbers too.
  const float positive = __uint_as_float(magnitude << 13) * 5192296858534827628530496329220096.0f;
  return __uint_as_float(sign | __float_as_uint(positive));
}

static __device__ __forceinline__ int thread_x() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

static __device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
static __device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }
