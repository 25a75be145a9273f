// From partial results to the output: those of the warps of a CTA, and those of the CTAs that
// shared an item, always in the same order.
#pragma once

#include "args.h"
#include "cta.cuh"
#include "decode_item.cuh"
#include "decode_layout.cuh"
#include "device.cuh"
#include "numbers.cuh"
#include "strip.cuh"

namespace rtpurbo {

DEVICE void store(uint16_t* out, float4 value) {
    *reinterpret_cast<uint2*>(out) =
        make_uint2(pack_bfloat16(value.x, value.y), pack_bfloat16(value.z, value.w));
}

DEVICE void store(float* out, float4 value) { *reinterpret_cast<float4*>(out) = value; }

DEVICE void add_scaled(float4& sum, float weight, float4 value) {
    sum.x = fmaf(weight, value.x, sum.x);
    sum.y = fmaf(weight, value.y, sum.y);
    sum.z = fmaf(weight, value.z, sum.z);
    sum.w = fmaf(weight, value.w, sum.w);
}

template <typename Element>
DEVICE Element* out_of(const DecodeArgs& args, const Item& item, int slot) {
    return static_cast<Element*>(args.out) + item.row * args.out_row_stride +
           item.group->head[slot] * args.out_head_stride;
}

// Weighted values of a slot's four columns, relative to its largest score.
struct Partial {
    float4 total;
    Stats stats;
};

// Of the warps of a CTA.
template <typename Strip, int kDim>
DEVICE Partial sum_of_warps(const unsigned char* shared, int slot, int column) {
    using Layout = DecodeLayout<Strip, kDim>;
    const int warps = blockDim.x / 32;
    const Stats* stats = reinterpret_cast<const Stats*>(shared + Layout::kStats) + slot;
    Partial found = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), {-INFINITY, 0.0f}};
#pragma unroll
    for (int warp = 0; warp < kMaxWarps; ++warp) {
        if (warp < warps) found.stats.most = fmaxf(found.stats.most, stats[warp * kTileHeads].most);
    }
    const float reference = reference_of(found.stats.most);
#pragma unroll
    for (int warp = 0; warp < kMaxWarps; ++warp) {
        if (warp >= warps) continue;
        const Stats own = stats[warp * kTileHeads];
        const float factor = exp2_fast(own.most - reference);
        const float* result =
            reinterpret_cast<const float*>(shared + Layout::kRing + warp * Layout::kRingBytes);
        found.stats.sum = fmaf(factor, own.sum, found.stats.sum);
        add_scaled(found.total, factor,
                   *reinterpret_cast<const float4*>(result + slot * Strip::kPitch + column));
    }
    return found;
}

// Columns of the output of which this is all.
template <typename Element>
DEVICE void store_whole(Element* out, const Partial& whole) {
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    add_scaled(value, whole.stats.sum == 0.0f ? 0.0f : 1.0f / whole.stats.sum, whole.total);
    store(out, value);
}

// Merges the warps' results: into `out` if the item is complete, else into part `part`.
template <typename Strip, int kDim>
DEVICE void merge_warps(const DecodeArgs& args, const Item& item, bool complete, int64_t part,
                        unsigned char* shared) {
#pragma unroll 1
    for (int i = threadIdx.x; i < item.heads * (kDim / 4); i += blockDim.x) {
        const int slot = i / (kDim / 4), column = i % (kDim / 4) * 4;
        const Partial found = sum_of_warps<Strip, kDim>(shared, slot, column);
        if (complete) {
            store_whole(out_of<typename Strip::Element>(args, item, slot) + column, found);
        } else {
            const int64_t at = part * kTileHeads + slot;
            *reinterpret_cast<float4*>(args.partial + at * kDim + column) = found.total;
            if (column == 0) {
                reinterpret_cast<float2*>(args.partial_stats)[at] =
                    make_float2(found.stats.most, found.stats.sum);
            }
        }
    }
}

// Where a CTA leaves its part of an item. A share's first item may have begun in an earlier share,
// its last may go on in a later one: at most one of either kind, of items with and without lists.
HOST_DEVICE constexpr int64_t part_of(int cta, bool listed, bool begins_item) {
    return cta * 4 + listed * 2 + begins_item;
}

