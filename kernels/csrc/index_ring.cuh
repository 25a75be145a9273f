// Log masses of a head's blocks by a cluster of CTAs: keys are copied to shared memory, always some of
// the next ones on their way, so that a CTA alone keeps enough of the memory busy.
#pragma once

#include "args.h"
#include "cta.cuh"
#include "device.cuh"
#include "index_keys.cuh"
#include "index_score.cuh"
#include "partition.cuh"
#include "selection.cuh"

namespace rtpurbo {

constexpr int kRingBytes = 8192;  // of a warp: with 80 CTAs 5 MB, somewhat more than latency needs
constexpr int kBlocksTogether = 2;  // of a warp, whose chains of arithmetic hide each other
constexpr int kWordBlocks = 32;
constexpr int kWarpBlocks = kWordBlocks / kSelectWarps;  // of a word; those together are of one

// Blocks are dealt to the CTAs of a cluster by words of 32, in turn: where a CTA's blocks lie does not
// depend on the context, so that pages are looked up before its length is there.
struct Dealt {
    int rank;
    int ranks;  // a power of two

    // Words of each CTA, if there are so many blocks; some of the last may lie past the end.
    HOST_DEVICE int words(int blocks) const {
        return (ceil_div(blocks, kWordBlocks) + ranks - 1) >> log2_of(static_cast<uint32_t>(ranks));
    }
    // Block that this CTA has at `place`, 32 of a word.
    HOST_DEVICE int block(int place) const {
        const unsigned at = static_cast<unsigned>(place);
        return (rank + static_cast<int>(at / kWordBlocks) * ranks) * kWordBlocks +
               static_cast<int>(at % kWordBlocks);
    }
};

// A warp's ring in shared memory. A stage holds what of its blocks is computed at once.
template <typename Keys>
struct KeyRing {
    using Piece = typename Keys::Piece;
    static constexpr int kTokens = Keys::kLoadsAtOnce * 32 / Keys::kLanes;  // of a block, at once
    static constexpr int kKeyBytes = Keys::kLoadsAtOnce * 32 * static_cast<int>(sizeof(Piece));
    static constexpr int kScaleBytes = Keys::kScaled ? kTokens * 2 : 0;
    static constexpr int kBlockBytes = kKeyBytes + kScaleBytes;
    static constexpr int kStageBytes = kBlocksTogether * kBlockBytes;
    static constexpr int kStages = kRingBytes / kStageBytes;

    static_assert(kKeyBytes % 256 == 0 && kScaleBytes <= 256, "a lane copies 16 bytes");

    // Copies tokens of a page from number `first` on with 16 lanes, as far as the `valid` that are of the
    // context; zeros in place of the others.
    static DEVICE void copy(const SelectArgs& args, uint32_t page, int first, int valid,
                            unsigned char* to) {
        constexpr int kTokenBytes = Keys::kLanes * static_cast<int>(sizeof(Piece));
        const uint32_t block_tokens = static_cast<uint32_t>(args.block_tokens);
        const uint32_t token = static_cast<uint32_t>(first);
        const int lane = threadIdx.x % 16, left = valid * kTokenBytes - lane * 16;
        const char* cache = static_cast<const char*>(args.index_cache);
        const char* keys = cache + (token * kTokenBytes + static_cast<uint32_t>(lane) * 16) +
                           static_cast<uint64_t>(page) * (block_tokens * kTokenBytes);
        to += lane * 16;
        if (token + kTokens <= block_tokens) {
#pragma unroll
            for (int at = 0; at < kKeyBytes; at += 256) {
                copy_async_16(to + at, keys + at, at < left ? 16 : 0);
            }
        } else {  // the page ends first: nothing behind it is named, though nothing is read there
#pragma unroll 1
            for (int at = 0; at < kKeyBytes; at += 256) {
                copy_async_16(to + at, at < left ? keys + at : cache, at < left ? 16 : 0);
            }
        }
        if (Keys::kScaled && lane * 16 < kScaleBytes && lane * 8 < valid) {
            const char* scales = reinterpret_cast<const char*>(args.index_scales) +
                                 (token * 2 + static_cast<uint32_t>(lane) * 16) +
                                 static_cast<uint64_t>(page) * (block_tokens * 2);
            copy_async_16(to + kKeyBytes, scales, 16);
        }
    }

    // What this lane multiplies, of one block.
    static DEVICE void load(const unsigned char* from, Piece (&raw)[Keys::kLoadsAtOnce],
                            uint16_t (&scale)[Keys::kScores]) {
        const Piece* pieces = reinterpret_cast<const Piece*>(from) + threadIdx.x % 32;
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(from + kKeyBytes);
#pragma unroll
        for (int i = 0; i < Keys::kLoadsAtOnce; ++i) raw[i] = pieces[i * 32];
#pragma unroll
        for (int i = 0; i < Keys::kScores; ++i) {
            scale[i] = Keys::kScaled ? scales[token_of_score<Keys>(i)] : 0;
        }
    }
};

// Scores of one row's head by a warp of a cluster: of every word of its CTA it has four blocks.
template <typename Keys>
struct DealtScores {
    using Ring = KeyRing<Keys>;

