// Attention to strips of float32 by plain multiply-adds: a lane has the scores of one token, and the values
// of some dimensions.
#pragma once

#include "args.h"
#include "cta.cuh"
#include "device.cuh"
#include "numbers.cuh"
#include "strip.cuh"

namespace rtpurbo {

template <int kDim>
struct Float32Strip {
    using Element = float;
    static constexpr int kTiles = kTileHeads / 8;
    static constexpr int kChunks = kDim / 4;
    static constexpr int kScratchFloats = kTileHeads * (kStripTokens + 1);
    static constexpr int kResidentCtas = 1;  // on a multiprocessor
    static constexpr int kPitch = kDim;      // floats of a result's row
    static constexpr int kOwn = kDim / 32;  // dimensions of a lane

    const float* query;
    int64_t head_stride;
    const Group* group;
    float* weights;  // [16 slots][16 tokens], then [16 slots]: the factor on what was summed before
    float acc[kTileHeads][kOwn];
    Stats stats;  // of slot l / 2, the same in both lanes but `sum`, which is this lane's part

    DEVICE void name_heads(const Group&, int) {}

    DEVICE void begin(const Element* queries, int64_t stride, const Group& tile, float* scratch) {
        query = queries;
        head_stride = stride;
        group = &tile;
        weights = scratch;
#pragma unroll
        for (int slot = 0; slot < kTileHeads; ++slot) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) acc[slot][i] = 0.0f;
        }
        stats = {-INFINITY, 0.0f};
    }

    DEVICE static const float4& floats_at(const unsigned char* strip, int row, int chunk) {
        return *reinterpret_cast<const float4*>(chunk_at<kChunks>(strip, row, chunk));
    }

    DEVICE void step(const unsigned char* keys, const unsigned char* values, const Sight& sight,
                     float scale, float*) {
        const int lane = threadIdx.x % 32;
        const int token = lane % kStripTokens;
        for (int slot = lane / kStripTokens; slot < kTileHeads; slot += 32 / kStripTokens) {
            float score = -INFINITY;
            if (slot < group->heads && sight.sees(slot, token)) {
                const float* q = query + group->head[slot] * head_stride;
                score = 0.0f;
                for (int chunk = 0; chunk < kChunks; ++chunk) {
                    const float4 key = floats_at(keys, token, chunk);
                    score = fmaf(q[chunk * 4], key.x, score);
                    score = fmaf(q[chunk * 4 + 1], key.y, score);
                    score = fmaf(q[chunk * 4 + 2], key.z, score);
                    score = fmaf(q[chunk * 4 + 3], key.w, score);
                }
                score *= scale;
            }
            weights[slot * kStripTokens + token] = score;
        }
        __syncwarp();
        float* own = weights + lane * (kStripTokens / 2);  // slot l / 2, half of its tokens
        float most = stats.most;
        for (int i = 0; i < kStripTokens / 2; ++i) most = fmaxf(most, own[i]);
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        const float reference = reference_of(most);
        const float factor = exp2f(stats.most - reference);
        stats.most = most;
        stats.sum *= factor;
        for (int i = 0; i < kStripTokens / 2; ++i) {
            own[i] = exp2f(own[i] - reference);
            stats.sum += own[i];
        }
        float* factors = weights + kTileHeads * kStripTokens;
        if (lane % 2 == 0) factors[lane / 2] = factor;
        __syncwarp();
#pragma unroll
        for (int slot = 0; slot < kTileHeads; ++slot) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) acc[slot][i] *= factors[slot];
        }
        for (int row = 0; row < kStripTokens; ++row) {
            const int first = lane * kOwn;
            const float* value = &floats_at(values, row, first / 4).x + first % 4;
#pragma unroll
            for (int slot = 0; slot < kTileHeads; ++slot) {
                const float weight = weights[slot * kStripTokens + row];
#pragma unroll
                for (int i = 0; i < kOwn; ++i) acc[slot][i] = fmaf(weight, value[i], acc[slot][i]);
            }
        }
        __syncwarp();
    }

    DEVICE void end(float* out, Stats* out_stats) {
        const int lane = threadIdx.x % 32;
        const float sum = stats.sum + __shfl_xor_sync(kAllLanes, stats.sum, 1);
        if (lane % 2 == 0) out_stats[lane / 2] = {stats.most, sum};
#pragma unroll
        for (int slot = 0; slot < kTileHeads; ++slot) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) out[slot * kDim + lane * kOwn + i] = acc[slot][i];
        }
    }
};

}  // namespace rtpurbo
