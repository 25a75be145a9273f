// What one query token's group of heads reads in decode: which blocks, and where they lie.
#pragma once

#include "args.h"
#include "device.cuh"
#include "partition.cuh"

namespace rtpurbo {

// A row and a group, and the blocks to read for them.
struct Item {
    int index;
    int row;
    const Group* group;
    int pool, kv_row, heads;
    uint32_t retrieval;  // bit per slot: sees what its list says, or all
    uint32_t local;      // bit per slot: under the window rule
    int context;
    WindowBlocks window;
    const ListEntry* list;  // or null

    DEVICE Item(const DecodeArgs& args, int item) : index(item) {
        const int groups = static_cast<int>(args.group_count);
        row = divide(item, groups);
        group = args.groups + (item - row * groups);
        const int4 first = *reinterpret_cast<const int4*>(group);  // 144 bytes each
        context = static_cast<int>(args.context_lens[row]);
        pool = first.x;
        kv_row = first.y;
        heads = first.z;
        retrieval = static_cast<uint32_t>(first.w);
        local = ((1u << heads) - 1) & ~retrieval;
        window = window_blocks(context, args.block_tokens, args.window, args.sinks);
        const bool listed = args.lists != nullptr && retrieval != 0 && context > 0 &&
                            context >= args.dense_below;
        list = listed ? args.lists + index * args.list_width : nullptr;
    }

    // Blocks of an item without a list.
    DEVICE int count() const { return retrieval != 0 ? window.blocks : window.count(); }

    // Blocks number `places` with the slots that see all of them.
    template <int kCount>
    DEVICE void read(const int (&places)[kCount], ListEntry (&entries)[kCount]) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int place = places[i];
            entries[i] = {retrieval != 0 ? place : window.at(place), retrieval};
        }
        if (list == nullptr) return;
        int2 found[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            found[i] = __ldcg(reinterpret_cast<const int2*>(list) + places[i]);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            entries[i] = {found[i].x, static_cast<uint32_t>(found[i].y)};
        }
    }
};

// Where an item's keys and values lie.
struct Source {
    const unsigned char* keys;
    const unsigned char* values;
    const int32_t* pages;  // of its row; of an int64 the lower half is read
    int page_words;
    uint32_t page_rows;  // tokens of all KV heads in a page
    uint32_t first_row;  // of those, the first of the item's KV head

    DEVICE Source(const DecodeArgs& args, const Item& item) {
        const Table& table = args.tables[item.pool];
        const uint32_t block_tokens = static_cast<uint32_t>(args.block_tokens);
        keys = static_cast<const unsigned char*>(args.keys[item.pool]);
        values = static_cast<const unsigned char*>(args.values[item.pool]);
        page_words = table.is_64_bit ? 2 : 1;
        pages = static_cast<const int32_t*>(table.pages) + item.row * table.row_stride * page_words;
        page_rows = static_cast<uint32_t>(args.kv_rows[item.pool]) * block_tokens;
        first_row = static_cast<uint32_t>(item.kv_row) * block_tokens;
    }
};

}  // namespace rtpurbo
