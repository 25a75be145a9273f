// The blocks that a group reads in one row, ascending, with the heads that selected each.
#pragma once

#include "cta.cuh"
#include "partition.cuh"

namespace rtpurbo {

constexpr int kListThreads = 256;

struct ListScratch {
    uint32_t words[kTileHeads * kListThreads];
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
    const bool has_local = group.retrieval != (1 << group.heads) - 1;
    int before = 0;
    for (int base = 0; base < words; base += kListThreads) {
        const int word = base + thread;
        uint32_t read = 0;  // blocks of this word that the group reads
        for (int slot = 0; slot < group.heads; ++slot) {
            uint32_t bits = 0;
            if (word < words && (group.retrieval >> slot & 1)) {
                bits = __ldcg(selected.row + group.selected[slot] * selected.width + word);
            }
            scratch.words[slot * kListThreads + thread] = bits;
            read |= bits;
        }
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
            for (int slot = 0; slot < group.heads; ++slot) {
                heads |= (scratch.words[slot * kListThreads + thread] >> bit & 1u) << slot;
            }
            list[place++] = ListEntry{word * 32 + bit, heads};
        }
        before += total;
    }
    return before;
}

}  // namespace rtpurbo
