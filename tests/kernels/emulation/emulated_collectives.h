// CUDA's barriers and collective operations of a warp; see machine.h for who waits.
#pragma once

#include <cstdint>

#include "emulated_cuda.h"
#include "machine.h"

namespace rtpurbo::emulation {

inline Barrier& cta_barrier() { return machine.ctas[current_rank()].barrier; }

}  // namespace rtpurbo::emulation

inline void __syncthreads() { rtpurbo::emulation::meet(rtpurbo::emulation::cta_barrier(), "cta"); }

inline int __syncthreads_count(int predicate) {
    auto& barrier = rtpurbo::emulation::cta_barrier();
    rtpurbo::emulation::meet(barrier, "count", predicate);
    return barrier.last_count;
}

inline void __syncwarp() { rtpurbo::emulation::exchange(0, "syncwarp"); }

template <typename Value>
Value __shfl_xor_sync(uint32_t, Value value, int step) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto& all = rtpurbo::emulation::exchange(value, "shuffle xor");
    return rtpurbo::emulation::read_lane<Value>(all, lane ^ step);
}

template <typename Value>
Value __shfl_sync(uint32_t, Value value, int from) {
    const auto& all = rtpurbo::emulation::exchange(value, "shuffle");
    return rtpurbo::emulation::read_lane<Value>(all, from);
}

template <typename Value>
Value __shfl_up_sync(uint32_t, Value value, int step) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto& all = rtpurbo::emulation::exchange(value, "shuffle up");
    return rtpurbo::emulation::read_lane<Value>(all, lane < step ? lane : lane - step);
}

inline uint32_t __ballot_sync(uint32_t, bool predicate) {
    const auto& all = rtpurbo::emulation::exchange(predicate, "ballot");
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
        bits |= static_cast<uint32_t>(rtpurbo::emulation::read_lane<bool>(all, lane)) << lane;
    }
    return bits;
}

inline int __reduce_add_sync(uint32_t, int value) {
    const auto& all = rtpurbo::emulation::exchange(value, "reduce add");
    int sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += rtpurbo::emulation::read_lane<int>(all, lane);
    return sum;
}

inline bool __any_sync(uint32_t lanes, bool predicate) {
    return __ballot_sync(lanes, predicate) != 0;
}
