// Attention of a CTA's warps to the blocks of one item: each finds strips of its own, copies them
// into its ring, the next ones while it attends to the last, and leaves one result.
#pragma once

#include "args.h"
#include "decode_item.cuh"
#include "decode_layout.cuh"
#include "device.cuh"
#include "partition.cuh"
#include "strip.cuh"

namespace rtpurbo {

constexpr float kLog2E = 1.4426950408889634f;

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
    constexpr int kHalfBytes = DecodeLayout<Strip, kDim>::kHalfBytes;
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
    using Layout = DecodeLayout<Strip, kDim>;
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

}  // namespace rtpurbo
