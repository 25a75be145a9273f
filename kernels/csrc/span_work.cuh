// What a CTA of the Hopper prefill computes next: a tile of queries and the tiles of keys it needs.
#pragma once

#include "device.cuh"
#include "span_args.h"

namespace rtpurbo {

constexpr int kSpanKeys = 2 * kSpanBlock;  // of a tile
constexpr int kNoBlock = 1 << 24;          // times 64 is a position that no query reaches

// 128 queries of one head: where they stand, and which tiles of keys they need, newest first.
struct SpanWork {
    int64_t head;
    int64_t row_begin;  // among all query tokens
    int rows;           // in use
    int span, kv_row, context;
    int first, last;  // positions of the first and last query
    int lowest;       // position at which the first query's window begins
    int high, low, sink_tiles;  // tiles [low, high] and [0, sink_tiles) by the window rule
    const int32_t* list;        // or null
    int count;                  // blocks of the list
    int tiles;

    // False if no span has such a tile.
    DEVICE bool find(const SpanArgs& args, int64_t item) {
        int64_t tile = args.tiles - 1 - item / args.group;
        const int64_t member = item % args.group;
        const int64_t at = tile * args.group + member;
        int64_t begin = 0, end = 0;
        for (span = 0; span < args.spans; ++span) {
            begin = args.query_starts[span];
            end = args.query_starts[span + 1];
            const int64_t own = (end - begin + kSpanQueries - 1) / kSpanQueries;
            if (tile < own) break;
            tile -= own;
        }
        if (span == args.spans) return false;
        head = args.heads[member];
        kv_row = static_cast<int>(args.kv_rows[member]);
        context = static_cast<int>(args.context_lens[span]);
        row_begin = begin + tile * kSpanQueries;
        rows = static_cast<int>(min(end - row_begin, int64_t{kSpanQueries}));
        first = context - static_cast<int>(end - row_begin);
        last = first + rows - 1;
        list = nullptr;
        if (args.lists != nullptr) {
            list = args.lists + at * args.list_width;
            count = args.list_counts[at];
            tiles = (count + 1) / 2;
            return true;
        }
        lowest = max(first - static_cast<int>(args.window) + 1, 0);
        high = last / kSpanKeys;
        low = lowest / kSpanKeys;
        sink_tiles = min((static_cast<int>(args.sinks) + kSpanKeys - 1) / kSpanKeys, low);
        tiles = high - low + 1 + sink_tiles;
        return true;
    }

    // Block of a half of tile i, or kNoBlock.
    DEVICE int block_of(int i, int half) const {
        if (list != nullptr) {
            const int at = count - 2 - 2 * i + half;
            return at < 0 ? kNoBlock : list[at];
        }
        const int behind = high - i;
        return 2 * (behind >= low ? behind : behind - low + sink_tiles) + half;
    }

    DEVICE bool sees(const SpanArgs& args, int block) const {
        const int begin = block * kSpanBlock;
        if (begin > last) return false;
        return list != nullptr || begin + kSpanBlock > lowest || begin < args.sinks;
    }

    // Whether some query may not see some key of tile i.
    DEVICE bool is_edge(const SpanArgs& args, int i) const {
        const int lower = block_of(i, 0), upper = block_of(i, 1);
        if (lower == kNoBlock || (upper + 1) * kSpanBlock - 1 > first) return true;
        return list == nullptr && lower * kSpanBlock <= last - static_cast<int>(args.window);
    }
};

DEVICE int64_t page_at(const SpanArgs& args, int span, int block) {
    const int64_t at = span * args.table.row_stride + block;
    return args.table.is_64_bit ? static_cast<const int64_t*>(args.table.pages)[at]
                                : static_cast<const int32_t*>(args.table.pages)[at];
}

}  // namespace rtpurbo
