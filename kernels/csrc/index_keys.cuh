// Types of index keys: how each lies in the cache and is shared out over the lanes of a warp, and how the
// kernel for it is found.
#pragma once

#include "args.h"
#include "device.cuh"
#include "index_query.cuh"

namespace rtpurbo {

// kLanes lanes share a key, each with a piece of kElements, and a lane has kLoadsAtOnce pieces of a
// block under way, as many as registers hold. Of these a lane has the scores of kScores keys, and
// kRepeats lanes have the same.
template <int kDim>
struct Bfloat16Keys {
    using Piece = uint4;
    static constexpr int kElements = 8, kLanes = kDim / kElements;
    using Query = Bfloat16Query<kLanes>;
    static constexpr int kLoadsAtOnce = kLanes == 1 ? 2 : 4;
    static constexpr int kScores = kLoadsAtOnce / kLanes, kRepeats = 1;
    static constexpr bool kScaled = false;
    static constexpr bool kMayBeNan = true;  // and then spoil what is multiplied beside them
};

template <int kDim>
struct Float32Keys {
    using Piece = uint4;
    static constexpr int kElements = 4, kLanes = kDim / kElements, kLoadsAtOnce = 2;
    using Query = Float32Query<kLanes>;
    static constexpr int kScores = kLoadsAtOnce, kRepeats = kLanes;
    static constexpr bool kScaled = false;
    static constexpr bool kMayBeNan = false;
};

template <int kDim>
struct Int8Keys {
    using Piece = uint4;
    static constexpr int kElements = 16, kLanes = kDim / kElements, kLoadsAtOnce = 2;
    using Query = Int8Query<kLanes, kElements / 4>;
    static constexpr int kScores = kLoadsAtOnce / kLanes, kRepeats = 1;
    static constexpr bool kScaled = true;
    static constexpr bool kMayBeNan = false;
};

template <>
struct Int8Keys<8> {
    using Piece = uint2;
    static constexpr int kElements = 8, kLanes = 1, kLoadsAtOnce = 2;
    using Query = Int8Query<kLanes, kElements / 4>;
    static constexpr int kScores = kLoadsAtOnce, kRepeats = 1;
    static constexpr bool kScaled = true;
    static constexpr bool kMayBeNan = false;
};

// Of the tokens that a warp loads at once, the one of this lane's piece of a load.
template <typename Keys>
DEVICE int token_of_piece(int load) {
    return load * (32 / Keys::kLanes) + static_cast<int>(threadIdx.x) % 32 / Keys::kLanes;
}

// And that of this lane's score: lanes that share keys have those of different loads.
template <typename Keys>
DEVICE int token_of_score(int score) {
    if (Keys::kRepeats > 1) return token_of_piece<Keys>(score);
    const int place = static_cast<int>(threadIdx.x) % Keys::kLanes;
    return token_of_piece<Keys>(score * Keys::kLanes + place);
}

using SelectKernel = void (*)(SelectArgs);

// kernel_of(Keys()) for the type of keys and index_dim that are asked for, or null.
template <typename KernelOf>
SelectKernel kernel_for_keys(const SelectArgs& args, KernelOf kernel_of) {
    const auto of_dim = [&](auto keys8, auto keys16, auto keys32) -> SelectKernel {
        if (args.index_dim == 8) return kernel_of(keys8);
        if (args.index_dim == 16) return kernel_of(keys16);
        if (args.index_dim == 32) return kernel_of(keys32);
        return nullptr;
    };
    if (args.key_type == kBfloat16) {
        return of_dim(Bfloat16Keys<8>(), Bfloat16Keys<16>(), Bfloat16Keys<32>());
    }
    if (args.key_type == kFloat32) {
        return of_dim(Float32Keys<8>(), Float32Keys<16>(), Float32Keys<32>());
    }
    if (args.key_type == kInt8) return of_dim(Int8Keys<8>(), Int8Keys<16>(), Int8Keys<32>());
    return nullptr;
}

}  // namespace rtpurbo
