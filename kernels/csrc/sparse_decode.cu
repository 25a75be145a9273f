// Attention of one query token per row over paged caches, all head roles of a layer in one launch.
//
// An item is a row and a group: a KV head with the query heads that read it. Its blocks come from a
// list (some head selected them, or a local head sees them), from the window rule, or are all of
// the context; each is read once for all heads of the group. Items are cut into pieces, a CTA each
// (partition.cuh). Inside a CTA every warp attends to strips of its own (strip.cuh), the next ones
// on their way. An item of several pieces leaves partial results, and the CTA that completes it
// merges them in the order of the pieces: the same inputs give the same bits. Bound by memory
// bandwidth on keys and values; with few rows by the chain of loads that depend on each other, so
// CTAs are small, several on a multiprocessor, and each does one thing.
//
// Of the CTAs some take items with lists only, at the same time as the others attend to the window.
// After index_select the kernel may be started early (`overlap`): the others then work while blocks
// are still being chosen, and only those with lists wait. Long lists are shared out over all CTAs.

#include "args.h"
#include "cta.cuh"
#include "device.cuh"
#include "partition.cuh"
#include "strip.cuh"

namespace rtpurbo {
namespace {

constexpr int kMaxWarps = 4;
constexpr int kMergedRows = 32;  // of partial results that a warp has on their way
// Blocks of a piece at least. A merge of more pieces takes longer than their blocks: a window of 8192
// tokens makes 26, which are merged in one go.
constexpr int kLeastBlocks = 5, kLeastListed = 2;
constexpr int kListedAlone = 8;  // blocks, for each CTA that takes items with lists only
constexpr float kLog2E = 1.4426950408889634f;

// A strip on its way, as its reader needs it.
struct InFlight {
    int32_t first;      // position of its first token, -1: nobody sees it and nothing was copied
    uint32_t selected;  // slots that selected its block
};

// Shared memory of a CTA.
template <typename Strip, int kDim>
struct Layout {
    static constexpr int kStages = 256 / kDim;  // strips in a warp's ring
    static constexpr int kHalfBytes = kStripTokens * kDim * sizeof(typename Strip::Element);
    static constexpr int kRingBytes = kStages * 2 * kHalfBytes;  // of a warp

    static constexpr int kStarts = 0;                         // int [items + 1], in pieces
    static constexpr int kBlocks = (kMaxItems + 1) * 4;       // uint16_t [items]
    static constexpr int kFlag = kBlocks + kMaxItems * 2;
    static constexpr int kStats = (kFlag + 4 + 127) / 128 * 128;
    static constexpr int kInFlight = kStats + kMaxWarps * kTileHeads * sizeof(Stats);
    static constexpr int kScratch = kInFlight + kMaxWarps * kStages * sizeof(InFlight);
    static constexpr int kRing =
        (kScratch + kMaxWarps * Strip::kScratchFloats * 4 + 127) / 128 * 128;

    static_assert(kRingBytes >= kTileHeads * Strip::kPitch * 4, "a warp's result fits into its ring");
    static_assert(kRingBytes >= kMergedRows * kDim * 4, "and so do the rows that it merges");

    static constexpr int bytes(int warps) { return kRing + warps * kRingBytes; }
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

// A strip and where it lies.
struct Target {
    int first;        // position of its first token, -1: nobody sees it
    uint32_t heads;   // slots that selected its block
    int page;         // not looked at before the copy: the load may take its time
    int offset;       // of the first token in the page
};

// Strips of an item's blocks [begin, end), numbered from 0.
struct Strips {
    int begin;
    int per_block;
    int count;

