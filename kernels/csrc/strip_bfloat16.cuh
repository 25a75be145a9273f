// Attention to strips of bfloat16 on the tensor cores (m16n8k16: 16 tokens or dimensions x 8 heads x 16).
#pragma once

#include "args.h"
#include "cta.cuh"
#include "device.cuh"
#include "matrices.cuh"
#include "numbers.cuh"
#include "strip.cuh"

namespace rtpurbo {

// Tokens are the rows of a product and heads its 8 columns, kTiles times: with 8 heads or fewer nothing
// is computed for heads that are not there, and half the registers hold it.
template <int kDim, int kTileCount>
struct Bfloat16Strip {
    using Element = uint16_t;
    static constexpr int kTiles = kTileCount;
    static constexpr int kChunks = kDim / 8;  // of a row
    static constexpr int kScratchFloats = 0;
    static constexpr int kResidentCtas = kTiles == 1 ? 4 : 2;  // on a multiprocessor
    static constexpr int kPitch = kDim + 4;  // floats of a result's row: lanes in different banks

    uint32_t slots;  // bit per slot in use
    int head[kTiles];  // of slot l / 4
    int lane;
    uint32_t query[kTiles][kDim / 16][2];  // slot l / 4, dimensions 2 (l % 4) and up, and 8 further
    float acc[kTiles][kDim / 16][4];  // dimensions l / 4 and l / 4 + 8, slots 2 (l % 4) and up
    Stats stats[kTiles][2];           // of these two slots; `sum` is this lane's part of it

    // A slot that is not in use names head 0, and what comes of it goes nowhere.
    DEVICE void name_heads(const Group& group, int own_lane) {
        lane = own_lane;
        slots = (1u << group.heads) - 1;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) head[t] = group.head[t * 8 + lane / 4];
    }

    DEVICE void begin(const Element* queries, int64_t head_stride, const Group&, float*) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const Element* own = queries + head[t] * head_stride;
#pragma unroll
            for (int k = 0; k < kDim / 16; ++k) {
                const Element* pair = own + k * 16 + (lane % 4) * 2;
                query[t][k][0] = *reinterpret_cast<const uint32_t*>(pair);
                query[t][k][1] = *reinterpret_cast<const uint32_t*>(pair + 8);
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[t][k][i] = 0.0f;
            }
            stats[t][0] = stats[t][1] = {-INFINITY, 0.0f};
        }
    }

    DEVICE void step(const unsigned char* keys, const unsigned char* values, const Sight& sight,
                     float scale, float*) {
        const int matrix = lane / 8, row = lane % 8;
        // Two sums each, of even and odd 16 dimensions: a product waits for the one two before it.
        float scores[kTiles][2][4] = {};  // tokens l / 4 and l / 4 + 8, slots 2 (l % 4) and up
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
            uint32_t a[4];  // tokens 0-7 and 8-15 of dimensions 0-7 of the 16, then of 8-15
            load_matrices(a, chunk_at<kChunks>(keys, matrix % 2 * 8 + row, 2 * k + matrix / 2));
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                multiply_add_16x8x16(scores[t][k % 2], a, query[t][k][0], query[t][k][1]);
            }
        }
        const bool clear = sight.is_clear(slots);
        uint32_t weights[kTiles][2];  // slot l / 4, tokens 2 (l % 4) and up, and 8 further
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            float (&score)[4] = scores[t][0];
#pragma unroll
            for (int i = 0; i < 4; ++i) score[i] = (score[i] + scores[t][1][i]) * scale;
            if (!clear) {  // at the window's edges, and where heads selected apart
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int slot = t * 8 + lane % 4 * 2 + i % 2, token = lane / 4 + i / 2 * 8;
                    if (!sight.sees(slot, token)) score[i] = -INFINITY;
                }
            }
            weigh(scores[t][0], stats[t], acc[t]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                weights[t][half] =
                    transpose_matrix(pack_bfloat16(score[half * 2], score[half * 2 + 1]));
            }
        }
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
            uint32_t a[4];  // dimensions 0-7 and 8-15 of the 16 of tokens 0-7, then of 8-15
            load_matrices_transposed(a, chunk_at<kChunks>(values, matrix / 2 * 8 + row, 2 * n + matrix % 2));
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                multiply_add_16x8x16(acc[t][n], a, weights[t][0], weights[t][1]);
            }
        }
    }

    // Turns scores into weights, and what was summed before to the same reference.
    DEVICE static void weigh(float (&score)[4], Stats (&stats)[2], float (&acc)[kDim / 16][4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = fmaxf(score[i], score[i + 2]);
#pragma unroll
            for (int step = 4; step < 32; step *= 2) {
                most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
            }
            most = fmaxf(most, stats[i].most);
            const float reference = reference_of(most);
            const float factor = exp2_fast(stats[i].most - reference);
            score[i] = exp2_fast(score[i] - reference);
            score[i + 2] = exp2_fast(score[i + 2] - reference);
            stats[i] = {most, fmaf(stats[i].sum, factor, score[i] + score[i + 2])};
#pragma unroll
            for (int n = 0; n < kDim / 16; ++n) {
                acc[n][i] *= factor;
                acc[n][i + 2] *= factor;
            }
        }
    }

    DEVICE void end(float* out, Stats* out_stats) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int slot = t * 8 + lane % 4 * 2 + i;
                float sum = stats[t][i].sum;
#pragma unroll
                for (int step = 4; step < 32; step *= 2) {
                    sum += __shfl_xor_sync(kAllLanes, sum, step);
                }
                if (lane < 4) out_stats[slot] = {stats[t][i].most, sum};
#pragma unroll
                for (int n = 0; n < kDim / 16; ++n) {
                    float* place = out + slot * kPitch + n * 16 + lane / 4;
                    place[0] = acc[t][n][i];
                    place[8] = acc[t][n][i + 2];
                }
            }
        }
    }
};

}  // namespace rtpurbo
