// From partial results to the output where pieces are attended to by clusters: a CTA adds up some columns
// of all heads, first over the CTAs of its cluster, through their shared memory, and where an item has
// several pieces then over these, as soon as all clusters have left the same columns.
#pragma once

#include "args.h"
#include "clusters.cuh"
#include "cta.cuh"
#include "decode_item.cuh"
#include "decode_layout.cuh"
#include "decode_merge.cuh"
#include "device.cuh"
#include "numbers.cuh"
#include "strip.cuh"

namespace rtpurbo {

constexpr int kSumLanes = 4;  // that add up one float4
constexpr int kSumAtOnce = 4;  // addends that each has on their way

// Columns are dealt to the CTAs of a cluster in chunks: place p of a rank is float4 number p % 4 of its
// chunk p / 4.
template <int kDim>
struct Columns {
    static constexpr int kQuads = kChunkColumns / 4;
    int count;  // float4s of all heads
    int ranks;  // a power of two

    DEVICE int places() const {  // of a rank
        return ((count / kQuads + ranks - 1) >> log2_of(ranks)) * kQuads;
    }
    DEVICE int own(int rank) const {  // of those, that there are
        return ((count / kQuads + ranks - 1 - rank) >> log2_of(ranks)) * kQuads;
    }
    DEVICE int rank_of(int quad) const { return (quad / kQuads) & (ranks - 1); }
    DEVICE int place_of(int quad) const {
        return ((quad / kQuads) >> log2_of(ranks)) * kQuads + quad % kQuads;
    }
    DEVICE int quad_at(int rank, int place) const {
        return (((place / kQuads) << log2_of(ranks)) + rank) * kQuads + place % kQuads;
    }
};

// Gives every CTA of the cluster its columns of what the warps of this one have.
template <typename Strip, int kDim>
DEVICE void give_columns(int heads, Columns<kDim> columns, unsigned char* shared) {
    using Layout = DecodeLayout<Strip, kDim>;
    const int rank = cluster_rank(), places = columns.places();
    float4* given = reinterpret_cast<float4*>(shared + Layout::kGiven) + rank * places;
    float2* stats = reinterpret_cast<float2*>(shared + Layout::kGivenStats) + rank * heads;
    uint64_t* arrived = reinterpret_cast<uint64_t*>(shared + Layout::kArrived);
    if (threadIdx.x == 0) {
        const int bytes = columns.own(rank) * static_cast<int>(sizeof(float4)) +
                          heads * static_cast<int>(sizeof(float2));
        deliveries_expect(arrived, bytes * columns.ranks);
    }
#pragma unroll 1
    for (int quad = threadIdx.x; quad < columns.count; quad += blockDim.x) {
        const int slot = quad / (kDim / 4), column = quad % (kDim / 4) * 4;
        const Partial found = sum_of_warps<Strip, kDim>(shared, slot, column);
        deliver(given + columns.place_of(quad), columns.rank_of(quad), found.total, arrived);
        // All need a head's statistics: as many neighbours as there are CTAs have them at hand.
        const int to = quad % (kDim / 4);
        if (to < columns.ranks) {
            deliver(stats + slot, to, make_float2(found.stats.most, found.stats.sum), arrived);
        }
    }
}

// The sum of partial results `number`s [0, count), the same in the lanes that share the work.
template <typename StatsOf, typename TotalOf>
DEVICE Partial sum_of(int count, StatsOf stats_of, TotalOf total_of) {
    const int own = threadIdx.x % kSumLanes;
    Partial sum = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), {-INFINITY, 0.0f}};
    const auto refer = [&](float most) {
        const float factor = exp2_fast(sum.stats.most - reference_of(most));
        sum.stats = {most, sum.stats.sum * factor};
        sum.total.x *= factor;
        sum.total.y *= factor;
        sum.total.z *= factor;
        sum.total.w *= factor;
    };
#pragma unroll 1
    for (int base = own; base < count; base += kSumLanes * kSumAtOnce) {
        Partial next[kSumAtOnce];
        float most = sum.stats.most;
#pragma unroll
        for (int i = 0; i < kSumAtOnce; ++i) {
            const int number = base + i * kSumLanes;
            next[i] = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), {-INFINITY, 0.0f}};
            if (number < count) {
                const float2 stats = stats_of(number);
                next[i] = {total_of(number), {stats.x, stats.y}};
            }
        }
#pragma unroll
        for (int i = 0; i < kSumAtOnce; ++i) most = fmaxf(most, next[i].stats.most);
        refer(most);
#pragma unroll
        for (int i = 0; i < kSumAtOnce; ++i) {
            const float weight = exp2_fast(next[i].stats.most - reference_of(most));
            sum.stats.sum = fmaf(weight, next[i].stats.sum, sum.stats.sum);
            add_scaled(sum.total, weight, next[i].total);
        }
    }
    float most = sum.stats.most;
#pragma unroll
    for (int step = 1; step < kSumLanes; step *= 2) {
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
    }
    refer(most);
