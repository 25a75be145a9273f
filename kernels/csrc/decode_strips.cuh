// Attention of a CTA's warps to the blocks of one item: each finds strips of its own, copies them
// into its ring, the next ones while it attends to the last, and leaves one result.
#pragma once

#include "args.h"
#include "decode_item.cuh"
#include "decode_layout.cuh"
#include "device.cuh"
#include "numbers.cuh"
#include "partition.cuh"
#include "strip.cuh"

namespace rtpurbo {

// Strips of an item's blocks [begin, end), numbered from 0.
struct Strips {
    int begin, end;
    int count;

    DEVICE Strips(const DecodeArgs& args, int begin, int end)
        : begin(begin),
          end(end),
          count((end - begin) * (static_cast<int>(args.block_tokens) / kStripTokens)) {}
};

// What had to be loaded to find a strip: its block, with the slots that selected it, and its page.
struct LookedUp {
    ListEntry entry;
    int page;
    int offset;  // of its first token in the page
};

// Strip `index` behind the start of block number `begin`. Any will do from block `limit` on, as will an
// entry of a list that is not there yet, as long as it is read within bounds.
DEVICE LookedUp look_up(const DecodeArgs& args, const Item& item, const Source& source, int begin,
                        int limit, int index) {
    const int block = divide(index, args.by_strips);
    const int per_block = static_cast<int>(args.block_tokens) / kStripTokens;
    LookedUp found;
    found.entry = item.read(max(min(begin + block, limit - 1), 0));
    if (item.list != nullptr) {
        found.entry.block = static_cast<int>(min(static_cast<uint32_t>(found.entry.block),
                                                 static_cast<uint32_t>(args.list_width - 1)));
    }
    found.offset = (index - block * per_block) * kStripTokens;
    found.page = source.pages[static_cast<int64_t>(found.entry.block) * source.page_words];
    return found;
}

// A strip and where it lies.
struct Target {
    int first;       // position of its first token, -1: nobody sees it
    uint32_t heads;  // slots that selected its block
    int64_t token;   // its first, counted in the cache

    DEVICE Target(const DecodeArgs& args, const Item& item, const Source& source,
                  const LookedUp& found, bool is_there)
        : heads(found.entry.heads),
          token(static_cast<int64_t>(found.page) * source.page_rows + source.first_row +
                static_cast<uint32_t>(found.offset)) {
        const int begin = found.entry.block * static_cast<int>(args.block_tokens) + found.offset;
        // The window sees the strip if it sees the strip's newest token.
        const int last = min(begin + kStripTokens, item.context) - 1;
        const bool near = begin < static_cast<int>(args.sinks) ||
                          item.context - 1 - last < static_cast<int>(args.window);
        const bool seen =
            is_there && begin < item.context && (heads != 0 || (item.local != 0 && near));
        first = seen ? begin : -1;
    }

    // That of another lane.
    DEVICE Target(const Target& own, int lane)
        : first(__shfl_sync(kAllLanes, own.first, lane)),
          heads(__shfl_sync(kAllLanes, own.heads, lane)),
          token(__shfl_sync(kAllLanes, own.token, lane)) {}
};

// Copies a warp's strip of keys and values; tokens past the context become zeros, since memory that
// was never written may hold NaN, which a weight of zero does not silence.
template <typename Strip, int kDim>
DEVICE void copy_strip(const Source& source, const Target& target, int context,
                       unsigned char* stage, int lane) {
    using Element = typename Strip::Element;
    constexpr int kHalfBytes = DecodeLayout<Strip, kDim>::kHalfBytes;
    constexpr int kRows = 32 / Strip::kChunks;  // of tokens, that a warp copies at once
    const int row = lane / Strip::kChunks, column = lane % Strip::kChunks;
    const int64_t offset =
        target.token * kDim * static_cast<int64_t>(sizeof(Element)) + lane * 16;
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

// Which strips a warp takes: number `first`, and every `step`th after it.
struct Turns {
    int first, step;

    DEVICE int of(int count) const { return first < count ? divide(count - first - 1, step) + 1 : 0; }
};

// Attention of this warp to its turns of an item's strips: leaves the result in its ring and its
// statistics in shared memory. Strips are looked up 32 at once, a lane each, the first of them by the
// caller; `meanwhile` is called while the first copies are on their way.
template <typename Strip, int kDim, typename Meanwhile>
DEVICE void attend(const DecodeArgs& args, const Item& item, const Source& source,
                   const Strips& strips, Turns turns, const LookedUp& looked_up,
                   unsigned char* shared, Meanwhile meanwhile) {
    using Layout = DecodeLayout<Strip, kDim>;
    using Element = typename Strip::Element;
    constexpr int kStages = Layout::kStages;
    const int thread = from_here(threadIdx.x), warp = thread / 32, lane = thread % 32;
    unsigned char* ring = shared + Layout::kRing + warp * Layout::kRingBytes;
    InFlight* in_flight = reinterpret_cast<InFlight*>(shared + Layout::kInFlight) + warp * kStages;
    float* scratch =
        reinterpret_cast<float*>(shared + Layout::kScratch) + warp * Strip::kScratchFloats;
    const int count = turns.of(strips.count);
    Strip strip;
    strip.name_heads(*item.group, lane);
    // Of turn `lane` of the 32 that are copied now.
    Target held(args, item, source, looked_up, lane < count);
    // Every call closes a group of copies, empty or not, so that waiting can count them.
    const auto copy = [&](int turn, int stage) {
        int first = -1;
        uint32_t heads = 0;
        if (turn < count) {
            if (turn != 0 && turn % 32 == 0) {
                const int ahead = turn + lane;
                held = Target(args, item, source,
                              look_up(args, item, source, strips.begin, strips.end,
                                      turns.first + ahead * turns.step),
                              ahead < count);
            }
            const Target target(held, turn % 32);
            first = target.first;
            heads = target.heads;
            if (first >= 0) {
                copy_strip<Strip, kDim>(source, target, item.context,
                                        ring + stage * 2 * Layout::kHalfBytes, lane);
            }
        }
        if (lane == 0) in_flight[stage] = {first, heads};
        copy_async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) copy(stage, stage);
    strip.begin(static_cast<const Element*>(args.queries) + item.row * args.query_row_stride,
                args.query_head_stride, *item.group, scratch);
    meanwhile();
    int stage = 0;
    for (int turn = 0; turn < count; ++turn) {
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
                       static_cast<float>(args.scale) * kLog2E<float>, scratch);
        }
        __syncwarp();
        copy(turn + kStages, stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    copy_async_wait<0>();
    __syncwarp();
    strip.end(reinterpret_cast<float*>(ring),
              reinterpret_cast<Stats*>(shared + Layout::kStats) + warp * kTileHeads);
}

}  // namespace rtpurbo
