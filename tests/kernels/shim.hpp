// Runs kernels on the CPU, so that their logic can be tested without a GPU. Included before the kernels' source, which
// is then ordinary C++; only what kernels/ uses is here.
//
// Thread blocks run one after the other. The threads of a block are fibers that run one after the other, each until its
// next barrier or shuffle: in order in even thread blocks and backwards in odd ones, so that a missing barrier gives
// wrong numbers in one of them. Shared memory begins as NaN and has exactly the bytes that the launch asks for. What a
// GPU does at the same time, and how fast, is not seen here.

#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };

static Index threadIdx, blockIdx, gridDim, blockDim;

namespace shim {

constexpr unsigned LANES = 32;
constexpr unsigned SHARED_BYTES_MAX = 48 << 10;
constexpr unsigned GUARD_BYTES = 4 << 10;
constexpr size_t STACK_BYTES = 64 << 10;

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "thread %u of thread block (%u, %u): %s\n", threadIdx.x, blockIdx.x, blockIdx.y, what);
    abort();
}

// Threads that wait for each other. Those that have ended are not waited for.
struct Barrier {
    unsigned living, arrived, passed;

    void release_if_complete() {
        if (arrived > 0 && arrived == living) {
            arrived = 0;
            passed++;
        }
    }
};

struct Fiber {
    ucontext_t start;
    jmp_buf where;
    bool started, ended;
    // What it waits for, and how often that had been passed before.
    Barrier* barrier;
    unsigned passed;
    std::unique_ptr<char[]> stack;
};

struct Warp {
    Barrier barrier;
    unsigned values[LANES];
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier block;
static jmp_buf scheduler;

// What every thread of the launch does.
static void (*body)(const void* kernel, const void* arguments);
static const void *kernel, *arguments;

static Warp& warp() { return warps[threadIdx.x / LANES]; }

// Fibers begin with a context and change with jumps: changing contexts asks the operating system each time.
static void wait(Barrier& barrier) {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.barrier = &barrier;
    fiber.passed = barrier.passed;
    barrier.arrived++;
    barrier.release_if_complete();
    if (_setjmp(fiber.where) == 0) _longjmp(scheduler, 1);
}

static void begin() {
    body(kernel, arguments);
    fibers[threadIdx.x].ended = true;
    for (Barrier* barrier : {&block, &warp().barrier}) {
        barrier->living--;
        barrier->release_if_complete();
    }
    _longjmp(scheduler, 1);
}

// Not inlined: what a caller keeps in registers is then saved by the call, as a jump needs it.
__attribute__((noinline)) static void resume(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.where, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

static void run_block(unsigned threads, bool backwards) {
    block = {threads, 0, 0};
    warps.assign((threads + LANES - 1) / LANES, Warp{});
    for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.started = fiber.ended = false;
        fiber.barrier = nullptr;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        makecontext(&fiber.start, begin, 0);
        warps[i / LANES].barrier.living++;
    }
    while (block.living > 0) {
        bool moved = false;
        for (unsigned i = 0; i < threads; i++) {
            threadIdx.x = backwards ? threads - 1 - i : i;
            Fiber& fiber = fibers[threadIdx.x];
            if (fiber.ended || (fiber.barrier && fiber.barrier->passed == fiber.passed)) continue;
            moved = true;
            resume(fiber);
        }
        if (!moved) fail("waits at a barrier or shuffle that not all of its threads reach");
    }
}

}  // namespace shim

alignas(16) float4 shared_memory[(shim::SHARED_BYTES_MAX + shim::GUARD_BYTES) / sizeof(float4)];

// Runs `body(kernel, arguments)` for every thread of a launch.
extern "C" void shim_launch(
    void (*body)(const void*, const void*), const void* kernel, const void* arguments, unsigned grid_x, unsigned grid_y,
    unsigned threads, unsigned shared_bytes) {
    shim::body = body;
    shim::kernel = kernel;
    shim::arguments = arguments;
    gridDim = {grid_x, grid_y, 1};
    blockDim = {threads, 1, 1};
    if (shared_bytes > shim::SHARED_BYTES_MAX) shim::fail("more shared memory than every GPU gives unasked");
    while (shim::fibers.size() < threads) {
        shim::fibers.emplace_back();
        shim::fibers.back().stack.reset(new char[shim::STACK_BYTES]);
    }
    char* guard = reinterpret_cast<char*>(shared_memory) + shared_bytes;
    for (unsigned y = 0; y < grid_y; y++) {
        for (unsigned x = 0; x < grid_x; x++) {
            blockIdx = {x, y, 0};
            memset(shared_memory, 0xff, sizeof(shared_memory));
            shim::run_block(threads, x % 2 == 1);
            for (unsigned i = 0; i < shim::GUARD_BYTES; i++) {
                if (guard[i] != char(0xff)) shim::fail("wrote behind its shared memory");
            }
        }
    }
}

static void __syncthreads() { shim::wait(shim::block); }

static void __syncwarp() { shim::wait(shim::warp().barrier); }

static float __uint_as_float(unsigned bits) {
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static unsigned __float_as_uint(float number) {
    unsigned bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

// Gives every lane what all lanes of the warp gave.
static void exchange_of_warp(unsigned mask, unsigned value, unsigned (&values)[shim::LANES]) {
    shim::Warp& warp = shim::warp();
    if (mask != 0xffffffff || warp.barrier.living != shim::LANES) shim::fail("a shuffle without the whole warp");
    warp.values[threadIdx.x % shim::LANES] = value;
    shim::wait(warp.barrier);
    memcpy(values, warp.values, sizeof values);
    shim::wait(warp.barrier);
}

static float __shfl_xor_sync(unsigned mask, float value, unsigned offset) {
    unsigned values[shim::LANES];
    exchange_of_warp(mask, __float_as_uint(value), values);
    return __uint_as_float(values[threadIdx.x % shim::LANES ^ offset]);
}

static unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    unsigned values[shim::LANES], sum = 0;
    exchange_of_warp(mask, value, values);
    for (unsigned of_lane : values) sum += of_lane;
    return sum;
}

static unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    unsigned values[shim::LANES], any = 0;
    exchange_of_warp(mask, value, values);
    for (unsigned of_lane : values) any |= of_lane;
    return any;
}

static unsigned __ballot_sync(unsigned mask, bool vote) {
    unsigned values[shim::LANES], ballot = 0;
    exchange_of_warp(mask, vote, values);
    for (unsigned lane = 0; lane < shim::LANES; lane++) ballot |= values[lane] << lane;
    return ballot;
}

static unsigned __popc(unsigned bits) { return __builtin_popcount(bits); }

static unsigned __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }

static unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }

static float half_to_float(unsigned short bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float number = exponent == 0 ? ldexpf(fraction, -24) : ldexpf(1024 + fraction, exponent - 25);
    if (exponent == 31) number = fraction ? NAN : INFINITY;
    return bits >> 15 ? -number : number;
}
