// The loading warp of a prefilling CTA.
#pragma once

#include "hopper.cuh"
#include "span_args.h"
#include "span_shared.cuh"
#include "span_work.cuh"

namespace rtpurbo {

// One lane loads all tiles of this CTA's work.
template <int kDim>
DEVICE void load_everything(const SpanLaunch& launch, SpanShared<kDim>& shared) {
    constexpr int kHalves = SpanShared<kDim>::kHalves;
    const SpanArgs& args = launch.args;
    const int64_t items = args.tiles * args.group;
    const int nowhere = static_cast<int>(args.pages * args.cache_heads) * kSpanBlock;
    Ring keys, values;
    uint32_t queries_parity = 0;
    SpanWork work;

    auto row_of = [&](int i, int half) {
        const int block = work.block_of(i, half);
        if (!work.sees(args, block)) return nowhere;  // rows past the end arrive as zeros
        const int64_t page = page_at(args, work.span, block);
        return static_cast<int>(page * args.cache_heads + work.kv_row) * kSpanBlock;
    };
    auto load = [&](const CUtensorMap& map, unsigned char (&tile)[kHalves][kSpanKeys * 128],
                    uint64_t* full, int i) {
        hopper::barrier_expect_bytes(full, kSpanKeys * kDim * 2);
        for (int page = 0; page < 2; ++page) {
            const int row = row_of(i, page);
            for (int half = 0; half < kHalves; ++half) {
                hopper::load_2d(tile[half] + page * kSpanBlock * 128, &map, full,
                                half * kHalfColumns, row);
            }
        }
    };

    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        if (!work.find(args, item)) continue;
        hopper::barrier_wait(&shared.queries_empty, queries_parity ^ 1);
        queries_parity ^= 1;
        hopper::barrier_expect_bytes(&shared.queries_full, kSpanQueries * kDim * 2);
        for (int half = 0; half < kHalves; ++half) {
            hopper::load_3d(shared.queries[half], &launch.queries, &shared.queries_full,
                            half * kHalfColumns, static_cast<int>(work.head),
                            static_cast<int>(work.row_begin));
        }
        for (int i = 0; i <= work.tiles; ++i) {  // values stay a tile behind keys
            if (i < work.tiles) {
                hopper::barrier_wait(&shared.keys_empty[keys.stage], keys.parity ^ 1);
                load(launch.keys, shared.keys[keys.stage], &shared.keys_full[keys.stage], i);
                keys.advance();
            }
            if (i > 0) {
                hopper::barrier_wait(&shared.values_empty[values.stage], values.parity ^ 1);
                load(launch.values, shared.values[values.stage],
                     &shared.values_full[values.stage], i - 1);
                values.advance();
            }
        }
    }
}

}  // namespace rtpurbo
