// How index keys lie in the cache, and the queries that they are multiplied with, as floats.
#pragma once

#include "args.h"
#include "device.cuh"

namespace rtpurbo {

constexpr float kLog2E = 1.4426950408889634f;

// Elements of a 16-byte piece as floats.
DEVICE void unpack_bfloat16(uint4 raw, float* out) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = bits_to_float(words[i] << 16);
        out[2 * i + 1] = bits_to_float(words[i] & 0xffff0000u);
    }
}

DEVICE void unpack_float32(uint4 raw, float* out) {
    out[0] = bits_to_float(raw.x);
    out[1] = bits_to_float(raw.y);
    out[2] = bits_to_float(raw.z);
    out[3] = bits_to_float(raw.w);
}

DEVICE void unpack_int8(uint32_t word, float* out) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(static_cast<int8_t>(word >> 8 * i));
}

// How index keys lie in the cache: kLanes lanes share one, each with a piece of kElements, and a
// lane has kLoadsAtOnce pieces of a block under way, as many as registers hold.
template <int kDim>
struct Bfloat16Keys {
    using Piece = uint4;
    static constexpr int kElements = 8, kLanes = kDim / kElements;
    static constexpr int kLoadsAtOnce = kLanes == 1 ? 2 : 4;
    static constexpr bool kScaled = false;
    static DEVICE void unpack(Piece raw, float* out) { unpack_bfloat16(raw, out); }
};

template <int kDim>
struct Float32Keys {
    using Piece = uint4;
    static constexpr int kElements = 4, kLanes = kDim / kElements, kLoadsAtOnce = 2;
    static constexpr bool kScaled = false;
    static DEVICE void unpack(Piece raw, float* out) { unpack_float32(raw, out); }
};

template <int kDim>
struct Int8Keys {
    using Piece = uint4;
    static constexpr int kElements = 16, kLanes = kDim / kElements, kLoadsAtOnce = 2;
    static constexpr bool kScaled = true;
    static DEVICE void unpack(Piece raw, float* out) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) unpack_int8(words[i], out + 4 * i);
    }
};

template <>
struct Int8Keys<8> {
    using Piece = uint2;
    static constexpr int kElements = 8, kLanes = 1, kLoadsAtOnce = 2;
    static constexpr bool kScaled = true;
    static DEVICE void unpack(Piece raw, float* out) {
        unpack_int8(raw.x, out);
        unpack_int8(raw.y, out + 4);
    }
};

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

// Elements [at, at + kElements) of the queries, times log2(e).
template <int kElements>
DEVICE void load_query(const SelectArgs& args, int64_t at, float (&query)[kElements]) {
    if (args.data_type == kBfloat16) {
        const char* from = static_cast<const char*>(args.queries) + at * 2;
#pragma unroll
        for (int i = 0; i < kElements / 8; ++i) {
            unpack_bfloat16(reinterpret_cast<const uint4*>(from)[i], query + 8 * i);
        }
    } else {
        const char* from = static_cast<const char*>(args.queries) + at * 4;
#pragma unroll
        for (int i = 0; i < kElements / 4; ++i) {
            unpack_float32(reinterpret_cast<const uint4*>(from)[i], query + 4 * i);
        }
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) query[e] *= kLog2E;
}

}  // namespace rtpurbo
