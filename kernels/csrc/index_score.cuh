// Scores of index keys: the log mass of each block of one row and head, by all warps of a CTA.
#pragma once

#include "args.h"
#include "cta.cuh"
#include "device.cuh"
#include "index_keys.cuh"
#include "partition.cuh"
#include "selection.cuh"

namespace rtpurbo {

constexpr int kBlocksAtOnce = 4;
constexpr float kLn2 = 0.6931471805599453f;

// Which bias a block that lies `age` before the newest one has: the number of bits of its age.
DEVICE int age_range(int age) { return age <= 0 ? 0 : min(log2_of(age) + 1, kAgeRanges - 1); }

// Log masses of blocks [first, first + count) of one row and head, with the bias of their age.
template <typename Keys>
DEVICE void score(const SelectArgs& args, int64_t row, int64_t head, int first, int count) {
    using Piece = typename Keys::Piece;
    constexpr int kElements = Keys::kElements, kLanes = Keys::kLanes;
    constexpr int kTokens = 32 / kLanes;  // of one load by the warp
    constexpr int kLoadsAtOnce = Keys::kLoadsAtOnce;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int block_tokens = static_cast<int>(args.block_tokens);
    const int loads = ceil_div(block_tokens, kTokens);
    const int end = static_cast<int>(args.context_lens[row]) - first * block_tokens;
    const int newest = divide(end - 1, block_tokens);  // counted from `first`
    const int64_t index_row = args.index_row[head];
    const Piece* cache = static_cast<const Piece*>(args.index_cache);

    // Pages of the blocks that start at `base`, as page * index_rows + index_row. Always a load, so
    // that all are under way together; past the end any will do.
    const auto find_places = [&](int base, uint32_t(&place)[kBlocksAtOnce]) {
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; ++u) {
            const int block = first + min(base + u * kSelectWarps, count - 1);
            const int64_t page = page_of(args.table, row, block);
            place[u] = static_cast<uint32_t>(page * args.index_rows + index_row);
        }
    };
    constexpr bool kLooksAhead = kLoadsAtOnce <= 2;  // else registers do not suffice
    uint32_t next[kBlocksAtOnce];
    if (kLooksAhead) find_places(warp, next);

    float query[kElements];
    load_query(args,
               row * args.query_row_stride + head * args.query_head_stride +
                   lane % kLanes * kElements,
               query);
    const bool is_biased = args.age_bias != nullptr;
    float bias = 0.0f;  // of the range that the lane counts
    if (is_biased) bias = args.age_bias[head * kAgeRanges + lane % kAgeRanges];

    for (int base = warp; base < count; base += kSelectWarps * kBlocksAtOnce) {
        uint32_t place[kBlocksAtOnce];
        float largest[kBlocksAtOnce], sum[kBlocksAtOnce];
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; ++u) {
            if (kLooksAhead) place[u] = next[u];
            largest[u] = -INFINITY;
            sum[u] = 0.0f;
        }
        if (kLooksAhead) {
            find_places(base + kSelectWarps * kBlocksAtOnce, next);
        } else {
            find_places(base, place);
        }
        for (int load = 0; load < loads; load += kLoadsAtOnce) {
            Piece raw[kBlocksAtOnce][kLoadsAtOnce];
            uint16_t scale[kBlocksAtOnce][kLoadsAtOnce];
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
                const int64_t block_at = static_cast<int64_t>(place[u]) * block_tokens;
                const Piece* keys = cache + block_at * kLanes;
                const uint16_t* scales = args.index_scales + block_at;
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    // Never past the page; what lies past the context is not looked at below.
                    const int piece = min((load + i) * 32 + lane, block_tokens * kLanes - 1);
                    raw[u][i] = load_streaming(keys + piece);
                    if (Keys::kScaled) scale[u][i] = load_streaming(scales + piece / kLanes);
                }
            }
            // All loads are issued before the first is used: left alone, the compiler waits for some
            // of them halfway, to save registers. Products begin with the first word of a piece.
            uint32_t loaded = 0;
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    loaded ^= raw[u][i].x;
                    if (Keys::kScaled) loaded ^= scale[u][i];
                }
            }
            const uint32_t zero = zero_after(loaded);
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) raw[u][i].x ^= zero;
            }
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
                float scores[kLoadsAtOnce];
                float most = largest[u];
                const int index = base + u * kSelectWarps;
                const int valid = index < count ? min(end - index * block_tokens, block_tokens) : 0;
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    float key[kElements];
                    Keys::unpack(raw[u][i], key);
                    float dot = 0.0f;
#pragma unroll
                    for (int e = 0; e < kElements; ++e) dot = fmaf(key[e], query[e], dot);
#pragma unroll
                    for (int step = 1; step < kLanes; step *= 2) {
                        dot += __shfl_xor_sync(kAllLanes, dot, step);
                    }
                    if (Keys::kScaled) {
                        dot *= bits_to_float(static_cast<uint32_t>(scale[u][i]) << 16);
                    }
                    const int token = (load + i) * kTokens + lane / kLanes;
                    scores[i] = token < valid ? dot : -INFINITY;
                    most = fmaxf(most, scores[i]);
                }
                const float reference = most == -INFINITY ? 0.0f : most;
                float total = sum[u] * exp2_fast(largest[u] - reference);
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) total += exp2_fast(scores[i] - reference);
                largest[u] = most;
                sum[u] = total;
            }
        }
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; ++u) {
            const float most = warp_max(largest[u]);
            const float reference = most == -INFINITY ? 0.0f : most;
            // The lanes of a key hold the same score, so each was counted kLanes times.
            const float total =
                warp_sum(sum[u] * exp2_fast(largest[u] - reference)) * (1.0f / kLanes);
            const int index = base + u * kSelectWarps;
            float log_mass = (reference + log2f(total)) * kLn2;
            if (is_biased) log_mass += __shfl_sync(kAllLanes, bias, age_range(newest - index));
            if (lane == 0 && index < count) {
                args.log_mass[(row * args.heads + head) * args.width + first + index] = log_mass;
            }
        }
    }
}

}  // namespace rtpurbo
