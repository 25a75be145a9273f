// Scores of index keys: the log mass of each block of one row and head, by all warps of a CTA.
#pragma once

#include "args.h"
#include "cta.cuh"
#include "device.cuh"
#include "elements.cuh"
#include "index_keys.cuh"
#include "numbers.cuh"
#include "partition.cuh"
#include "selection.cuh"

namespace rtpurbo {

constexpr int kBlocksAtOnce = 4;
constexpr float kLn2 = 0.6931471805599453f;

// Of the tokens of a block that a warp has seen: the largest score, in powers of two, and of those that
// this lane has the sum relative to it.
struct TokenSum {
    float largest = -INFINITY;
    float sum = 0.0f;
};

// The largest of a warp's floats, in all lanes.
DEVICE float largest_of_warp(float value) {
    // As integers they have the same order, once what follows the sign of negative ones is turned round.
    const auto turned = [](int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
    const int32_t bits = static_cast<int32_t>(float_to_bits(value));
    return bits_to_float(static_cast<uint32_t>(turned(largest_of_warp(turned(bits)))));
}

// The dot product that this lane keeps, of those that it has with its neighbours.
template <int kLanes>
DEVICE float own_of(const float* dots) {
    const int place = static_cast<int>(threadIdx.x) % kLanes;
    float own = dots[0];
#pragma unroll
    for (int i = 1; i < kLanes; ++i) own = place == i ? dots[i] : own;
    return own;
}

// Adds what a warp has loaded of a block, from token `first` on; those from `valid` on do not count.
template <typename Keys>
DEVICE void add_tokens(const typename Keys::Piece (&raw)[Keys::kLoadsAtOnce],
                       const uint16_t (&scale)[Keys::kScores], const typename Keys::Query& query,
                       int first, int valid, TokenSum& sum) {
    constexpr int kLoadsAtOnce = Keys::kLoadsAtOnce, kScores = Keys::kScores;
    float dots[kLoadsAtOnce];
#pragma unroll
    for (int i = 0; i < kLoadsAtOnce; ++i) dots[i] = query.multiply_with(raw[i]);
    float scores[kScores];
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
        constexpr int kChoices = Keys::kRepeats == 1 ? Keys::kLanes : 1;
        float dot = own_of<kChoices>(dots + i * kChoices);
        if (Keys::kScaled) dot = multiply(dot, low_bfloat16(scale[i]));
        scores[i] = first + token_of_score<Keys>(i) < valid ? dot : -INFINITY;
        most = fmaxf(most, scores[i]);
    }
    most = fmaxf(sum.largest, largest_of_warp(most));
    const float reference = reference_of(most);
    float total = first == 0 ? 0.0f : multiply(sum.sum, exp2_fast(sum.largest - reference));
#pragma unroll
    for (int i = 0; i < kScores; ++i) total += exp2_fast(scores[i] - reference);
    sum = {most, total};
}

// The log masses of two blocks, of the first in lanes 0 to 15, of the second in the others, from what
// each lane has of the sums.
template <typename Keys>
DEVICE float log_mass_of_two(const TokenSum& first, const TokenSum& second) {
    const bool is_upper = threadIdx.x % 32 >= 16;
    float total = is_upper ? second.sum : first.sum;
    total += __shfl_xor_sync(kAllLanes, is_upper ? first.sum : second.sum, 16);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    const float largest = is_upper ? second.largest : first.largest;
    const float reference = reference_of(largest);
    return multiply(reference + log2_fast(total * (1.0f / Keys::kRepeats)), kLn2);
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
DEVICE void score(const SelectArgs& args, uint32_t row, uint32_t head, int first, int count) {
    using Piece = typename Keys::Piece;
    constexpr int kLanes = Keys::kLanes, kLoadsAtOnce = Keys::kLoadsAtOnce;
    constexpr int kTokens = kLoadsAtOnce * 32 / kLanes;  // of a block, at once
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int block_tokens = static_cast<int>(args.block_tokens);
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
    // Tokens of the context in a block, of those that start at `base`.
    const auto valid_of = [&](int base, int u) {
        const int index = base + u * kSelectWarps;
        return min(end - index * block_tokens, index < count ? block_tokens : 0);
    };
    constexpr bool kLooksAhead = kLoadsAtOnce <= 2;  // else registers do not suffice
    uint32_t next[kBlocksAtOnce];
    if (kLooksAhead) find_places(warp, next);

    const typename Keys::Query query(
        args, row * args.query_row_stride + head * args.query_head_stride);
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
        for (int start = 0; start < block_tokens; start += kTokens) {
            Piece raw[kBlocksAtOnce][kLoadsAtOnce];
            uint16_t scale[kBlocksAtOnce][Keys::kScores];
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
                const int64_t block_at = static_cast<int64_t>(place[u]) * block_tokens;
                const Piece* keys = cache + block_at * kLanes;
                const uint16_t* scales = args.index_scales + block_at;
                // Never past the page, nor past the context if that matters: any key will do there.
                const int there = Keys::kMayBeNan ? max(valid_of(base, u), 1) : block_tokens;
                const uint32_t last = static_cast<uint32_t>(there * kLanes - 1);
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    const uint32_t piece = static_cast<uint32_t>(start * kLanes + i * 32 + lane);
                    raw[u][i] = load_streaming(keys + min(piece, last));
                }
#pragma unroll
                for (int i = 0; i < Keys::kScores; ++i) {
                    const int token = start + token_of_score<Keys>(i);
                    scale[u][i] = 0;
                    if (Keys::kScaled) {
                        scale[u][i] = load_streaming(scales + min(token, block_tokens - 1));
                    }
                }
            }
            // All loads are issued before the first is used: left alone, the compiler waits for some
            // of them halfway, to save registers. Products begin with the first word of a piece.
            uint32_t loaded = 0;
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) loaded ^= raw[u][i].x;
                if (Keys::kScaled) {
#pragma unroll
                    for (int i = 0; i < Keys::kScores; ++i) loaded ^= scale[u][i];
                }
            }
            uint32_t zero = zero_after(loaded);
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) raw[u][i].x ^= zero;
                add_tokens<Keys>(raw[u], scale[u], query, start, valid_of(base, u), sums[u]);
                // Products of 8-bit keys wait for those before: for all at once registers do not suffice.
                if (Keys::kScaled) zero = zero_after(float_to_bits(sums[u].sum));
            }
        }
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; u += 2) {
            const int index = base + (u + lane / 16) * kSelectWarps;
            const int newest = divide(end - 1, block_tokens);  // not kept, to save a register
            const float log_mass = log_mass_of_two<Keys>(sums[u], sums[u + 1]);
            const float mass = bias.add_to(log_mass, newest - index);
            if (lane % 16 == 0 && index < count) {
                // Unsigned, or the compiler keeps part of the address while blocks are scored.
                const uint32_t block = static_cast<uint32_t>(first) + static_cast<uint32_t>(index);
                args.log_mass[(row * args.heads + head) * args.width + block] = mass;
            }
        }
    }
}

}  // namespace rtpurbo
