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

// Of the tokens of a block that a lane has seen: the largest score, in powers of two, and the sum of
// all relative to it.
struct TokenSum {
    float largest = -INFINITY;
    float sum = 0.0f;
};

// Adds what a warp has loaded of a block, from token `first` on; those from `valid` on do not count.
template <typename Keys>
DEVICE void add_tokens(const typename Keys::Piece (&raw)[Keys::kLoadsAtOnce],
                       const uint16_t (&scale)[Keys::kLoadsAtOnce],
                       const float (&query)[Keys::kElements], int first, int valid, TokenSum& sum) {
    constexpr int kLanes = Keys::kLanes, kLoadsAtOnce = Keys::kLoadsAtOnce;
    const int lane = threadIdx.x % 32;
    float scores[kLoadsAtOnce];
    float most = sum.largest;
#pragma unroll
    for (int i = 0; i < kLoadsAtOnce; ++i) {
        float key[Keys::kElements];
        Keys::unpack(raw[i], key);
        float dot = 0.0f;
#pragma unroll
        for (int e = 0; e < Keys::kElements; ++e) dot = fmaf(key[e], query[e], dot);
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
        if (Keys::kScaled) dot = multiply(dot, bits_to_float(static_cast<uint32_t>(scale[i]) << 16));
        const int token = first + i * (32 / kLanes) + lane / kLanes;
        scores[i] = token < valid ? dot : -INFINITY;
        most = fmaxf(most, scores[i]);
    }
    const float reference = most == -INFINITY ? 0.0f : most;
    float total = multiply(sum.sum, exp2_fast(sum.largest - reference));
#pragma unroll
    for (int i = 0; i < kLoadsAtOnce; ++i) total += exp2_fast(scores[i] - reference);
    sum = {most, total};
}

// The log mass of a block from the sum over all lanes, of which kLanes hold the score of each key.
template <typename Keys>
DEVICE float log_mass_of(float reference, float total) {
    return multiply(reference + log2f(total * (1.0f / Keys::kLanes)), kLn2);
}

// The log mass of a block, in all lanes, from what each has seen of it.
template <typename Keys>
DEVICE float log_mass_of(const TokenSum& sum) {
    const float most = warp_max(sum.largest);
    const float reference = most == -INFINITY ? 0.0f : most;
    const float total = warp_sum(multiply(sum.sum, exp2_fast(sum.largest - reference)));
    return log_mass_of<Keys>(reference, total);
}

// The same of two blocks with half the work: of the first in lanes 0 to 15, of the second in the others.
// Every sum is one that the butterfly of a single block has too, so the bits are the same.
template <typename Keys>
DEVICE float log_mass_of_two(const TokenSum& first, const TokenSum& second) {
    const bool is_upper = threadIdx.x % 32 >= 16;
    const TokenSum own = is_upper ? second : first, other = is_upper ? first : second;
    float most = fmaxf(own.largest, __shfl_xor_sync(kAllLanes, other.largest, 16));
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
    }
    const float reference = most == -INFINITY ? 0.0f : most;
    const float others = __shfl_xor_sync(kAllLanes, reference, 16);
    const float given = multiply(other.sum, exp2_fast(other.largest - others));
    float total = multiply(own.sum, exp2_fast(own.largest - reference));
    total += __shfl_xor_sync(kAllLanes, given, 16);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    return log_mass_of<Keys>(reference, total);
}

// Which bias a block that lies `age` before the newest one has: the number of bits of its age.
DEVICE int age_range(int age) { return age <= 0 ? 0 : min(log2_of(age) + 1, kAgeRanges - 1); }

// The bias of a head by age, a range for each lane.
struct AgeBias {
    const SelectArgs& args;
    float own = 0.0f;

    DEVICE AgeBias(const SelectArgs& args, int64_t head) : args(args) {
        if (args.age_bias == nullptr) return;
        own = args.age_bias[head * kAgeRanges + threadIdx.x % kAgeRanges];
    }

    // The log mass of a block of that age, with its bias; all lanes call it.
    DEVICE float add_to(float log_mass, int age) const {
        if (args.age_bias == nullptr) return log_mass;
        return log_mass + __shfl_sync(kAllLanes, own, age_range(age));
    }
};

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
    const AgeBias bias(args, head);

    for (int base = warp; base < count; base += kSelectWarps * kBlocksAtOnce) {
        uint32_t place[kBlocksAtOnce];
        TokenSum sums[kBlocksAtOnce];
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; ++u) {
            if (kLooksAhead) place[u] = next[u];
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
                const int index = base + u * kSelectWarps;
                const int valid = index < count ? min(end - index * block_tokens, block_tokens) : 0;
                add_tokens<Keys>(raw[u], scale[u], query, load * kTokens, valid, sums[u]);
            }
        }
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; ++u) {
            const int index = base + u * kSelectWarps;
            const int newest = divide(end - 1, block_tokens);  // not kept, to save a register
            const float mass = bias.add_to(log_mass_of<Keys>(sums[u]), newest - index);
            if (lane == 0 && index < count) {
                args.log_mass[(row * args.heads + head) * args.width + first + index] = mass;
            }
        }
    }
}

}  // namespace rtpurbo
