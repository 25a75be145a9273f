// What one query token's group of heads reads in decode: which blocks, and where they lie.
#pragma once

#include "args.h"
#include "cta.cuh"
#include "device.cuh"
#include "partition.cuh"

namespace rtpurbo {

// What must be loaded to know an item.
struct ItemWords {
    int4 group;
    int context;

    DEVICE static ItemWords load(const DecodeArgs& args, int item) {
        const int row = divide(item, args.by_groups);
        const Group* group = args.groups + (item - row * static_cast<int>(args.group_count));
        return {*reinterpret_cast<const int4*>(group),  // 144 bytes each
                static_cast<int>(args.context_lens[row])};
    }

    DEVICE ItemWords of_lane(int lane) const {
        return {{__shfl_sync(kAllLanes, group.x, lane), __shfl_sync(kAllLanes, group.y, lane),
                 __shfl_sync(kAllLanes, group.z, lane), __shfl_sync(kAllLanes, group.w, lane)},
                __shfl_sync(kAllLanes, context, lane)};
    }

    // By value, so that both may stay in registers.
    DEVICE static ItemWords either(bool first, const ItemWords& a, const ItemWords& b) {
        return {{first ? a.group.x : b.group.x, first ? a.group.y : b.group.y,
                 first ? a.group.z : b.group.z, first ? a.group.w : b.group.w},
                first ? a.context : b.context};
    }

    DEVICE bool is_listed(const DecodeArgs& args) const {
        return args.lists != nullptr && group.w != 0 && context > 0 &&
               context >= static_cast<int>(args.dense_below);
    }
};

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

    DEVICE Item(const DecodeArgs& args, int item) : Item(args, item, ItemWords::load(args, item)) {}

    DEVICE Item(const DecodeArgs& args, int item, const ItemWords& words) : index(item) {
        row = divide(item, args.by_groups);
        group = args.groups + (item - row * static_cast<int>(args.group_count));
        context = words.context;
        pool = words.group.x;
        kv_row = words.group.y;
        heads = words.group.z;
        retrieval = static_cast<uint32_t>(words.group.w);
        local = ((1u << heads) - 1) & ~retrieval;
        window = window_blocks(context, static_cast<int>(args.block_tokens),
                               static_cast<int>(args.window), static_cast<int>(args.sinks),
                               args.by_tokens);
        list = words.is_listed(args) ? args.lists + index * args.list_width : nullptr;
    }

    // Blocks of an item without a list.
    DEVICE int count() const { return retrieval != 0 ? window.blocks : window.count(); }

    // Block number `place` with the slots that see all of it.
    DEVICE ListEntry read(int place) const {
        if (list == nullptr) return {retrieval != 0 ? place : window.at(place), retrieval};
        const int2 found = __ldcg(reinterpret_cast<const int2*>(list) + place);
        return {found.x, static_cast<uint32_t>(found.y)};
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