    const SelectArgs& args;
    Dealt dealt;
    int64_t row, index_row;
    uint32_t places, next;  // of block number `lane` of 32, and of the next 32; page x index rows
    typename Keys::Query query;
    AgeBias bias;

    // Begins the loads that do not need the context's length.
    DEVICE DealtScores(const SelectArgs& args, Dealt dealt, int64_t row, int64_t head)
        : args(args),
          dealt(dealt),
          row(row),
          index_row(args.index_row[head]),
          places(find(threadIdx.x % 32)),
          next(find(32 + threadIdx.x % 32)),
          query(args, row * args.query_row_stride + head * args.query_head_stride),
          bias(args, head) {}

    // Where the CTA has this warp's block of that number.
    DEVICE int place_of(int index) const {
        const unsigned at = static_cast<unsigned>(index), warp = threadIdx.x / 32;
        return static_cast<int>(at / kWarpBlocks * kWordBlocks + warp * kWarpBlocks +
                                at % kWarpBlocks);
    }

    // The block itself, `dealt.block(place_of(index))`.
    DEVICE int block_of(int index) const {
        const unsigned at = static_cast<unsigned>(index), warp = threadIdx.x / 32;
        const unsigned words = at / kWarpBlocks * static_cast<unsigned>(dealt.ranks) +
                               static_cast<unsigned>(dealt.rank);
        return static_cast<int>(words * kWordBlocks + warp * kWarpBlocks + at % kWarpBlocks);
    }

    // Always a load; past the end any will do.
    DEVICE uint32_t find(int index) const {
        const int block = min(block_of(index), static_cast<int>(args.width) - 1);
        return static_cast<uint32_t>(page_of(args.table, row, block) * args.index_rows + index_row);
    }

    // Calls put(place, block, log mass) for every block, also for some past the end: for two at once,
    // one in each half of the lanes.
    template <typename Put>
    DEVICE void run(int context, int blocks, unsigned char* ring, Put put) {
        constexpr int kStages = Ring::kStages, kLoadsAtOnce = Keys::kLoadsAtOnce;
        const int block_tokens = static_cast<int>(args.block_tokens);
        const int count = kWarpBlocks * dealt.words(blocks);
        int copied = 0, token = 0, stage = 0;  // the next stage to copy
        // Every call closes a group of copies, empty or not, so that waiting can count them.
        const auto copy = [&] {
            if (copied < count) {
                if (token == 0 && copied != 0 && (copied & 31) == 0) {
                    places = next;
                    next = find(copied + 32 + static_cast<int>(threadIdx.x) % 32);
                }
                static_assert(kBlocksTogether == 2, "half of the lanes each");
                const int which = static_cast<int>(threadIdx.x) % 32 / 16;
                const uint32_t page = __shfl_sync(kAllLanes, places, (copied + which) & 31);
                const int left = context - block_of(copied + which) * block_tokens;
                Ring::copy(args, page, token, min(left, block_tokens) - token,
                           ring + stage * Ring::kStageBytes + which * Ring::kBlockBytes);
                token += Ring::kTokens;
                if (token >= block_tokens) {
                    token = 0;
                    copied += kBlocksTogether;
                }
                stage = stage + 1 == kStages ? 0 : stage + 1;
            }
            copy_async_commit();
        };
#pragma unroll 1
        for (int i = 0; i < kStages; ++i) copy();
        int now = 0;  // the stage to compute
#pragma unroll 1
        for (int index = 0; index < count; index += kBlocksTogether) {
            const int place = place_of(index), block = block_of(index);
            TokenSum sums[kBlocksTogether];
#pragma unroll 1
            for (int first = 0; first < block_tokens; first += Ring::kTokens) {
                typename Keys::Piece raw[kBlocksTogether][kLoadsAtOnce];
                uint16_t scale[kBlocksTogether][Keys::kScores];
                copy_async_wait<kStages - 1>();
                __syncwarp();
#pragma unroll
                for (int u = 0; u < kBlocksTogether; ++u) {
                    Ring::load(ring + now * Ring::kStageBytes + u * Ring::kBlockBytes, raw[u],
                               scale[u]);
                }
                now = now + 1 == kStages ? 0 : now + 1;
                __syncwarp();  // all have read
                copy();
#pragma unroll
                for (int u = 0; u < kBlocksTogether; ++u) {
                    const int start = (block + u) * block_tokens;
                    add_tokens<Keys>(raw[u], scale[u], query, first,
                                     min(context - start, block_tokens), sums[u]);
                }
            }
            static_assert(kWarpBlocks % kBlocksTogether == 0, "those together are of one word");
            const int which = threadIdx.x % 32 / 16;
            const float mass = log_mass_of_two<Keys>(sums[0], sums[1]);
            put(place + which, block + which, bias.add_to(mass, blocks - 1 - block - which));
        }
    }
};

}  // namespace rtpurbo