#pragma unroll
    for (int step = 1; step < kSumLanes; step *= 2) {
        sum.stats.sum += __shfl_xor_sync(kAllLanes, sum.stats.sum, step);
        sum.total.x += __shfl_xor_sync(kAllLanes, sum.total.x, step);
        sum.total.y += __shfl_xor_sync(kAllLanes, sum.total.y, step);
        sum.total.z += __shfl_xor_sync(kAllLanes, sum.total.z, step);
        sum.total.w += __shfl_xor_sync(kAllLanes, sum.total.w, step);
    }
    return sum;
}

// Calls `put(slot, column, sum)` in one thread for each of this CTA's float4s; `sum_at` is called by
// whole warps, also for places that are not there.
template <int kDim, typename SumAt, typename Put>
DEVICE void for_own_columns(Columns<kDim> columns, SumAt sum_at, Put put) {
    const int rank = cluster_rank(), places = columns.places(), each = blockDim.x / kSumLanes;
#pragma unroll 1
    for (int base = 0; base < places; base += each) {
        const int place = base + threadIdx.x / kSumLanes, quad = columns.quad_at(rank, place);
        const bool is_there = place < places && quad < columns.count;
        const int slot = is_there ? quad / (kDim / 4) : 0, column = quad % (kDim / 4) * 4;
        const Partial sum = sum_at(slot, column, is_there ? place : 0);
        if (is_there && threadIdx.x % kSumLanes == 0) put(slot, column, sum);
    }
}

// Part of a piece: of items with and without lists, since a cluster may be ahead of the others.
HOST_DEVICE constexpr int64_t part_of_piece(int piece, bool listed) { return piece * 2 + listed; }

// Merges what the CTAs of this cluster have of piece `piece`, one of [first, first + pieces) of an item:
// into `out` if it is the only one, else into a part, and all parts once they are there. `round` counts
// the pieces of this cluster, all of whose threads have waited for its start.
template <typename Strip, int kDim>
DEVICE void merge_cluster(const DecodeArgs& args, const Item& item, int piece, int first, int pieces,
                          int round, unsigned char* shared) {
    using Layout = DecodeLayout<Strip, kDim>;
    using Element = typename Strip::Element;
    constexpr int kChunks = kDim / kChunkColumns;
    const bool listed = item.list != nullptr;
    const Columns<kDim> columns{item.heads * (kDim / 4), cluster_size()};
    const int places = columns.places();
    const float4* given = reinterpret_cast<const float4*>(shared + Layout::kGiven);
    const float2* given_stats = reinterpret_cast<const float2*>(shared + Layout::kGivenStats);
    const int* heads = reinterpret_cast<const int*>(shared + Layout::kHeads);
    float4* totals = reinterpret_cast<float4*>(args.partial);
    float2* stats = reinterpret_cast<float2*>(args.partial_stats);
    const auto store_out = [&](int slot, int column, const Partial& sum) {
        Element* out = static_cast<Element*>(args.out) + item.row * args.out_row_stride +
                       heads[slot] * args.out_head_stride;
        store_whole(out + column, sum);
    };
    __syncthreads();
    if (round > 0) {  // all are done with what they were given before
        cluster_arrive();
        cluster_wait();
    }
    give_columns<Strip, kDim>(item.heads, columns, shared);
    deliveries_wait(reinterpret_cast<uint64_t*>(shared + Layout::kArrived), round);
    for_own_columns(
        columns,
        [&](int slot, int, int place) {
            return sum_of(
                columns.ranks,
                [&](int rank) { return given_stats[rank * item.heads + slot]; },
                [&](int rank) { return given[rank * places + place]; });
        },
        [&](int slot, int column, const Partial& sum) {
            if (pieces == 1) {
                store_out(slot, column, sum);
                return;
            }
            const int64_t at = part_of_piece(piece, listed) * kTileHeads + slot;
            totals[at * (kDim / 4) + column / 4] = sum.total;
            if (column % kChunkColumns == 0) {
                stats[at * kChunks + column / kChunkColumns] =
                    make_float2(sum.stats.most, sum.stats.sum);
            }
        });
    if (pieces == 1) return;
    uint32_t* counter = args.item_done + item.index * kMaxRanks + cluster_rank();
    int* flag = reinterpret_cast<int*>(shared + Layout::kFlag);
    if (!arrive(counter, 1, static_cast<uint32_t>(pieces), flag)) return;
    for_own_columns(
        columns,
        [&](int slot, int column, int) {
            const auto at = [&](int number) {
                return part_of_piece(first + number, listed) * kTileHeads + slot;
            };
            return sum_of(
                pieces,
                [&](int number) {
                    return __ldcg(stats + at(number) * kChunks + column / kChunkColumns);
                },
                [&](int number) {
                    return __ldcg(totals + at(number) * (kDim / 4) + column / 4);
                });
        },
        store_out);
}

}  // namespace rtpurbo
