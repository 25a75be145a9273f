// Attention of few items: cut into pieces, each of them for a cluster of CTAs.
//
// With few rows the chain of loads that wait for each other takes longer than their bytes, so it is kept
// short. Every warp holds all items, in its lanes, and finds its piece without a barrier. The warps of a
// cluster take the strips of a piece in turn, so that many bytes are on their way at once, and their
// results meet in shared memory (decode_gather.cuh).
#pragma once

#include "args.h"
#include "clusters.cuh"
#include "cta.cuh"
#include "decode_gather.cuh"
#include "decode_item.cuh"
#include "decode_merge.cuh"
#include "decode_strips.cuh"
#include "device.cuh"
#include "partition.cuh"

namespace rtpurbo {

constexpr int kLaneItems = kFewItems / 32;

// A piece: number `piece`, one of [first, first + pieces) of an item of `blocks` blocks.
struct Piece {
    int item, first, pieces, blocks;
};

// The items of a launch, number 32 i + l in lane l. Few launches have more than 32, so the rest is
// left out where it is not there.
struct LaneItems {
    int count;
    ItemWords words[kLaneItems];
    bool marked[kLaneItems];  // those of this phase

    DEVICE LaneItems(const DecodeArgs& args, bool listed)
        : count(static_cast<int>(args.rows * args.group_count)) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kLaneItems; ++i) {
            if (has(i)) words[i] = ItemWords::load(args, min(i * 32 + lane, count - 1));
        }
#pragma unroll
        for (int i = 0; i < kLaneItems; ++i) {
            marked[i] = has(i) && i * 32 + lane < count && words[i].is_listed(args) == listed;
        }
    }

    DEVICE bool has(int i) const { return i == 0 || i * 32 < count; }

    // The `place`th that is marked, or -1: there are fewer.
    DEVICE int marked_at(int place) const {
        const int lane = threadIdx.x % 32;
        int found = -1;
#pragma unroll
        for (int i = 0; i < kLaneItems; ++i) {
            if (!has(i)) continue;
            const uint32_t lanes = __ballot_sync(kAllLanes, marked[i]);
            const int before = __popc(lanes & ((1u << lane) - 1));
            const uint32_t holder = __ballot_sync(kAllLanes, marked[i] && before == place);
            if (holder != 0) found = i * 32 + __ffs(static_cast<int>(holder)) - 1;
            place -= __popc(lanes);
        }
        return found;
    }

    DEVICE ItemWords words_of(int item) const {
        ItemWords own = words[0];
#pragma unroll
        for (int i = 1; i < kLaneItems; ++i) own = ItemWords::either(item / 32 == i, words[i], own);
        return own.of_lane(item % 32);
    }
};

// Pieces of the items that are marked, for `workers`; short lists are for the first `alone` of these.
struct LaneCut {
    int blocks[kLaneItems];
    int starts[kLaneItems];  // first piece of each
    int pieces[kLaneItems];
    int total = 0;           // pieces of all

    DEVICE void cut(const LaneItems& items, int workers, int alone, int least) {
        int sum = 0, filled = 0;
#pragma unroll
        for (int i = 0; i < kLaneItems; ++i) {
            sum += blocks[i];
            filled += blocks[i] != 0;
        }
        sum = warp_total(sum);
        filled = warp_total(filled);
        if (filled <= alone && sum < alone * cluster_size() * kListedAlone) workers = alone;
        const int longest = longest_piece(items, workers, least, sum, filled);
#pragma unroll
        for (int i = 0; i < kLaneItems; ++i) {
            starts[i] = pieces[i] = 0;
            if (!items.has(i)) continue;
            pieces[i] = pieces_of(i, longest);
            const int until = warp_running_sum(pieces[i]);
            starts[i] = total + until - pieces[i];
            total += __shfl_sync(kAllLanes, until, 31);
        }
    }

    DEVICE int pieces_of(int i, int longest) const {
        return blocks[i] <= longest ? blocks[i] != 0 : ceil_div(blocks[i], longest);
    }

    // As short as may be: no more pieces than workers, though each item may end with a short one.
    DEVICE int longest_piece(const LaneItems& items, int workers, int least, int sum,
                             int filled) const {
        const int full = max(workers - filled, (workers + 1) / 2);
        if (sum <= least * full) return least;
        const int most = ceil_div(sum, full);
        int longest = max(least, ceil_div(sum, workers));
        for (; longest < most; longest = min(longest + longest / 32 + 1, most)) {
            int count = 0;
#pragma unroll
            for (int i = 0; i < kLaneItems; ++i) {
                if (items.has(i)) count += pieces_of(i, longest);
            }
            if (warp_total(count) <= workers) break;
        }
        return longest;
    }

