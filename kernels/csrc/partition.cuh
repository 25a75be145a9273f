// Who computes what: blocks of a row under each rule, pieces of items, and shares of all for the CTAs.
#pragma once

#include "args.h"
#include "device.cuh"

namespace rtpurbo {

HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Blocks that the window rule touches: [0, sink_blocks) and [first, blocks).
struct WindowBlocks {
    int sink_blocks;
    int first;
    int blocks;

    HOST_DEVICE int count() const { return sink_blocks + blocks - first; }
    HOST_DEVICE int at(int index) const {
        return index < sink_blocks ? index : first + index - sink_blocks;
    }
    HOST_DEVICE bool holds(int block) const {
        return block < blocks && (block < sink_blocks || block >= first);
    }
};

// A GPU has no instruction that divides: 64 bits take a hundred, 32 bits twenty. Page sizes are nearly
// always powers of two.
HOST_DEVICE int divide(int a, int b) {
    const uint32_t by = static_cast<uint32_t>(b), of = static_cast<uint32_t>(a);
    return static_cast<int>((by & (by - 1)) == 0 ? of >> log2_of(by) : of / by);
}

// The same of what is below 2^31, where the host knows the divisor.
HOST_DEVICE int divide(int a, Divisor by) {
    return static_cast<int>((static_cast<uint64_t>(2u * static_cast<uint32_t>(a)) * by.factor >> 32) >>
                            by.shift);
}

inline Divisor divisor_of(int64_t by) {
    uint32_t shift = 0;
    while (int64_t{1} << shift < by) ++shift;
    return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + by - 1) / by), shift};
}

// All below 2^31; `by` divides by the `size` of a block.
template <typename By>
HOST_DEVICE WindowBlocks window_blocks(int length, int size, int window, int sinks, By by) {
    WindowBlocks found;
    found.blocks = divide(length + size - 1, by);
    // A window of 0 sees nothing: its first block is past the end.
    found.first = window <= 0 ? found.blocks : length > window ? divide(length - window, by) : 0;
    const int sink_blocks = divide(sinks + size - 1, by);
    found.sink_blocks = sink_blocks < found.first ? sink_blocks : found.first;
    return found;
}

HOST_DEVICE WindowBlocks window_blocks(int64_t context, int64_t block_tokens, int64_t window,
                                       int64_t sinks) {
    const int size = static_cast<int>(block_tokens);
    return window_blocks(static_cast<int>(context), size, static_cast<int>(window),
                         static_cast<int>(sinks), size);
}

// Most blocks of a piece, if `items` items of `total` blocks are to be cut for `workers` CTAs. Where
// CTAs are many, every piece finds one of its own, though each item may end with a short piece: a CTA
// that crossed from one item to the next would pay for two starts and two merges, and all wait for it.
HOST_DEVICE int piece_blocks(int total, int items, int workers, int least) {
    if (2 * items > workers) return least;
    const int blocks = ceil_div(total, workers - items);
    return blocks < least ? least : blocks;
}

// First block of piece `piece` of the `pieces`, at most 65535, that an item of `blocks` is cut into.
HOST_DEVICE int piece_start(int piece, int pieces, int blocks) {
    return static_cast<int>(static_cast<uint32_t>(piece) * static_cast<uint32_t>(blocks) /
                            static_cast<uint32_t>(pieces));
}

// `total` pieces in a row, in `count` <= total shares of nearly equal length, a CTA each.
struct Shares {
    int each;    // pieces of a share
    int longer;  // the first so many have one more

    HOST_DEVICE Shares(int total, int count)
        : each(static_cast<int>(static_cast<uint32_t>(total) / static_cast<uint32_t>(count))),
          longer(total - each * count) {}

    HOST_DEVICE int start(int share) const {
        return share * each + (share < longer ? share : longer);
    }

    // The share that holds a piece.
    HOST_DEVICE int owner(int piece) const {
        const int left = piece - longer * (each + 1);
        const uint32_t size = static_cast<uint32_t>(left < 0 ? each + 1 : each);
        return left < 0 ? static_cast<int>(static_cast<uint32_t>(piece) / size)
                        : longer + static_cast<int>(static_cast<uint32_t>(left) / size);
    }
};

// CTAs that get work: a share is never empty, and never smaller than `least` if it can be helped.
HOST_DEVICE int64_t working_ctas(int64_t total, int64_t ctas, int64_t least) {
    const int64_t useful = (total + least - 1) / least;
    return useful < ctas ? useful : ctas;
}

// First unit of CTA `cta`'s share [share_start(cta), share_start(cta + 1)) of `total`.
HOST_DEVICE int64_t share_start(int64_t cta, int64_t total, int64_t ctas) {
    return cta * total / ctas;
}

// Index of the last of `count` ascending starts that is not past `unit`: the item that holds it,
// since empty items share their start with the next one.
template <typename Start>
HOST_DEVICE int item_of(const Start* starts, int count, int64_t unit) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (static_cast<int64_t>(starts[middle]) <= unit) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low - 1;
}

DEVICE int blocks_of(const SelectArgs& args, int64_t row) {
    const int64_t context = args.context_lens[row];
    return static_cast<int>((context + args.block_tokens - 1) / args.block_tokens);
}

// Blocks to score: none in a row that is short enough to be attended densely.
DEVICE int scored_blocks(const SelectArgs& args, int64_t row) {
    return args.context_lens[row] < args.dense_below ? 0 : blocks_of(args, row);
}

// Page of a row's logical block. Pages fit into 32 bits: of an int64 the lower half is read.
DEVICE int64_t page_of(const Table& table, int64_t row, int64_t block) {
    const int64_t place = row * table.row_stride + block;
    return static_cast<const int32_t*>(table.pages)[table.is_64_bit ? 2 * place : place];
}

}  // namespace rtpurbo
