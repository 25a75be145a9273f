// Shared memory of a decoding CTA, and what lies in it.
#pragma once

#include "args.h"
#include "clusters.cuh"
#include "strip.cuh"

namespace rtpurbo {

constexpr int kMaxWarps = 4;
constexpr int kMergedRows = 32;  // of partial results that a warp has on their way

constexpr int kListedAlone = 8;  // blocks, for each CTA that takes items with lists only

// Columns of a head that one CTA of a cluster adds up: 32 bytes of bfloat16.
constexpr int kChunkColumns = 16;

// A strip on its way, as its reader needs it.
struct InFlight {
    int32_t first;      // position of its first token, -1: nobody sees it and nothing was copied
    uint32_t selected;  // slots that selected its block
};

// Shared memory of a CTA.
template <typename Strip, int kDim>
struct DecodeLayout {
    static constexpr int kStages = 256 / kDim;  // strips in a warp's ring
    static constexpr int kHalfBytes = kStripTokens * kDim * sizeof(typename Strip::Element);
    static constexpr int kRingBytes = kStages * 2 * kHalfBytes;  // of a warp

    static constexpr int kStarts = 0;                    // int [items + 1], in pieces
    static constexpr int kBlocks = (kMaxItems + 1) * 4;  // uint16_t [items]
    static constexpr int kSharesEnd = kBlocks + kMaxItems * 2;
    // In a cluster, in their place: what its CTAs have of this one's columns.
    static constexpr int kGiven = 0;  // float4 [ranks, places]
    static constexpr int kGivenStats =
        (Strip::kTiles * 8 * kDim / kChunkColumns + kMaxRanks - 1) * kChunkColumns * 4;
    static constexpr int kGivenEnd = kGivenStats + kMaxRanks * Strip::kTiles * 8 * sizeof(Stats);
    static constexpr int kArrived =  // uint64_t barrier, for what this CTA is given
        ((kSharesEnd > kGivenEnd ? kSharesEnd : kGivenEnd) + 7) / 8 * 8;
    static constexpr int kHeads = kArrived + 8;  // int [slots]: query heads of the item
    static constexpr int kFlag = kHeads + kTileHeads * 4;
    static constexpr int kStats = (kFlag + 4 + 127) / 128 * 128;
    static constexpr int kInFlight = kStats + kMaxWarps * kTileHeads * sizeof(Stats);
    static constexpr int kScratch = kInFlight + kMaxWarps * kStages * sizeof(InFlight);
    static constexpr int kRing =
        (kScratch + kMaxWarps * Strip::kScratchFloats * 4 + 127) / 128 * 128;

    static_assert(kRingBytes >= kTileHeads * Strip::kPitch * 4, "a warp's result fits into its ring");
    static_assert(kRingBytes >= kMergedRows * kDim * 4, "and so do the rows that it merges");

    static constexpr int bytes(int warps) { return kRing + warps * kRingBytes; }
};

}  // namespace rtpurbo
