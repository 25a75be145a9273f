// Elements of bfloat16 and float32 tensors in ones, in pairs and in pieces of 16 bytes.
#pragma once

#include "args.h"
#include "device.cuh"

namespace rtpurbo {

DEVICE float low_bfloat16(uint32_t pair) { return bits_to_float(pair << 16); }
DEVICE float high_bfloat16(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }

struct Bfloat16 {
    uint16_t raw;
    static DEVICE Bfloat16 of(float value) {
        return {static_cast<uint16_t>(pack_bfloat16(value, 0.0f))};
    }
    DEVICE float value() const { return low_bfloat16(raw); }
};

struct Float32 {
    float raw;
    static DEVICE Float32 of(float value) { return {value}; }
    DEVICE float value() const { return raw; }
};

// Two neighbours as they lie in memory.
struct Bfloat16Pair {
    uint32_t raw;
    static DEVICE Bfloat16Pair of(float2 values) {
        return {pack_bfloat16(values.x, values.y)};
    }
    DEVICE float2 floats() const { return make_float2(low_bfloat16(raw), high_bfloat16(raw)); }
};

struct Float32Pair {
    float2 raw;
    static DEVICE Float32Pair of(float2 values) { return {values}; }
    DEVICE float2 floats() const { return raw; }
};

// 16 bytes, so a load or a store of one instruction.
struct Bfloat16Piece {
    static constexpr int kElements = 8;
    uint4 raw;
    static DEVICE Bfloat16Piece of(const float (&values)[kElements]) {
        return {{pack_bfloat16(values[0], values[1]), pack_bfloat16(values[2], values[3]),
                 pack_bfloat16(values[4], values[5]), pack_bfloat16(values[6], values[7])}};
    }
    DEVICE void floats(float (&values)[kElements]) const {
        const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[2 * i] = low_bfloat16(pairs[i]);
            values[2 * i + 1] = high_bfloat16(pairs[i]);
        }
    }
};

struct Float32Piece {
    static constexpr int kElements = 4;
    float4 raw;
    static DEVICE Float32Piece of(const float (&values)[kElements]) {
        return {make_float4(values[0], values[1], values[2], values[3])};
    }
    DEVICE void floats(float (&values)[kElements]) const {
        values[0] = raw.x;
        values[1] = raw.y;
        values[2] = raw.z;
        values[3] = raw.w;
    }
};

// Elements of a piece of this data type.
inline int64_t piece_elements(int64_t data_type) {
    return data_type == kBfloat16 ? Bfloat16Piece::kElements : Float32Piece::kElements;
}

}  // namespace rtpurbo