    DEVICE Piece find(int piece) const {
        Piece found = {-1, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kLaneItems; ++i) {
            if (piece < starts[i] || piece >= starts[i] + pieces[i]) continue;
            found = {i * 32 + static_cast<int>(threadIdx.x) % 32, starts[i], pieces[i], blocks[i]};
        }
        const int lane = __ffs(static_cast<int>(__ballot_sync(kAllLanes, found.item >= 0))) - 1;
        return {__shfl_sync(kAllLanes, found.item, lane), __shfl_sync(kAllLanes, found.first, lane),
                __shfl_sync(kAllLanes, found.pieces, lane),
                __shfl_sync(kAllLanes, found.blocks, lane)};
    }
};

// All items that have a list, or all that have none, by `workers` clusters; this is number `place`, which
// has had `round` pieces before. Returns how many it has had then.
template <typename Strip, int kDim>
DEVICE int attend_few(const DecodeArgs& args, bool listed, int place, int workers, int round,
                      unsigned char* shared) {
    using Layout = DecodeLayout<Strip, kDim>;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    const int rank = cluster_rank(), ranks = cluster_size();
    const Turns turns{warp * ranks + rank, warps * ranks};
    const LaneItems items(args, listed);
    // Where each item is one piece, which is known later, this is the cluster's: its strips are looked up
    // meanwhile, beside the lengths of lists.
    int guess = items.marked_at(place);
    Item item(args, max(guess, 0), items.words_of(max(guess, 0)));
    Source source(args, item);
    LaneCut cut;
    if (listed) wait_for_previous_kernel();  // now the lists are there
#pragma unroll
    for (int i = 0; i < kLaneItems; ++i) {
        cut.blocks[i] = 0;
        if (listed && items.marked[i]) cut.blocks[i] = __ldcg(args.list_counts + i * 32 + lane);
    }
    const auto look = [&](int begin, int end) {
        return look_up(args, item, source, begin, end, turns.first + lane * turns.step);
    };
    LookedUp looked_up = look(0, listed ? static_cast<int>(args.list_width) : item.count());
#pragma unroll
    for (int i = 0; i < kLaneItems; ++i) {
        if (listed || !items.marked[i]) continue;
        cut.blocks[i] = Item(args, i * 32 + lane, items.words[i]).count();
    }
    cut.cut(items, workers, listed ? static_cast<int>(args.held_back) : 0,
            static_cast<int>(listed ? args.least_listed : args.least_blocks));
    for (int piece = place; piece < cut.total; piece += workers) {
        if (round > 0) __syncthreads();  // rings and heads of the piece before have been read
        const Piece own = cut.find(piece);
        int begin = 0, end = own.blocks;
        if (own.pieces > 1) {
            begin = piece_start(piece - own.first, own.pieces, own.blocks);
            end = piece_start(piece - own.first + 1, own.pieces, own.blocks);
        }
        if (own.item != guess || begin != 0) {
            guess = -1;
            item = Item(args, own.item);
            source = Source(args, item);
            looked_up = look(begin, end);
        }
        const Strips strips(args, begin, end);
        attend<Strip, kDim>(args, item, source, strips, turns, looked_up, shared, [&] {
            if (threadIdx.x < kTileHeads) {
                reinterpret_cast<int*>(shared + Layout::kHeads)[threadIdx.x] =
                    item.group->head[threadIdx.x];
            }
            if (round == 0) cluster_wait();  // all have started
        });
        merge_cluster<Strip, kDim>(args, item, piece, own.first, own.pieces, round, shared);
        ++round;
    }
    // Items with nothing to read give zeros.
#pragma unroll
    for (int i = 0; i < kLaneItems; ++i) {
        uint32_t empty = __ballot_sync(kAllLanes, items.marked[i] && cut.blocks[i] == 0);
        for (; empty != 0 && place == 0 && rank == 0; empty &= empty - 1) {
            const int holder = __ffs(static_cast<int>(empty)) - 1;
            clear<Strip, kDim>(args, Item(args, i * 32 + holder));
        }
    }
    return round;
}

}  // namespace rtpurbo
