// Who computes what: blocks of a row under each rule, and equal shares of all blocks for the CTAs.
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

HOST_DEVICE WindowBlocks window_blocks(int64_t context, int64_t block_tokens, int64_t window,
                                       int64_t sinks) {
    WindowBlocks found;
    found.blocks = static_cast<int>((context + block_tokens - 1) / block_tokens);
    // A window of 0 sees nothing: its first block is past the end.
    found.first = window <= 0        ? found.blocks
                  : context > window ? static_cast<int>((context - window) / block_tokens)
                                     : 0;
    const int64_t sink_blocks = (sinks + block_tokens - 1) / block_tokens;
    found.sink_blocks = static_cast<int>(sink_blocks < found.first ? sink_blocks : found.first);
    return found;
}

// CTAs that get work: a share is never empty, and never smaller than `least` if it can be helped.
HOST_DEVICE int64_t working_ctas(int64_t total, int64_t ctas, int64_t least) {
    const int64_t useful = (total + least - 1) / least;
    return useful < ctas ? useful : ctas;
}

// First unit of CTA `cta`'s share [share_start(cta), share_start(cta + 1)) of `total`.
HOST_DEVICE int64_t share_start(int64_t cta, int64_t total, int64_t ctas) {
    return cta * total / ctas;
}

// The CTA whose share holds `unit`.
HOST_DEVICE int64_t share_owner(int64_t unit, int64_t total, int64_t ctas) {
    return ((unit + 1) * ctas - 1) / total;
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

// Page of a row's logical block. Pages fit into 32 bits: of an int64 the lower half is read.
DEVICE int64_t page_of(const Table& table, int64_t row, int64_t block) {
    const int64_t place = row * table.row_stride + block;
    return static_cast<const int32_t*>(table.pages)[table.is_64_bit ? 2 * place : place];
}

}  // namespace rtpurbo
