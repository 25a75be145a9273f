// From a head to the index space: the projection by a team of lanes, and index keys in 8 bits.
#pragma once

#include "cta.cuh"
#include "device.cuh"
#include "elements.cuh"
#include "layer_args.h"
#include "numbers.cuh"
#include "store_head.cuh"

namespace rtpurbo {

constexpr int kOutputsAtOnce = 8;  // of a projection
constexpr float kIndexSteps = 127.0f;  // of an index key in 8 bits, to either side of 0

// Projection [I, D] times the head: lane l gets outputs 2 l and 2 l + 1, those after I / 2 nothing.
// All lanes of the warp take part.
template <typename Pair, int kDim>
DEVICE Pair project(const void* projection, int64_t row, int index_dim, const Share<Pair>& share,
                    int lane) {
    constexpr int kLanes = kDim / 4;
    const float2 a = share.first.floats(), b = share.second.floats();
    Pair mine = {};
    for (int begin = 0; begin < index_dim; begin += kOutputsAtOnce) {
        float sums[kOutputsAtOnce];
#pragma unroll
        for (int i = 0; i < kOutputsAtOnce; ++i) {
            const Share<Pair> weight =
                load_share<Pair, kDim>(projection, row * index_dim + begin + i, lane);
            const float2 u = weight.first.floats(), v = weight.second.floats();
            sums[i] = a.x * u.x + a.y * u.y + b.x * v.x + b.y * v.y;
        }
#pragma unroll
        for (int i = 0; i < kOutputsAtOnce; ++i) sums[i] = team_sum<kLanes>(sums[i]);
#pragma unroll
        for (int i = 0; i < kOutputsAtOnce / 2; ++i) {
            if (lane == begin / 2 + i) mine = Pair::of(make_float2(sums[2 * i], sums[2 * i + 1]));
        }
    }
    return mine;
}

DEVICE int8_t index_step(float value, float scale) {
    const float steps = rintf(value / scale);
    if (!is_finite(steps)) return 0;
    return static_cast<int8_t>(fminf(fmaxf(steps, -kIndexSteps), kIndexSteps));
}

// An index key in 8 bits with its scale (kernels/reference.py, quantise_index_keys). All lanes of
// the warp take part; lanes after I / 2 hold zeros.
template <typename Pair, int kLanes>
DEVICE void store_int8_key(const StoreArgs& args, int64_t at, int lane, bool writes, Pair mine) {
    const float2 key = mine.floats();
    // Of numbers without a sign the larger has the larger bits, and one that is none the largest.
    uint32_t most = max(float_to_bits(fabsf(key.x)), float_to_bits(fabsf(key.y)));
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
        most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    }
    const Bfloat16 scale = Bfloat16::of(bits_to_float(most) / kIndexSteps);
    const int64_t pairs = args.index_dim / 2;
    if (writes && lane < pairs) {
        const uint8_t low = static_cast<uint8_t>(index_step(key.x, scale.value()));
        const uint8_t high = static_cast<uint8_t>(index_step(key.y, scale.value()));
        static_cast<uint16_t*>(args.index_keys)[at * pairs + lane] =
            static_cast<uint16_t>(low | high << 8);
    }
    if (writes && lane == 0) args.index_scales[at] = scale.raw;
}

}  // namespace rtpurbo
