// What the kernels need from CUDA beyond C++: PTX instructions by name.
//
// Built by nvcc for a GPU. A host compiler takes `emulated_device.h` in its place: tests run every
// kernel on the CPU that way. The other headers with PTX or the launch of kernels in them are emulated
// likewise (matrices.cuh, clusters.cuh, hopper.cuh, launch.cuh), and nothing else in this folder may
// hold either.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define HOST_DEVICE __host__ __device__ __forceinline__
#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace rtpurbo {

HOST_DEVICE int log2_of(uint32_t power) {
#ifdef __CUDA_ARCH__
    return 31 - __clz(static_cast<int>(power));
#else
    return 31 - __builtin_clz(power);
#endif
}

// 16 bytes from global to shared memory, past L1; with `bytes` 0 nothing is read and zeros written.
DEVICE void copy_async_16(void* shared, const void* global, int bytes) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
                 "r"(bytes)
                 : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kPending` of this thread's newest groups are under way.
template <int kPending>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Two floats as bfloat16, nearest even; `low` in the lower half.
DEVICE uint32_t pack_bfloat16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// The largest of a warp's values, in all lanes.
DEVICE int32_t largest_of_warp(int32_t value) {
    int32_t largest;
    asm("redux.sync.max.s32 %0, %1, 0xffffffff;\n" : "=r"(largest) : "r"(value));
    return largest;
}

// Adds, and returns what was there. Whoever sees the sum sees all that this thread, and those that met
// it at a barrier, wrote before; and this one sees what was written before by all who added earlier.
DEVICE uint32_t add_in_order(uint32_t* counter, uint32_t amount) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;\n"
                 : "=r"(before)
                 : "l"(counter), "r"(amount)
                 : "memory");
    return before;
}

DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }

// A product that no addition after it is fused with: rounded alike wherever it is compiled.
DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }

// Always 0 (bit 1 of a square), which no compiler knows: what it is put into waits for `value`.
DEVICE uint32_t zero_after(uint32_t value) {
    uint32_t zero;
    asm("{ .reg .u32 square; mul.lo.u32 square, %1, %1; and.b32 %0, square, 2; }\n"
        : "=r"(zero)
        : "r"(value));
    return zero;
}

// The same value, but for the compiler another: what comes of it is computed from here on, not ahead of
// all loops, where nothing may be waited for yet.
DEVICE int from_here(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Read once, never again: do not push other data out of L1.
DEVICE uint4 load_streaming(const uint4* address) {
    uint4 value;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

DEVICE uint2 load_streaming(const uint2* address) {
    uint2 value;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n"
        : "=r"(value.x), "=r"(value.y)
        : "l"(address));
    return value;
}

DEVICE uint16_t load_streaming(const uint16_t* address) {
    uint16_t value;
    asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];\n" : "=h"(value) : "l"(address));
    return value;
}

// Programmatic dependent launch (compute capability 9.0): a kernel launched with `overlap` may start
// as soon as all CTAs of the one before it on the stream have let it. What it does before it waits
// may use only what was written before that earlier kernel began; and for that to have an end, the
// earlier one must itself have waited for its predecessor, if it may overlap that.
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until the kernel before has ended and its writes are seen; returns at once without `overlap`.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Which bytes of `four` are at most `bound`, as bits 0 to 3.
DEVICE uint32_t bytes_up_to(uint32_t four, uint32_t bound) {
    // A one in each such byte; the product moves them side by side, to the top.
    return (__vcmpleu4(four, bound * 0x01010101u) & 0x01010101u) * 0x10204080u >> 28;
}

}  // namespace rtpurbo

#else
#include "emulated_device.h"
#endif
