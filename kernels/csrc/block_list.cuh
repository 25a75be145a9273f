// The blocks that a group reads in one row, ascending, with the heads that selected each.
#pragma once

#include "cta.cuh"
#include "partition.cuh"

namespace rtpurbo {

constexpr int kListThreads = 256;

struct ListScratch {
    int sums[kListThreads / 32];
};

// What a list is made of: bits of each selected head of the row, 32 blocks a word.
struct SelectedWords {
    const uint32_t* row;  // [H, width]
    int64_t width;
};

// Writes the list and returns its length, with kListThreads threads. If the group has local heads,
// the blocks of the window rule are in it too, with the bits of those that selected them.
DEVICE int write_list(const SelectedWords& selected, const Group& group, WindowBlocks window,
                      ListEntry* list, ListScratch& scratch) {
    const int thread = threadIdx.x;
    const int words = ceil_div(window.blocks, 32);
    const uint32_t retrieval = static_cast<uint32_t>(group.retrieval);
    const bool has_local = retrieval != (1u << group.heads) - 1;
    int before = 0;
    for (int base = 0; base < words; base += kListThreads) {
        const int word = base + thread;
        uint32_t bits[kTileHeads];  // of each slot; all loads are under way together
#pragma unroll
        for (int slot = 0; slot < kTileHeads; ++slot) {
            const bool selects = word < words && (retrieval >> slot & 1);
            bits[slot] = selects ? __ldcg(selected.row + group.selected[slot] * selected.width + word)
                                 : 0;
        }
        uint32_t read = 0;  // blocks of this word that the group reads
#pragma unroll
        for (int slot = 0; slot < kTileHeads; ++slot) read |= bits[slot];
        if (has_local && word < words) {
            for (int bit = 0; bit < 32; ++bit) {
                if (window.holds(word * 32 + bit)) read |= 1u << bit;
            }
        }
        int total = 0;
        const int count = __popc(read);
        int place = before + cta_running_sum(count, scratch.sums, total) - count;
        for (; read != 0; read &= read - 1) {
            const int bit = __ffs(read) - 1;
            uint32_t heads = 0;
#pragma unroll
            for (int slot = 0; slot < kTileHeads; ++slot) heads |= (bits[slot] >> bit & 1u) << slot;
            list[place++] = ListEntry{word * 32 + bit, heads};
        }
        before += total;
    }
    return before;
}

}  // namespace rtpurbo
