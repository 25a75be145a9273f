// The loading warp of a prefilling CTA.
#pragma once

#include "hopper.cuh"
#include "span_args.h"
#include "span_shared.cuh"
#include "span_work.cuh"

namespace rtpurbo {

// What this CTA takes after an item.
template <bool kFixedSteps>
DEVICE uint32_t item_after(const SpanArgs& args, uint32_t item) {
    if constexpr (kFixedSteps) return item + gridDim.x;
    return gridDim.x + atomicAdd(args.taken, 1u);
}

// One lane takes work, leaves it to the others with its queries, and loads its keys and values.
template <int kDim, bool kFixedSteps>
DEVICE void load_everything(const SpanLaunch& launch, SpanShared<kDim>& shared) {
    constexpr int kHalves = SpanShared<kDim>::kHalves;
    const SpanArgs& args = launch.args;
    const auto items = static_cast<uint32_t>(args.tiles * args.group);
    const int nowhere = static_cast<int>(args.pages * args.cache_heads) * kSpanBlock;
    Ring keys, values;
    uint32_t queries_parity = 0;

    auto row_of = [&](const SpanWork& work, int i, int half) {
        const int block = work.block_of(i, half);
        if (!work.sees(args, block)) return nowhere;  // rows past the end arrive as zeros
        const int64_t page = page_at(args, work.span, block);
        return static_cast<int>(page * args.cache_heads + work.kv_row) * kSpanBlock;
    };
    auto load = [&](const CUtensorMap& map, unsigned char (&tile)[kHalves][kSpanKeys * 128],
                    uint64_t* full, int2 rows) {
        hopper::barrier_expect_bytes(full, kSpanKeys * kDim * 2);
        for (int half = 0; half < kHalves; ++half) {
            hopper::load_2d(tile[half], &map, full, half * kHalfColumns, rows.x);
            hopper::load_2d(tile[half] + kSpanBlock * 128, &map, full, half * kHalfColumns, rows.y);
        }
    };
    auto hand_over = [&](const SpanWork& found) {  // once the others are done with what was there
        hopper::barrier_wait(&shared.queries_empty, queries_parity ^ 1);
        queries_parity ^= 1;
        shared.work = found;
    };

    for (uint32_t item = blockIdx.x, next; item < items; item = next) {
        next = item_after<kFixedSteps>(args, item);  // early: a counter takes a while
        SpanWork found;
        if (!found.find(args, item)) continue;
        hand_over(found);
        const SpanWork work = shared.work;
        auto rows_of = [&](int i) { return make_int2(row_of(work, i, 0), row_of(work, i, 1)); };
        hopper::barrier_expect_bytes(&shared.queries_full, kSpanQueries * kDim * 2);
        for (int half = 0; half < kHalves; ++half) {
            hopper::load_3d(shared.queries[half], &launch.queries, &shared.queries_full,
                            half * kHalfColumns, work.head, static_cast<int>(work.row_begin));
        }
        int2 rows = rows_of(0), last_rows = rows;
        for (int i = 0; i <= work.tiles; ++i) {  // values stay a tile behind keys
            if (i < work.tiles) {
                hopper::barrier_wait(&shared.keys_empty[keys.stage], keys.parity ^ 1);
                load(launch.keys, shared.keys[keys.stage], &shared.keys_full[keys.stage], rows);
                keys.advance();
            }
            if (i > 0) {
                hopper::barrier_wait(&shared.values_empty[values.stage], values.parity ^ 1);
                load(launch.values, shared.values[values.stage],
                     &shared.values_full[values.stage], last_rows);
                values.advance();
            }
            last_rows = rows;
            if (i + 1 < work.tiles) rows = rows_of(i + 1);  // looked up while stages are awaited
        }
    }
    SpanWork nothing;
    nothing.tiles = 0;
    hand_over(nothing);
    hopper::barrier_arrive(&shared.queries_full);
}

}  // namespace rtpurbo