    DEVICE Strips(const DecodeArgs& args, int begin, int end)
        : begin(begin),
          per_block(static_cast<int>(args.block_tokens) / kStripTokens),
          count((end - begin) * per_block) {}
};

// Strips `index`, `index + step` and so on. Loads of a kind are under way together, and none waits for
// whether somebody sees the strip; past the end any will do.
template <int kCount>
DEVICE void find_strips(const DecodeArgs& args, const Item& item, const Source& source,
                        const Strips& strips, int index, int step, Target (&found)[kCount]) {
    int places[kCount], offsets[kCount];
    ListEntry entries[kCount];
    int pages[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const int strip = min(index + i * step, strips.count - 1);
        const int block = divide(strip, strips.per_block);
        places[i] = strips.begin + block;
        offsets[i] = (strip - block * strips.per_block) * kStripTokens;
    }
    item.read(places, entries);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        pages[i] = source.pages[static_cast<int64_t>(entries[i].block) * source.page_words];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const int first = entries[i].block * static_cast<int>(args.block_tokens) + offsets[i];
        // The window sees the strip if it sees the strip's newest token.
        const int last = min(first + kStripTokens, item.context) - 1;
        const bool near = first < static_cast<int>(args.sinks) ||
                          item.context - 1 - last < static_cast<int>(args.window);
        const bool seen = index + i * step < strips.count && first < item.context &&
                          (entries[i].heads != 0 || (item.local != 0 && near));
        found[i] = {seen ? first : -1, entries[i].heads, pages[i], offsets[i]};
    }
}

// Copies a warp's strip of keys and values; tokens past the context become zeros, since memory that
// was never written may hold NaN, which a weight of zero does not silence.
template <typename Strip, int kDim>
DEVICE void copy_strip(const Source& source, const Target& target, int context,
                       unsigned char* stage) {
    using Element = typename Strip::Element;
    constexpr int kHalfBytes = Layout<Strip, kDim>::kHalfBytes;
    constexpr int kRows = 32 / Strip::kChunks;  // of tokens, that a warp copies at once
    const int lane = threadIdx.x % 32, row = lane / Strip::kChunks, column = lane % Strip::kChunks;
    const int64_t token = static_cast<int64_t>(target.page) * source.page_rows + source.first_row +
                          static_cast<uint32_t>(target.offset);
    const int64_t offset = token * kDim * static_cast<int64_t>(sizeof(Element)) + lane * 16;
    const unsigned char* keys = source.keys + offset;
    const unsigned char* values = source.values + offset;
    const int left = context - target.first - row;
    stage += row * Strip::kChunks * 16;
#pragma unroll
    for (int i = 0; i < kStripTokens / kRows; ++i) {
        unsigned char* to = stage + i * 512 + ((column ^ row) ^ (i * kRows % 8)) * 16;
        const int bytes = i * kRows < left ? 16 : 0;
        copy_async_16(to, keys + i * 512, bytes);
        copy_async_16(to + kHalfBytes, values + i * 512, bytes);
    }
}

// Attention of an item's blocks [begin, end), by all warps: leaves each warp's result in its ring
// and its statistics in shared memory.
template <typename Strip, int kDim>
DEVICE void attend(const DecodeArgs& args, const Item& item, int begin, int end,
                   unsigned char* shared) {
    using Layout = Layout<Strip, kDim>;
    using Element = typename Strip::Element;
    constexpr int kStages = Layout::kStages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    unsigned char* ring = shared + Layout::kRing + warp * Layout::kRingBytes;
    InFlight* in_flight = reinterpret_cast<InFlight*>(shared + Layout::kInFlight) + warp * kStages;
    float* scratch =
        reinterpret_cast<float*>(shared + Layout::kScratch) + warp * Strip::kScratchFloats;
    const Strips strips(args, begin, end);
    const Source source(args, item);
    // Every call closes a group of copies, empty or not, so that waiting can count them.
    const auto copy = [&](const Target& target, int stage) {
        if (target.first >= 0) {
            copy_strip<Strip, kDim>(source, target, item.context,
                                    ring + stage * 2 * Layout::kHalfBytes);
        }
        if (lane == 0) in_flight[stage] = {target.first, target.heads};
        copy_async_commit();
    };
    Target ahead[kStages];
    find_strips(args, item, source, strips, warp, warps, ahead);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) copy(ahead[stage], stage);
    Strip strip;
    strip.begin(static_cast<const Element*>(args.queries) + item.row * args.query_row_stride,
                args.query_head_stride, *item.group, scratch);
    int stage = 0;
    for (int index = warp; index < strips.count; index += warps) {
        Target next[1];
        find_strips(args, item, source, strips, index + kStages * warps, warps, next);
        copy_async_wait<kStages - 1>();
        __syncwarp();
        const InFlight now = in_flight[stage];
        if (now.first >= 0) {
            const unsigned char* keys = ring + stage * 2 * Layout::kHalfBytes;
            const Sight sight{now.first,
                              now.selected,
                              item.local,
                              item.context,
                              static_cast<int>(args.window),
                              static_cast<int>(args.sinks)};
            strip.step(keys, keys + Layout::kHalfBytes, sight,
                       static_cast<float>(args.scale) * kLog2E, scratch);
        }
        __syncwarp();
        copy(next[0], stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    copy_async_wait<0>();
    __syncwarp();
    strip.end(reinterpret_cast<float*>(ring),
              reinterpret_cast<Stats*>(shared + Layout::kStats) + warp * kTileHeads);
}

DEVICE void store(uint16_t* out, float4 value) {
    *reinterpret_cast<uint2*>(out) =
        make_uint2(pack_bfloat16(value.x, value.y), pack_bfloat16(value.z, value.w));
}

DEVICE void store(float* out, float4 value) { *reinterpret_cast<float4*>(out) = value; }

DEVICE void add_scaled(float4& sum, float weight, float4 value) {
    sum.x = fmaf(weight, value.x, sum.x);
    sum.y = fmaf(weight, value.y, sum.y);
    sum.z = fmaf(weight, value.z, sum.z);
    sum.w = fmaf(weight, value.w, sum.w);
}

template <typename Element>
DEVICE Element* out_of(const DecodeArgs& args, const Item& item, int slot) {
    return static_cast<Element*>(args.out) + item.row * args.out_row_stride +
           item.group->head[slot] * args.out_head_stride;
}

// Merges the warps' results: into `out` if the item is complete, else into part `part`.
template <typename Strip, int kDim>
DEVICE void merge_warps(const DecodeArgs& args, const Item& item, bool complete, int64_t part,
                        unsigned char* shared) {
    using Layout = Layout<Strip, kDim>;
    const int warps = blockDim.x / 32;
    const Stats* stats = reinterpret_cast<const Stats*>(shared + Layout::kStats);
#pragma unroll 1
    for (int i = threadIdx.x; i < item.heads * (kDim / 4); i += blockDim.x) {
        const int slot = i / (kDim / 4), column = i % (kDim / 4) * 4;
        float most = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kMaxWarps; ++warp) {
            if (warp < warps) most = fmaxf(most, stats[warp * kTileHeads + slot].most);
        }
        const float reference = reference_of(most);
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int warp = 0; warp < kMaxWarps; ++warp) {
            if (warp >= warps) continue;
            const Stats own = stats[warp * kTileHeads + slot];
            const float factor = exp2_fast(own.most - reference);
            const float* result =
                reinterpret_cast<const float*>(shared + Layout::kRing + warp * Layout::kRingBytes);
            sum = fmaf(factor, own.sum, sum);
            add_scaled(total, factor,
                       *reinterpret_cast<const float4*>(result + slot * Strip::kPitch + column));
        }
        if (complete) {
            float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            add_scaled(value, sum == 0.0f ? 0.0f : 1.0f / sum, total);
            store(out_of<typename Strip::Element>(args, item, slot) + column, value);
        } else {
            const int64_t at = part * kTileHeads + slot;
            *reinterpret_cast<float4*>(args.partial + at * kDim + column) = total;
            if (column == 0) {
                reinterpret_cast<float2*>(args.partial_stats)[at] = make_float2(most, sum);
            }
        }
    }
}

// Where a CTA leaves its part of an item. A share's first item may have begun in an earlier share,
// its last may go on in a later one: at most one of either kind, of items with and without lists.
HOST_DEVICE constexpr int64_t part_of(int cta, bool listed, bool begins_item) {
    return cta * 4 + listed * 2 + begins_item;
}

// Merges the parts of an item that shares [first, last] hold, in their order: a warp a slot, a row of
// values by 16 bytes a lane. While rows are added up, those that follow are copied in their place, of
// this slot or the warp's next.
template <typename Strip, int kDim>
DEVICE void merge_parts(const DecodeArgs& args, const Item& item, int first, int last,
                        unsigned char* shared) {
    using Layout = Layout<Strip, kDim>;
    constexpr int kColumns = kDim / 4, kRowsAtOnce = 32 / kColumns, kLoadsAtOnce = 8;
    constexpr int kStep = kLoadsAtOnce * kRowsAtOnce;  // parts
    constexpr int64_t kStride = part_of(1, false, false) * kTileHeads;  // rows from part to part
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int parts = last - first + 1, column = lane % kColumns * 4, own = lane / kColumns;
    float* rows =
        reinterpret_cast<float*>(shared + Layout::kRing + warp * Layout::kRingBytes) + lane * 4;
    // Of part j > 0 at j strides from here; the first part begins the item and lies elsewhere.
    const int64_t begin = part_of(first, item.list != nullptr, false) * kTileHeads;
    const int64_t very_first = part_of(first, item.list != nullptr, true) * kTileHeads;
    // A lane reads only what it copied itself; past the last part these are zeros.
    const auto fetch = [&](int slot, int base, int row) {
        const int part = base + row + own;
        const float* from = args.partial + (begin + part * kStride + slot) * kDim + column;
        const float* begins = args.partial + (very_first + slot) * kDim + column;
#pragma unroll
        for (int i = 0; i < kLoadsAtOnce; ++i) {
            const float* source =
                i == 0 && part == 0 ? begins : from + i * kRowsAtOnce * kStride * kDim;
            copy_async_16(rows + (row + i * kRowsAtOnce) * kDim, source,
                          part + i * kRowsAtOnce < parts ? 16 : 0);
        }
    };
    const auto stats_of = [&](int slot, int part) -> float2 {
        if (part >= parts) return make_float2(-INFINITY, 0.0f);
        const int64_t at = (part == 0 ? very_first : begin + part * kStride) + slot;
        return __ldcg(reinterpret_cast<const float2*>(args.partial_stats) + at);
    };
    int slot = warp, base = 0;
    float2 own_stats = make_float2(-INFINITY, 0.0f);  // of part base + lane
    if (slot < item.heads) {
#pragma unroll 1
        for (int row = 0; row < kMergedRows && row < parts; row += kStep) fetch(slot, 0, row);
        copy_async_commit();
        own_stats = stats_of(slot, lane);
    }
    float reference = 0.0f, inverse = 0.0f;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    while (slot < item.heads) {
        if (base == 0) {
            float most = own_stats.x, sum = own_stats.y;
#pragma unroll 1
            for (int part = lane + 32; part < parts; part += 32) {
                const float2 next = stats_of(slot, part);
                const float larger = fmaxf(most, next.x), common = reference_of(larger);
                sum = sum * exp2_fast(most - common) + next.y * exp2_fast(next.x - common);
                most = larger;
            }
            reference = reference_of(warp_max(most));
            sum = warp_sum(sum * exp2_fast(most - reference));
            inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
            total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        const float weight = exp2_fast(own_stats.x - reference) * inverse;
        const bool ends = base + kMergedRows >= parts;
        const int next_slot = ends ? slot + warps : slot, next_base = ends ? 0 : base + kMergedRows;
        if (next_slot < item.heads) own_stats = stats_of(next_slot, next_base + lane);
        copy_async_wait<0>();
#pragma unroll 1
        for (int row = 0; row < kMergedRows; row += kStep) {
            if (base + row < parts) {
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    const int at = row + i * kRowsAtOnce;
                    add_scaled(total, __shfl_sync(kAllLanes, weight, at + own),
                               *reinterpret_cast<float4*>(rows + at * kDim));
                }
            }
            if (next_slot < item.heads && next_base + row < parts) fetch(next_slot, next_base, row);
        }
        copy_async_commit();
        if (ends) {
            if (kRowsAtOnce == 2) {
                total.x += __shfl_xor_sync(kAllLanes, total.x, 16);
                total.y += __shfl_xor_sync(kAllLanes, total.y, 16);
                total.z += __shfl_xor_sync(kAllLanes, total.z, 16);
                total.w += __shfl_xor_sync(kAllLanes, total.w, 16);
            }
            if (own == 0) store(out_of<typename Strip::Element>(args, item, slot) + column, total);
        }
        slot = next_slot;
        base = next_base;
    }
}

template <typename Strip, int kDim>
DEVICE void clear(const DecodeArgs& args, const Item& item) {
    for (int i = threadIdx.x; i < item.heads * (kDim / 4); i += blockDim.x) {
        store(out_of<typename Strip::Element>(args, item, i / (kDim / 4)) + i % (kDim / 4) * 4,
              make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
}

// Cuts items of blocks[i] blocks for `workers` CTAs: item i has pieces [starts[i], starts[i + 1]) of
// all. By one warp. Short lists are for the first `alone` of them.
DEVICE void cut_items(const uint16_t* blocks, int* starts, int items, int workers, int alone,
                      int least) {
    const int lane = threadIdx.x % 32, each = ceil_div(items, 32);
    const int begin = min(lane * each, items), end = min(begin + each, items);
    int total = 0, filled = 0, pieces = 0;
#pragma unroll 1
    for (int item = begin; item < end; ++item) {
        total += blocks[item];
        filled += blocks[item] != 0;
    }
    total = warp_sum(total);
    filled = warp_sum(filled);
    if (total < alone * kListedAlone) workers = alone;
    const int longest = piece_blocks(total, filled, workers, least);
#pragma unroll 1
    for (int item = begin; item < end; ++item) pieces += ceil_div(blocks[item], longest);
    int before = warp_running_sum(pieces) - pieces;
#pragma unroll 1
    for (int item = begin; item < end; ++item) {
        starts[item] = before;
        before += ceil_div(blocks[item], longest);
    }
    if (lane == 31) starts[items] = before;
}

// All items that have a list, or all that have none, by `workers` CTAs; this is number `place`.
template <typename Strip, int kDim>
DEVICE void attend_items(const DecodeArgs& args, bool listed, int place, int workers,
                         unsigned char* shared) {
    using Layout = Layout<Strip, kDim>;
    int* starts = reinterpret_cast<int*>(shared + Layout::kStarts);
    uint16_t* blocks = reinterpret_cast<uint16_t*>(shared + Layout::kBlocks);
    int* flag = reinterpret_cast<int*>(shared + Layout::kFlag);
    const int items = static_cast<int>(args.rows * args.group_count);
#pragma unroll 1
    for (int index = threadIdx.x; index < items; index += blockDim.x) {
        const Item item(args, index);
        const bool mine = (item.list != nullptr) == listed;
        blocks[index] = static_cast<uint16_t>(!mine ? 0 : listed ? 1 : item.count());
    }
    if (listed) {
        wait_for_previous_kernel();  // now the lists are there
#pragma unroll 1
        for (int index = threadIdx.x; index < items; index += blockDim.x) {
            if (blocks[index] == 0) continue;
            blocks[index] = static_cast<uint16_t>(__ldcg(args.list_counts + index));
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        cut_items(blocks, starts, items, workers, listed ? static_cast<int>(args.held_back) : 0,
                  listed ? kLeastListed : kLeastBlocks);
    }
    // Items with nothing to read give zeros.
#pragma unroll 1
    for (int index = place; index < items; index += workers) {
        if (blocks[index] != 0) continue;
        const Item item(args, index);
        if ((item.list != nullptr) == listed) clear<Strip, kDim>(args, item);
    }
    __syncthreads();
    const int pieces = starts[items];
    const int ctas = min(pieces, workers);
    if (place < ctas) {
        const Shares shares(pieces, ctas);
        int piece = shares.start(place);
        const int end = shares.start(place + 1);
        while (piece < end) {
            const int index = item_of(starts, items, piece);
            const Item item(args, index);
            const int start = starts[index], stop = starts[index + 1], until = min(end, stop);
            attend<Strip, kDim>(args, item, piece_start(piece - start, stop - start, blocks[index]),
                                piece_start(until - start, stop - start, blocks[index]), shared);
            __syncthreads();
            const bool complete = piece == start && until == stop;
            merge_warps<Strip, kDim>(args, item, complete, part_of(place, listed, piece == start),
                                     shared);
            if (!complete) {
                const int first = shares.owner(start), last = shares.owner(stop - 1);
                if (arrive(args.item_done + index, 1, static_cast<uint32_t>(last - first + 1),
                           flag)) {
                    merge_parts<Strip, kDim>(args, item, first, last, shared);
                }
            }
            __syncthreads();  // the rings are free for the next item
            piece = until;
        }
    }
    __syncthreads();
}

template <typename Strip, int kDim>
__global__ void __launch_bounds__(kMaxWarps * 32, Strip::kResidentCtas)
    sparse_decode_kernel(const __grid_constant__ DecodeArgs args) {
    DYNAMIC_SHARED(shared);
    const int ctas = gridDim.x, cta = blockIdx.x, held = static_cast<int>(args.held_back);
    // CTAs start in their order, as they find room: the first take windows, then come those for lists.
    const bool holds_back = cta >= held && cta < 2 * held;
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
        const bool listed = phase == 1;
        if (listed ? args.lists == nullptr : holds_back) continue;
        const int place = listed ? (holds_back ? cta - held : cta < held ? cta + held : cta)
                                 : (cta < held ? cta : cta - held);
        attend_items<Strip, kDim>(args, listed, place, listed ? ctas : ctas - held, shared);
    }
}

// A kernel and what it takes of a CTA's shared memory.
struct DecodeKernel {
    void (*run)(DecodeArgs) = nullptr;
    int fixed_bytes = 0;
    int warp_bytes = 0;
};

template <typename Strip, int kDim>
DecodeKernel describe() {
    return {sparse_decode_kernel<Strip, kDim>, Layout<Strip, kDim>::bytes(0),
            Layout<Strip, kDim>::kRingBytes};
}

// For groups of at most `heads` query heads.
DecodeKernel find_kernel(int64_t data_type, int64_t head_dim, int64_t heads) {
    if (data_type == kBfloat16 && heads <= 8) {
        if (head_dim == 64) return describe<Bfloat16Strip<64, 1>, 64>();
        if (head_dim == 128) return describe<Bfloat16Strip<128, 1>, 128>();
    } else if (data_type == kBfloat16) {
        if (head_dim == 64) return describe<Bfloat16Strip<64, 2>, 64>();
        if (head_dim == 128) return describe<Bfloat16Strip<128, 2>, 128>();
    } else if (data_type == kFloat32) {
        if (head_dim == 64) return describe<Float32Strip<64>, 64>();
        if (head_dim == 128) return describe<Float32Strip<128>, 128>();
    }
    return {};
}

}  // namespace
}  // namespace rtpurbo

using namespace rtpurbo;

// How to launch for a data type, head_dim and groups of at most `heads` query heads on the current
// device. To be called before the first launch there: it also allows the kernel its shared memory.
extern "C" int rtpurbo_decode_plan(int64_t data_type, int64_t head_dim, int64_t heads,
                                   DecodePlan* plan) {
    const DecodeKernel kernel = find_kernel(data_type, head_dim, heads);
    if (kernel.run == nullptr) return cudaErrorInvalidValue;
    int device = 0, multiprocessors = 0, most_bytes = 0, resident = 0, major = 0;
    if (int error = cudaGetDevice(&device)) return error;
    if (int error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                           device)) {
        return error;
    }
    if (int error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                           device)) {
        return error;
    }
    if (int error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) {
        return error;
    }
    plan->overlap = major >= 9;
    const int warps = (most_bytes - kernel.fixed_bytes) / kernel.warp_bytes;
    if (warps < 1) return cudaErrorInvalidConfiguration;
    plan->warps = warps < kMaxWarps ? warps : kMaxWarps;
    plan->shared_bytes = kernel.fixed_bytes + plan->warps * kernel.warp_bytes;
    if (int error = cudaFuncSetAttribute(kernel.run, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(plan->shared_bytes))) {
        return error;
    }
    if (int error = cudaFuncSetAttribute(kernel.run, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared)) {
        return error;
    }
    if (int error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &resident, kernel.run, static_cast<int>(plan->warps * 32),
            static_cast<size_t>(plan->shared_bytes))) {
        return error;
    }
    plan->ctas = static_cast<int64_t>(multiprocessors) * resident;
    return cudaSuccess;
}

extern "C" int rtpurbo_sparse_decode(const DecodeArgs* args, void* stream) {
    const DecodeKernel kernel = find_kernel(args->data_type, args->head_dim, args->tile_heads);
    if (kernel.run == nullptr || args->rows * args->group_count > kMaxItems ||
        args->block_tokens % kStripTokens != 0) {
        return cudaErrorInvalidValue;
    }
    return launch(kernel.run, dim3(static_cast<unsigned>(args->ctas)),
                  static_cast<int>(args->warps * 32), static_cast<int>(args->shared_bytes), stream,
                  *args, args->overlap != 0);
}
