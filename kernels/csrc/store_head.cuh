// A head of one token as a team of D / 4 lanes holds it: lane l has elements 2l, 2l + 1 and their partners
// of the rotation, D / 2 further on. Loads, stores, the norm and RoPE.
#pragma once

#include "cta.cuh"
#include "device.cuh"
#include "elements.cuh"
#include "layer_args.h"

namespace rtpurbo {

// What a lane holds of a head.
template <typename Pair>
struct Share {
    Pair first, second;
};

template <typename Pair, int kDim>
DEVICE Share<Pair> load_share(const void* from, int64_t vector, int lane) {
    const Pair* pairs = static_cast<const Pair*>(from) + vector * (kDim / 2);
    return {pairs[lane], pairs[kDim / 4 + lane]};
}

template <typename Pair, int kDim>
DEVICE void store_share(void* to, int64_t vector, int lane, const Share<Pair>& share) {
    Pair* pairs = static_cast<Pair*>(to) + vector * (kDim / 2);
    pairs[lane] = share.first;
    pairs[kDim / 4 + lane] = share.second;
}

template <int kLanes>
DEVICE float team_sum(float value) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, step);
    }
    return value;
}

// Over the root mean square, rounded to the data type before the weight as in engine/model/layers.py.
template <typename Pair, int kDim>
DEVICE Share<Pair> normalised(const Share<Pair>& share, const Share<Pair>& weight, float eps) {
    const float2 a = share.first.floats(), b = share.second.floats();
    const float squares = team_sum<kDim / 4>(a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y);
    const float scale = 1.0f / sqrtf(squares / kDim + eps);
    const float2 first = Pair::of(make_float2(a.x * scale, a.y * scale)).floats();
    const float2 second = Pair::of(make_float2(b.x * scale, b.y * scale)).floats();
    const float2 u = weight.first.floats(), v = weight.second.floats();
    return {Pair::of(make_float2(first.x * u.x, first.y * u.y)),
            Pair::of(make_float2(second.x * v.x, second.y * v.y))};
}

template <typename Pair, int kDim>
DEVICE Share<Pair> rotated(const StoreArgs& args, int64_t token, int lane,
                           const Share<Pair>& share) {
    const int64_t at = token * (kDim / 4) + lane;
    const float2 cosine = reinterpret_cast<const float2*>(args.cosines)[at];
    const float2 sine = reinterpret_cast<const float2*>(args.sines)[at];
    const float2 a = share.first.floats(), b = share.second.floats();
    return {Pair::of(make_float2(a.x * cosine.x - b.x * sine.x, a.y * cosine.y - b.y * sine.y)),
            Pair::of(make_float2(b.x * cosine.x + a.x * sine.x, b.y * cosine.y + a.y * sine.y))};
}

}  // namespace rtpurbo
