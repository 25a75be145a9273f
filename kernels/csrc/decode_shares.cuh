// Attention of many items: cut into pieces for all CTAs, and these shared out, a CTA for itself.
#pragma once

#include "args.h"
#include "cta.cuh"
#include "decode_item.cuh"
#include "decode_layout.cuh"
#include "decode_merge.cuh"
#include "decode_strips.cuh"
#include "device.cuh"
#include "partition.cuh"

namespace rtpurbo {

// Cuts items of blocks[i] blocks for `workers` CTAs: item i has pieces [starts[i], starts[i + 1]) of
// all. By one warp. Short lists are for the first `alone` of them.
DEVICE void cut_items(const uint16_t* blocks, int* starts, int items, int workers, int alone,
                      int least) {
    const int lane = threadIdx.x % 32, each = ceil_div(items, 32);
    const int begin = min(lane * each, items), end = min(begin + each, items);
    int total = 0, filled = 0, pieces = 0;
#pragma unroll 1
    for (int item = begin; item < end; ++item) {
        total += blocks[item];
        filled += blocks[item] != 0;
    }
    total = warp_sum(total);
    filled = warp_sum(filled);
    if (total < alone * kListedAlone) workers = alone;
    const int longest = piece_blocks(total, filled, workers, least);
#pragma unroll 1
    for (int item = begin; item < end; ++item) pieces += ceil_div(blocks[item], longest);
    int before = warp_running_sum(pieces) - pieces;
#pragma unroll 1
    for (int item = begin; item < end; ++item) {
        starts[item] = before;
        before += ceil_div(blocks[item], longest);
    }
    if (lane == 31) starts[items] = before;
}

// All items that have a list, or all that have none, by `workers` CTAs; this is number `place`.
template <typename Strip, int kDim>
DEVICE void attend_items(const DecodeArgs& args, bool listed, int place, int workers,
                         unsigned char* shared) {
    using Layout = DecodeLayout<Strip, kDim>;
    int* starts = reinterpret_cast<int*>(shared + Layout::kStarts);
    uint16_t* blocks = reinterpret_cast<uint16_t*>(shared + Layout::kBlocks);
    int* flag = reinterpret_cast<int*>(shared + Layout::kFlag);
    const int warps = blockDim.x / 32;
    const Turns turns{static_cast<int>(threadIdx.x) / 32, warps};
    const int items = static_cast<int>(args.rows * args.group_count);
#pragma unroll 1
    for (int index = threadIdx.x; index < items; index += blockDim.x) {
        const Item item(args, index);
        const bool mine = (item.list != nullptr) == listed;
        blocks[index] = static_cast<uint16_t>(!mine ? 0 : listed ? 1 : item.count());
    }
    if (listed) {
        wait_for_previous_kernel();  // now the lists are there
#pragma unroll 1
        for (int index = threadIdx.x; index < items; index += blockDim.x) {
            if (blocks[index] == 0) continue;
            blocks[index] = static_cast<uint16_t>(__ldcg(args.list_counts + index));
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        cut_items(blocks, starts, items, workers, listed ? static_cast<int>(args.held_back) : 0,
                  static_cast<int>(listed ? args.least_listed : args.least_blocks));
    }
    // Items with nothing to read give zeros.
#pragma unroll 1
    for (int index = place; index < items; index += workers) {
        if (blocks[index] != 0) continue;
        const Item item(args, index);
        if ((item.list != nullptr) == listed) clear<Strip, kDim>(args, item);
    }
    __syncthreads();
    const int pieces = starts[items];
    const int ctas = min(pieces, workers);
    if (place < ctas) {
        const Shares shares(pieces, ctas);
        int piece = shares.start(place);
        const int end = shares.start(place + 1);
        while (piece < end) {
            const int index = item_of(starts, items, piece);
            const Item item(args, index);
            const int start = starts[index], stop = starts[index + 1], until = min(end, stop);
            const Strips strips(args, piece_start(piece - start, stop - start, blocks[index]),
                                piece_start(until - start, stop - start, blocks[index]));
            const Source source(args, item);
            const LookedUp looked_up =
                look_up(args, item, source, strips.begin, strips.end,
                        turns.first + static_cast<int>(threadIdx.x) % 32 * turns.step);
            attend<Strip, kDim>(args, item, source, strips, turns, looked_up, shared, [] {});
            __syncthreads();
            const bool complete = piece == start && until == stop;
            merge_warps<Strip, kDim>(args, item, complete, part_of(place, listed, piece == start),
                                     shared);
            if (!complete) {
                const int first = shares.owner(start), last = shares.owner(stop - 1);
                if (arrive(args.item_done + index, 1, static_cast<uint32_t>(last - first + 1),
                           flag)) {
                    merge_parts<Strip, kDim>(args, item, first, last, shared);
                }
            }
            __syncthreads();  // the rings are free for the next item
            piece = until;
        }
    }
    __syncthreads();
}

}  // namespace rtpurbo
