// Instructions of compute capability 9.0a by name: barriers in shared memory, loads of the tensor
// memory accelerator (TMA), and matrix products of a warpgroup (wgmma) on tiles in shared memory. As
// for device.cuh, there is an emulation of them on the CPU.
//
// A tile in shared memory is made of halves of 64 columns: rows of 128 bytes, swizzled by 128 bytes
// as TMA writes them, each half aligned to 1024 bytes.
#pragma once

#include "device.cuh"

#ifdef __CUDACC__

#include <cuda.h>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define RTPURBO_HAS_HOPPER
#endif

namespace rtpurbo {
namespace hopper {

DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers

DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

DEVICE void barrier_expect_bytes(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

DEVICE void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
                 : "memory");
}

// Until the phase of this parity has ended.
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    const uint32_t address = shared_address(barrier);
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(address), "r"(parity)
            : "memory");
    }
}

// Barriers are seen by TMA, and by all threads after a __syncthreads.
DEVICE void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// What this thread wrote to shared memory is seen by wgmma and TMA.
DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

DEVICE void named_sync(int name, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(name), "r"(threads) : "memory");
}

DEVICE void named_arrive(int name, int threads) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(name), "r"(threads) : "memory");
}

template <int kRegisters>
DEVICE void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// ---- loads

// A tensor of bfloat16 of which TMA loads boxes with 64 columns, swizzled by 128 bytes. Sizes and box
// are in elements; strides in bytes, of all dimensions but the first. Returns a cudaError_t.
inline int encode_map(CUtensorMap* map, const void* data, int rank, const uint64_t* sizes,
                      const uint64_t* strides, const uint32_t* box) {
    // The driver's function, asked for: the library does not link against the driver.
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    if (int error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                     cudaEnableDefault, &found)) {
        return error;
    }
    if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    const cuuint32_t steps[3] = {1, 1, 1};
    const CUresult result = reinterpret_cast<Encode>(entry)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(data), sizes, strides, box,
        steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

DEVICE void load_2d(void* shared, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
        : "memory");
}

DEVICE void load_3d(void* shared, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// ---- products

// Descriptor of a tile, 128-byte swizzle. Groups of 8 rows lie 1024 bytes apart; `half_bytes` is the
// distance of halves, used where columns are not the reduced dimension and there are more than 64.
// In two words, of which a step along the tile changes one: sums of 64 bits take three times as long.
struct Tile {
    uint32_t low, high;

    DEVICE Tile(const void* tile, int half_bytes)
        : low((shared_address(tile) & 0x3FFFF) >> 4 | half_bytes >> 4 << 16),
          high(1024 >> 4 | 1u << 30) {}

    // `bytes` further, within shared memory.
    DEVICE Tile operator+(int bytes) const {
        Tile sum = *this;
        sum.low += bytes >> 4;
        return sum;
    }
};

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Until at most `kPending` of the newest groups are under way.
template <int kPending>
DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// A value that the lanes of a warp agree on, so that the compiler knows it: descriptors that come of
// it stay in uniform registers, from which wgmma takes them.
DEVICE int of_warp(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// The compiler may not move reads or writes of these registers across.
template <int kCount>
DEVICE void pin(float (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
DEVICE void pin(uint32_t (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Ends a basic block that has computed this sum of weights, which is never negative: ptxas would
// otherwise move a wait for products ahead of the work that is to run under them.
DEVICE void after(float sum) {
    if (sum < 0.f) asm volatile("nanosleep.u32 0;\n" ::: "memory");
}

#define RTPURBO_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RTPURBO_16(d, i) \
    RTPURBO_4(d, i), RTPURBO_4(d, i + 4), RTPURBO_4(d, i + 8), RTPURBO_4(d, i + 12)
#define RTPURBO_32(d) RTPURBO_16(d, 0), RTPURBO_16(d, 16)
#define RTPURBO_64(d) RTPURBO_32(d), RTPURBO_16(d, 32), RTPURBO_16(d, 48)
#define RTPURBO_NAMES_32                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "     \
    "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RTPURBO_NAMES_64                                                              \
    RTPURBO_NAMES_32                                                                  \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "   \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64 x 128] = a[64 x 16] b[128 x 16]^T, or += ; both tiles have the reduced dimension in columns.
DEVICE void multiply_64x128(float (&d)[64], Tile a, Tile b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\n.reg .b64 a, b;\n"
        "mov.b64 a, {%64, %65};\nmov.b64 b, {%66, %67};\nsetp.ne.b32 p, %68, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" RTPURBO_NAMES_64
        "}, a, b, p, 1, 1, 0, 0;\n}\n"
        : RTPURBO_64(d)
        : "r"(a.low), "r"(a.high), "r"(b.low), "r"(b.high), "r"(accumulate));
}

// d[64 x D] += a[64 x 16] b[16 x D]; a in registers, the rows of b's tile are the reduced dimension.
DEVICE void multiply_add_rows(float (&d)[64], const uint32_t* a, Tile b) {
    asm volatile(
        "{\n.reg .pred p;\n.reg .b64 b;\nmov.b64 b, {%68, %69};\nsetp.ne.b32 p, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" RTPURBO_NAMES_64
        "}, {%64, %65, %66, %67}, b, p, 1, 1, 1;\n}\n"
        : RTPURBO_64(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.low), "r"(b.high));
}

DEVICE void multiply_add_rows(float (&d)[32], const uint32_t* a, Tile b) {
    asm volatile(
        "{\n.reg .pred p;\n.reg .b64 b;\nmov.b64 b, {%36, %37};\nsetp.ne.b32 p, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" RTPURBO_NAMES_32
        "}, {%32, %33, %34, %35}, b, p, 1, 1, 1;\n}\n"
        : RTPURBO_32(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.low), "r"(b.high));
}

#undef RTPURBO_4
#undef RTPURBO_16
#undef RTPURBO_32
#undef RTPURBO_64
#undef RTPURBO_NAMES_32
#undef RTPURBO_NAMES_64

}  // namespace hopper
}  // namespace rtpurbo

#else
#include "emulated_hopper.h"
#endif
