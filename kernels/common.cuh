// What the kernels share. One program is made of this file, score.cu and attend.cu, in this order, and compiled when it
// is needed. It includes no header, so that the compiler's library is all that a machine needs beside its driver.
//
// Every thread block has THREADS threads in one dimension, or what its kernel says. All shared memory is dynamic: a kernel's host side says how
// many bytes. A kernel takes one structure by value; src/cuda/launch.rs has its twin, field by field.
//
// Letters are those of docs/architecture.md: Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dim, B block tokens,
// N blocks, T query tokens, k blocks retrieved, m keys per block.

constexpr unsigned THREADS = 256;
constexpr unsigned WARP = 32;
constexpr unsigned WARPS = THREADS / WARP;
constexpr unsigned ALL_LANES = 0xffffffff;

// Of float4, the widest thing that is read from it at once.
extern __shared__ float4 shared_memory[];

static __device__ __forceinline__ float infinity() {
    return __uint_as_float(0x7f800000);
}

// Two halves.
static __device__ __forceinline__ void widen_pair(unsigned pair, float& low, float& high) {
#ifdef __CUDACC__
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(pair));
#else
    low = half_to_float(pair & 0xffff);
    high = half_to_float(pair >> 16);
#endif
}

// Eight halves, the first in the lowest bits.
static __device__ __forceinline__ void widen(uint4 eight, float (&to)[8]) {
    widen_pair(eight.x, to[0], to[1]);
    widen_pair(eight.y, to[2], to[3]);
    widen_pair(eight.z, to[4], to[5]);
    widen_pair(eight.w, to[6], to[7]);
}

// Eight signed bytes, the first in the lowest bits.
static __device__ __forceinline__ void widen(uint2 eight, float (&to)[8]) {
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
        to[i] = static_cast<signed char>(eight.x >> 8 * i);
        to[4 + i] = static_cast<signed char>(eight.y >> 8 * i);
    }
}

// Maximum over aligned groups of `width` lanes, a power of two up to WARP. All lanes of the warp must call it.
static __device__ __forceinline__ float lanes_max(float number, unsigned width) {
    for (unsigned offset = width / 2; offset > 0; offset /= 2) {
        number = fmaxf(number, __shfl_xor_sync(ALL_LANES, number, offset));
    }
    return number;
}

// Sum, as lanes_max.
static __device__ __forceinline__ float lanes_sum(float number, unsigned width) {
    for (unsigned offset = width / 2; offset > 0; offset /= 2) {
        number += __shfl_xor_sync(ALL_LANES, number, offset);
    }
    return number;
}

// The largest of `count` values, and the sum of e^(value - top). All lanes of a warp get the same.
struct TopSum {
    float top;
    float sum;
};

static __device__ __forceinline__ TopSum warp_top_sum(const float* values, unsigned count) {
    const unsigned lane = threadIdx.x % WARP;
    float top = -infinity();
    for (unsigned i = lane; i < count; i += WARP) top = fmaxf(top, values[i]);
    top = lanes_max(top, WARP);
    float sum = 0;
    for (unsigned i = lane; i < count; i += WARP) sum += expf(values[i] - top);
    return {top, lanes_sum(sum, WARP)};
}
