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
    int own = -1;  // a head whose words this CTA has
    const uint32_t* own_words = nullptr;

    DEVICE uint32_t read(int head, int word) const {
        return head == own ? own_words[word] : __ldcg(row + head * width + word);
    }
};

// Writes the list of a group in which at most kHeads heads select.
template <int kHeads>
DEVICE int write_list_of(const SelectedWords& selected, const Group& group, WindowBlocks window,
                         ListEntry* list, ListScratch& scratch) {
    const int thread = threadIdx.x;
    const int words = ceil_div(window.blocks, 32);
    const uint32_t retrieval = static_cast<uint32_t>(group.retrieval);
    const bool has_local = retrieval != (1u << group.heads) - 1;
    int slot[kHeads], row[kHeads];  // of each head that selects; -1: there is none
    uint32_t left = retrieval;
#pragma unroll
    for (int i = 0; i < kHeads; ++i, left &= left - 1) {
        const bool is_there = kHeads == kTileHeads ? retrieval >> i & 1 : left != 0;
        slot[i] = kHeads == kTileHeads || !is_there ? i : __ffs(static_cast<int>(left)) - 1;
        row[i] = is_there ? group.selected[slot[i]] : -1;
    }
    int before = 0;
    for (int base = 0; base < words; base += kListThreads) {
        const int word = base + thread;
        uint32_t bits[kHeads];  // all loads are under way together
#pragma unroll
        for (int i = 0; i < kHeads; ++i) {
            bits[i] = word < words && row[i] >= 0 ? selected.read(row[i], word) : 0;
        }
        uint32_t read = 0;  // blocks of this word that the group reads
#pragma unroll
        for (int i = 0; i < kHeads; ++i) read |= bits[i];
        if (has_local && word < words) {
            for (int bit = 0; bit < 32; ++bit) {
                if (window.holds(word * 32 + bit)) read |= 1u << bit;
            }
        }
        int total = 0;
        const int count = __popc(read);
        int place = before + cta_running_sum(count, scratch.sums, total) - count;
        for (; read != 0; read &= read - 1) {
            const int bit = __ffs(static_cast<int>(read)) - 1;
            uint32_t heads = 0;
#pragma unroll
            for (int i = 0; i < kHeads; ++i) heads |= (bits[i] >> bit & 1u) << slot[i];
            list[place++] = ListEntry{word * 32 + bit, heads};
        }
        before += total;
    }
    return before;
}

// Writes the list and returns its length, with kListThreads threads. If the group has local heads,
// the blocks of the window rule are in it too, with the bits of those that selected them.
DEVICE int write_list(const SelectedWords& selected, const Group& group, WindowBlocks window,
                      ListEntry* list, ListScratch& scratch) {
    // Few heads of a group select, and the time that a block takes grows with their number.
    const int heads = __popc(static_cast<uint32_t>(group.retrieval));
    return heads <= 1   ? write_list_of<1>(selected, group, window, list, scratch)
           : heads <= 4 ? write_list_of<4>(selected, group, window, list, scratch)
                        : write_list_of<kTileHeads>(selected, group, window, list, scratch);
}

}  // namespace rtpurbo
