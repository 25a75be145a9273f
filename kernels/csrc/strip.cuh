// Attention of up to 16 query heads to a strip: 16 tokens of one page, held by one warp.
//
// A warp works alone: it copies strips of keys and values into its own ring in shared memory and
// keeps the running maximum, sum and weighted values of its strips. bfloat16 takes the tensor cores
// (m16n8k16: 16 heads x 8 tokens or dimensions x 16), float32 plain multiply-adds.
//
// Rows of a strip are cut into 16-byte chunks; chunk c of row r lies at c ^ (r % 8), so that the
// eight rows that a matrix load or eight lanes touch at once are in different banks.
#pragma once

#include "args.h"
#include "cta.cuh"
#include "device.cuh"

namespace rtpurbo {

constexpr int kStripTokens = 16;

// Which slots see which tokens of a strip.
struct Sight {
    int first;          // position of the strip's first token
    uint32_t selected;  // bit per slot: sees all tokens below `context`
    uint32_t local;     // bit per slot: sees those in the window and the sinks
    int context;
    int window;
    int sinks;

    DEVICE bool sees(int slot, int token) const {
        const int position = first + token;
        const bool near = context - 1 - position < window || position < sinks;
        return position < context && ((selected >> slot & 1) || ((local >> slot & 1) && near));
    }
};

// Maximum (in units of log2) and sum of a head's weights.
struct Stats {
    float most;
    float sum;
};

// Weights are relative to the largest score; where nothing was seen yet, to 0.
DEVICE float reference_of(float most) { return most == -INFINITY ? 0.0f : most; }

template <int kDim>
struct Bfloat16Strip {
    using Element = uint16_t;
    static constexpr int kChunks = kDim / 8;  // of a row
    static constexpr int kScratchFloats = 0;

    uint32_t query[kDim / 16][4];
    float acc[kDim / 8][4];  // rows l / 4 and l / 4 + 8, columns 8 i + 2 (l % 4) and up
    Stats stats[2];          // of these two rows; `sum` is this lane's part of it

    // `queries` is the row's [H, D].
    DEVICE void begin(const Element* queries, int64_t head_stride, const Group& group, float*) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int slot = lane / 4 + (i % 2) * 8;
                const int dim = k * 16 + (lane % 4) * 2 + (i / 2) * 8;
                query[k][i] = slot < group.heads
                                  ? *reinterpret_cast<const uint32_t*>(
                                        queries + group.head[slot] * head_stride + dim)
                                  : 0;
            }
        }
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
        }
        stats[0] = stats[1] = {-INFINITY, 0.0f};
    }

    DEVICE static const unsigned char* chunk_at(const unsigned char* strip, int row, int chunk) {
        return strip + (row * kChunks + (chunk ^ (row % 8))) * 16;
    }

    // `scale` turns q·k into log2 of a weight.
    DEVICE void step(const unsigned char* keys, const unsigned char* values, const Sight& sight,
                     float scale, float*) {
        const int lane = threadIdx.x % 32;
        const int matrix = lane / 8, row = lane % 8;
        float scores[2][4] = {};  // tokens 8 n + 2 (l % 4) and up
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
            uint32_t b[4];  // tokens 0-7 and 8-15, each dimensions 0-7 and 8-15 of the 16
            load_matrices(b, chunk_at(keys, matrix / 2 * 8 + row, 2 * k + matrix % 2));
            multiply_add_16x8x16(scores[0], query[k], b[0], b[1]);
            multiply_add_16x8x16(scores[1], query[k], b[2], b[3]);
        }
        uint32_t weights[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int slot = lane / 4 + half * 8;
            float most = stats[half].most;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[n][half * 2 + i];
                    const bool seen = sight.sees(slot, n * 8 + (lane % 4) * 2 + i);
                    score = seen ? score * scale : -INFINITY;
                    most = fmaxf(most, score);
                }
            }
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
            const float reference = reference_of(most);
            const float factor = exp2_fast(stats[half].most - reference);
            stats[half].most = most;
            stats[half].sum *= factor;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float low = exp2_fast(scores[n][half * 2] - reference);
                const float high = exp2_fast(scores[n][half * 2 + 1] - reference);
                stats[half].sum += low + high;
                weights[n * 2 + half] = pack_bfloat16(low, high);
            }
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n) {
                acc[n][half * 2] *= factor;
                acc[n][half * 2 + 1] *= factor;
            }
        }
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
            uint32_t b[4];  // dimensions 0-7 and 8-15 of the 16, each tokens 0-7 and 8-15
            load_matrices_transposed(b, chunk_at(values, matrix % 2 * 8 + row, 2 * n + matrix / 2));
            multiply_add_16x8x16(acc[2 * n], weights, b[0], b[1]);
            multiply_add_16x8x16(acc[2 * n + 1], weights, b[2], b[3]);
        }
    }

    // Leaves the weighted values [16, D] and the statistics [16] in shared memory.
    DEVICE void end(float* out, Stats* out_stats) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = stats[half].sum;
            sum += __shfl_xor_sync(kAllLanes, sum, 1);
            sum += __shfl_xor_sync(kAllLanes, sum, 2);
            const int slot = lane / 4 + half * 8;
            if (lane % 4 == 0) out_stats[slot] = {stats[half].most, sum};
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n) {
                float* place = out + slot * kDim + n * 8 + (lane % 4) * 2;
                *reinterpret_cast<float2*>(place) =
                    make_float2(acc[n][half * 2], acc[n][half * 2 + 1]);
            }
        }
    }
};

template <int kDim>
struct Float32Strip {
    using Element = float;
    static constexpr int kChunks = kDim / 4;
    static constexpr int kScratchFloats = kTileHeads * (kStripTokens + 1);
    static constexpr int kOwn = kDim / 32;  // dimensions of a lane

    const float* query;
    int64_t head_stride;
    const Group* group;
    float* weights;  // [16 slots][16 tokens], then [16 slots]: the factor on what was summed before
    float acc[kTileHeads][kOwn];
    Stats stats;  // of slot l / 2, the same in both lanes but `sum`, which is this lane's part

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

    DEVICE static const float4& chunk_at(const unsigned char* strip, int row, int chunk) {
        return *reinterpret_cast<const float4*>(strip + (row * kChunks + (chunk ^ (row % 8))) * 16);
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
                    const float4 key = chunk_at(keys, token, chunk);
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
            const float* value = &chunk_at(values, row, first / 4).x + first % 4;
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
