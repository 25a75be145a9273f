// The functions of device.cuh on the CPU, and what CUDA gives a single thread; see machine.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "emulated_collectives.h"
#include "emulated_cuda.h"
#include "machine.h"

#define HOST_DEVICE inline
#define DEVICE inline
#define DYNAMIC_SHARED(name) unsigned char* name = rtpurbo::emulation::shared_memory()

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline void __threadfence() {}
template <typename Value>
Value __ldcg(const Value* address) { return *address; }
inline uint32_t atomicAdd(uint32_t* address, uint32_t amount) {
    const uint32_t old = *address;
    *address += amount;
    return old;
}

// Of a launch that failed: what the machine found.
inline const char* cudaGetErrorString(cudaError_t) {
    return rtpurbo::emulation::machine.error.c_str();
}

namespace rtpurbo {

inline int log2_of(uint32_t power) { return 31 - std::countl_zero(power); }

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline uint32_t add_in_order(uint32_t* counter, uint32_t amount) {
    return atomicAdd(counter, amount);
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }

inline int32_t largest_of_warp(int32_t value) {
    const auto& all = emulation::exchange(value, "largest");
    for (int lane = 0; lane < 32; ++lane) {
        value = std::max(value, emulation::read_lane<int32_t>(all, lane));
    }
    return value;
}

inline float multiply(float a, float b) { return a * b; }
inline int from_here(int value) { return value; }
inline uint32_t zero_after(uint32_t) { return 0; }
template <typename Value>
Value load_streaming(const Value* address) { return *address; }

inline uint32_t pack_bfloat16(float low, float high) {
    const auto round = [](float value) -> uint32_t {
        const uint32_t bits = float_to_bits(value);
        if (std::isnan(value)) return 0x7fff;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

inline void copy_async_16(void* shared, const void* global, int bytes) {
    std::memset(shared, emulation::kPoison, 16);
    emulation::machine.threads[emulation::machine.current].open.push_back({shared, global, bytes});
}

inline void copy_async_commit() {
    auto& thread = emulation::machine.threads[emulation::machine.current];
    thread.committed.push_back(std::move(thread.open));
    thread.open.clear();
}

template <int kPending>
void copy_async_wait() {
    auto& groups = emulation::machine.threads[emulation::machine.current].committed;
    while (groups.size() > kPending) {
        for (const auto& copy : groups.front()) {
            std::memset(copy.to, 0, 16);
            std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        }
        groups.erase(groups.begin());
    }
}

// Kernels run one after the other.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

inline uint32_t bytes_up_to(uint32_t four, uint32_t bound) {
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) found |= uint32_t{(four >> 8 * i & 0xff) <= bound} << i;
    return found;
}

}  // namespace rtpurbo
