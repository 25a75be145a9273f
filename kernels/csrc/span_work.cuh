// What a CTA of the Hopper prefill computes next: a tile of queries and the tiles of keys it needs.
#pragma once

#include "device.cuh"
#include "span_args.h"

namespace rtpurbo {

constexpr int kSpanKeys = 2 * kSpanBlock;  // of a tile
constexpr int kNoBlock = 1 << 24;          // times 64 is a position that no query reaches

// 128 queries of one head: where they stand, and which tiles of keys they need, newest first.
struct SpanWork {
    int64_t row_begin;  // among all query tokens
    int head, kv_row, span;
    int rows;         // in use
    int first, last;  // positions of the first and last query
    int tiles;        // of keys; 0: all work is done
    int whole_begin, whole_end;          // tiles that hide no key from any query
    int unwritten_begin, unwritten_end;  // rows of the first tile, past the end of the context
    int lowest;                 // position at which the first query's window begins
    int high, low, sink_tiles;  // tiles [low, high] and [0, sink_tiles) by the window rule
    int count;                  // blocks of the list
    const int32_t* list;        // or null

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
        head = static_cast<int>(args.heads[member]);
        kv_row = static_cast<int>(args.kv_rows[member]);
        row_begin = begin + tile * kSpanQueries;
        rows = static_cast<int>(min(end - row_begin, int64_t{kSpanQueries}));
        const int context = static_cast<int>(args.context_lens[span]);
        first = context - static_cast<int>(end - row_begin);
        last = first + rows - 1;
        list = nullptr;
        if (args.lists != nullptr) {
            take_list(args.lists + at * args.list_width, args.list_counts[at]);
        } else {
            take_window(args);
        }
        find_unwritten(context);
        return true;
    }

    DEVICE void take_list(const int32_t* blocks, int length) {
        list = blocks;
        count = length;
        tiles = (count + 1) / 2;
        int late = 0;  // blocks with a key that the first query does not see
        while (late < count && (list[count - 1 - late] + 1) * kSpanBlock - 1 > first) ++late;
        whole_begin = (late + 1) / 2;
        whole_end = count / 2;
    }

    DEVICE void take_window(const SpanArgs& args) {
        const int window = static_cast<int>(args.window);
        lowest = max(first - window + 1, 0);
        high = last / kSpanKeys;
        low = lowest / kSpanKeys;
        sink_tiles = min((static_cast<int>(args.sinks) + kSpanKeys - 1) / kSpanKeys, low);
        tiles = high - low + 1 + sink_tiles;
        whole_begin = high + 1 - (first + 1) / kSpanKeys;
        // Those that hold a key which the last query does not see.
        const int gone = last < window ? 0 : (last - window) / kSpanKeys + 1;
        whole_end = high + 1 - gone;
    }

    // Rows of the first tile that hold no key of the context, though its last page does.
    DEVICE void find_unwritten(int context) {
        unwritten_begin = unwritten_end = 0;
        const int written = context % kSpanBlock;
        for (int half = 0; half < 2; ++half) {
            if (written == 0 || block_of(0, half) != context / kSpanBlock) continue;
            unwritten_begin = half * kSpanBlock + written;
            unwritten_end = (half + 1) * kSpanBlock;
        }
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

    DEVICE bool is_whole(int i) const { return i >= whole_begin && i < whole_end; }
};

DEVICE int64_t page_at(const SpanArgs& args, int span, int block) {
    const int64_t at = span * args.table.row_stride + block;
    return args.table.is_64_bit ? static_cast<const int64_t*>(args.table.pages)[at]
                                : static_cast<const int32_t*>(args.table.pages)[at];
}

}  // namespace rtpurbo