// Merges the parts of an item that shares [first, last] hold, in their order: a warp a slot, a row of
// values by 16 bytes a lane. While rows are added up, those that follow are copied in their place, of
// this slot or the warp's next.
template <typename Strip, int kDim>
DEVICE void merge_parts(const DecodeArgs& args, const Item& item, int first, int last,
                        unsigned char* shared) {
    using Layout = DecodeLayout<Strip, kDim>;
    constexpr int kColumns = kDim / 4, kRowsAtOnce = 32 / kColumns, kLoadsAtOnce = 8;
    constexpr int kStep = kLoadsAtOnce * kRowsAtOnce;  // parts
    constexpr int64_t kStride = part_of(1, false, false) * kTileHeads;  // rows from part to part
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int parts = last - first + 1, column = lane % kColumns * 4, own = lane / kColumns;
    float* rows =
        reinterpret_cast<float*>(shared + Layout::kRing + warp * Layout::kRingBytes) + lane * 4;
    // Of part j > 0 at j strides from here; the first part begins the item and lies elsewhere.
    const int64_t begin = part_of(first, item.list != nullptr, false) * kTileHeads;
    const int64_t very_first = part_of(first, item.list != nullptr, true) * kTileHeads;
    // A lane reads only what it copied itself; past the last part these are zeros.
    const auto fetch = [&](int slot, int base, int row) {
        const int part = base + row + own;
        const float* from = args.partial + (begin + part * kStride + slot) * kDim + column;
        const float* begins = args.partial + (very_first + slot) * kDim + column;
#pragma unroll
        for (int i = 0; i < kLoadsAtOnce; ++i) {
            const float* source =
                i == 0 && part == 0 ? begins : from + i * kRowsAtOnce * kStride * kDim;
            copy_async_16(rows + (row + i * kRowsAtOnce) * kDim, source,
                          part + i * kRowsAtOnce < parts ? 16 : 0);
        }
    };
    const auto stats_of = [&](int slot, int part) -> float2 {
        if (part >= parts) return make_float2(-INFINITY, 0.0f);
        const int64_t at = (part == 0 ? very_first : begin + part * kStride) + slot;
        return __ldcg(reinterpret_cast<const float2*>(args.partial_stats) + at);
    };
    int slot = warp, base = 0;
    float2 own_stats = make_float2(-INFINITY, 0.0f);  // of part base + lane
    if (slot < item.heads) {
#pragma unroll 1
        for (int row = 0; row < kMergedRows && row < parts; row += kStep) fetch(slot, 0, row);
        copy_async_commit();
        own_stats = stats_of(slot, lane);
    }
    float reference = 0.0f, inverse = 0.0f;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    while (slot < item.heads) {
        if (base == 0) {
            float most = own_stats.x, sum = own_stats.y;
#pragma unroll 1
            for (int part = lane + 32; part < parts; part += 32) {
                const float2 next = stats_of(slot, part);
                const float larger = fmaxf(most, next.x), common = reference_of(larger);
                sum = sum * exp2_fast(most - common) + next.y * exp2_fast(next.x - common);
                most = larger;
            }
            reference = reference_of(warp_max(most));
            sum = warp_sum(sum * exp2_fast(most - reference));
            inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
            total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        const float weight = exp2_fast(own_stats.x - reference) * inverse;
        const bool ends = base + kMergedRows >= parts;
        const int next_slot = ends ? slot + warps : slot, next_base = ends ? 0 : base + kMergedRows;
        if (next_slot < item.heads) own_stats = stats_of(next_slot, next_base + lane);
        copy_async_wait<0>();
#pragma unroll 1
        for (int row = 0; row < kMergedRows; row += kStep) {
            if (base + row < parts) {
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    const int at = row + i * kRowsAtOnce;
                    add_scaled(total, __shfl_sync(kAllLanes, weight, at + own),
                               *reinterpret_cast<float4*>(rows + at * kDim));
                }
            }
            if (next_slot < item.heads && next_base + row < parts) fetch(next_slot, next_base, row);
        }
        copy_async_commit();
        if (ends) {
            if (kRowsAtOnce == 2) {
                total.x += __shfl_xor_sync(kAllLanes, total.x, 16);
                total.y += __shfl_xor_sync(kAllLanes, total.y, 16);
                total.z += __shfl_xor_sync(kAllLanes, total.z, 16);
                total.w += __shfl_xor_sync(kAllLanes, total.w, 16);
            }
            if (own == 0) store(out_of<typename Strip::Element>(args, item, slot) + column, total);
        }
        slot = next_slot;
        base = next_base;
    }
}

// Zeros for an item that reads nothing.
template <typename Strip, int kDim>
DEVICE void clear(const DecodeArgs& args, const Item& item) {
    for (int i = threadIdx.x; i < item.heads * (kDim / 4); i += blockDim.x) {
        store(out_of<typename Strip::Element>(args, item, i / (kDim / 4)) + i % (kDim / 4) * 4,
              make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
}

}  // namespace rtpurbo
