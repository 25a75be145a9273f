// What CTAs of a cluster (compute capability 9.0) do together: PTX instructions by name, as device.cuh has
// them, and like it emulated on the CPU. On chips without clusters a CTA is one by itself.
#pragma once

#include "device.cuh"

namespace rtpurbo {

constexpr int kMaxRanks = 16;  // CTAs of a cluster

}  // namespace rtpurbo

#ifdef __CUDACC__

namespace rtpurbo {

// They run at the same time, and may write to each other's shared memory from the moment that all have
// started until the one written to ends.
DEVICE int cluster_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
#endif
    return static_cast<int>(rank);
}

DEVICE int cluster_size() {
    uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
#endif
    return static_cast<int>(size);
}

// Where another CTA of the cluster has what `own` is here, in shared memory.
template <typename Value>
DEVICE Value* in_cluster(Value* own, int rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;\n" : "=l"(there) : "l"(own), "r"(rank));
    return reinterpret_cast<Value*>(there);
#else
    return own;
#endif
}

// The first arrival, before which nothing was written that others look at.
DEVICE void cluster_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
#endif
}

// All threads of a cluster arrive, and then wait for all others that have not left. Who waits sees what
// was written before the others arrived.
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
#endif
}

DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}

// What CTAs of a cluster give each other, without a wait for all: a barrier in shared memory, of one CTA,
// counts the bytes of a round that have arrived there. To be made before `cluster_start`, by one thread.
DEVICE void deliveries_init(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;\n" ::"r"(address)
        : "memory");
#endif
}

// Bytes of the next round, by one thread; they may have begun to arrive.
DEVICE void deliveries_expect(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(address),
                 "r"(bytes)
                 : "memory");
#endif
}

// Until all of round number `round` are there.
DEVICE void deliveries_wait(uint64_t* barrier, int round) {
#if __CUDA_ARCH__ >= 900
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(address), "r"(round & 1)
            : "memory");
    }
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// Where another CTA has what `own` is here, for instructions on shared memory.
DEVICE uint32_t cluster_address(const void* own, int rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;\n"
        : "=r"(there)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank));
    return there;
}
#endif

// Puts a value where another CTA, or this one, has what `own` and `barrier` are here.
DEVICE void deliver(float4* own, int rank, float4 value, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
        "[%0], {%2, %3, %4, %5}, [%1];\n" ::"r"(cluster_address(own, rank)),
        "r"(cluster_address(barrier, rank)), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
        : "memory");
#endif
}

DEVICE void deliver(float2* own, int rank, float2 value, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
        "[%0], {%2, %3}, [%1];\n" ::"r"(cluster_address(own, rank)),
        "r"(cluster_address(barrier, rank)), "f"(value.x), "f"(value.y)
        : "memory");
#endif
}

}  // namespace rtpurbo

#else
#include "emulated_clusters.h"
#endif
