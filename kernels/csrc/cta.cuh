// Reductions and prefix sums over a warp or a CTA. All threads of it must call them.
#pragma once

#include "device.cuh"

namespace rtpurbo {

constexpr uint32_t kAllLanes = 0xffffffffu;

DEVICE float warp_max(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
    }
    return value;
}

template <typename Value>
DEVICE Value warp_sum(Value value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
}

DEVICE int warp_total(int value) { return __reduce_add_sync(kAllLanes, value); }

// Sum of the values of this lane and all lower ones.
template <typename Value>
DEVICE Value warp_running_sum(Value value) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const Value lower = __shfl_up_sync(kAllLanes, value, step);
        if (lane >= step) value += lower;
    }
    return value;
}

// Sum of the values of this thread and all lower ones; `total` is the sum of all. `scratch` holds
// one value a warp, and may be used again at once.
template <typename Value>
DEVICE Value cta_running_sum(Value value, Value* scratch, Value& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    value = warp_running_sum(value);
    if (lane == 31) scratch[warp] = value;
    __syncthreads();
    total = 0;
    for (int other = 0; other < warps; ++other) {
        if (other < warp) value += scratch[other];
        total += scratch[other];
    }
    __syncthreads();
    return value;
}

DEVICE float cta_max(float value, float* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    value = warp_max(value);
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    for (int other = 0; other < warps; ++other) value = fmaxf(value, scratch[other]);
    __syncthreads();
    return value;
}

// starts[i] = sum of size_of(j) for j < i, for i up to `count` included.
template <typename Start, typename SizeOf>
DEVICE void fill_starts(Start* starts, int count, SizeOf size_of) {
    for (int item = threadIdx.x; item < count; item += blockDim.x) {
        starts[item + 1] = size_of(item);
    }
    if (threadIdx.x == 0) starts[0] = 0;
    __syncthreads();
    if (threadIdx.x < 32) {
        const int each = (count + 31) / 32, lane = threadIdx.x;
        const int begin = min(lane * each, count), end = min(begin + each, count);
        Start sum = 0;
        for (int item = begin; item < end; ++item) sum += starts[item + 1];
        Start before = warp_running_sum(sum) - sum;
        for (int item = begin; item < end; ++item) {
            before += starts[item + 1];
            starts[item + 1] = before;
        }
    }
    __syncthreads();
}

// Counts this CTA's `amount` in towards `target`; true in the CTA that completes it, which sees
// all that the others wrote before, and leaves the counter at 0 for the next launch.
DEVICE bool arrive(uint32_t* counter, uint32_t amount, uint32_t target, int* scratch) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const bool last = add_in_order(counter, amount) + amount == target;
        if (last) *counter = 0;
        *scratch = last;
    }
    __syncthreads();
    const bool last = *scratch != 0;
    __syncthreads();
    return last;
}

}  // namespace rtpurbo
