// The top-p choice of blocks of a single row's head by a cluster, from the log masses that its CTAs have.
//
// Twice all CTAs of the cluster wait for each other: the largest log mass must be known before masses are
// counted in bins, and all bins before one is the last that is kept. They write to each other's shared
// memory: every CTA its largest mass to all, then its bins, and their masses, to the first. That one
// alone goes on, from bins to words to the list of the head's group. What is summed and compared is what
// block_choice.cuh sums and compares, so both give the same bits.
#pragma once

#include "args.h"
#include "block_choice.cuh"
#include "block_list.cuh"
#include "clusters.cuh"
#include "cta.cuh"
#include "device.cuh"
#include "index_ring.cuh"
#include "partition.cuh"
#include "selection.cuh"

namespace rtpurbo {

constexpr int kClusterCopies = 4;  // of the histogram

// Shared memory of a CTA, followed by what depends on the launch.
struct ClusterShared {
    alignas(128) unsigned char rings[kSelectWarps][kRingBytes];
    Histogram<kClusterCopies> histogram;
    uint64_t sums[kSelectWarps];
    float most[kSelectWarps];
    float peaks[kMaxRanks];  // largest log mass of each CTA
    Group group;
    ListScratch list;
    int flag;
};

// The rest. What other CTAs write to lies apart from the rings: copies and writes of two CTAs never
// share a place, so no order of theirs matters but that of the cluster's barriers.
struct ClusterArrays {
    uint64_t* gathered;  // [ranks, kBins] masses of each CTA, in the first one
    float* masses;       // log masses of this CTA's blocks
    uint8_t* bins;       // of all blocks, in the first one
    uint32_t* words;     // of blocks that are kept, in the first one

    DEVICE ClusterArrays(ClusterShared& shared, int64_t width, Dealt dealt) {
        const int words_each = dealt.words(static_cast<int>(width));
        gathered = reinterpret_cast<uint64_t*>(&shared + 1);
        masses = reinterpret_cast<float*>(gathered + dealt.ranks * kBins);
        bins = reinterpret_cast<uint8_t*>(masses + words_each * kWordBlocks);
        words = reinterpret_cast<uint32_t*>(bins + words_each * dealt.ranks * kWordBlocks);
    }

    static int bytes(int64_t width, int ranks) {
        const int words_each = Dealt{0, ranks}.words(static_cast<int>(width));
        const int own = kWordBlocks * static_cast<int>(sizeof(float));
        const int of_all = ranks * (kWordBlocks + static_cast<int>(sizeof(uint32_t)));
        return ranks * kBins * static_cast<int>(sizeof(uint64_t)) + words_each * (own + of_all);
    }
};

// Largest log mass of the head, from the `most` of this thread's blocks. Begins to wait for the cluster;
// `meanwhile` may load what is needed later.
template <typename Meanwhile>
DEVICE float largest_of_cluster(float most, Dealt dealt, ClusterShared& shared,
                                Meanwhile meanwhile) {
    const int thread = threadIdx.x;
    most = largest_of_warp(most);
    if (thread % 32 == 0) shared.most[thread / 32] = most;
    __syncthreads();
    cluster_wait();  // all have started
    if (thread < dealt.ranks) {
        float peak = shared.most[0];
#pragma unroll
        for (int warp = 1; warp < kSelectWarps; ++warp) peak = fmaxf(peak, shared.most[warp]);
        *in_cluster(shared.peaks + dealt.rank, thread) = peak;
    }
    cluster_arrive();
    meanwhile();
    cluster_wait();
    float largest = shared.peaks[0];
#pragma unroll
    for (int rank = 1; rank < kMaxRanks; ++rank) {
        if (rank < dealt.ranks) largest = fmaxf(largest, shared.peaks[rank]);
    }
    return largest;
}

// Leaves bins of this CTA's blocks, and their masses, with the first CTA.
DEVICE void give_bins(float largest, int blocks, Dealt dealt, ClusterShared& shared,
                      const ClusterArrays& arrays) {
    const int thread = threadIdx.x;
    const int places = dealt.words(blocks) * kWordBlocks;
    uint8_t* bins = in_cluster(arrays.bins, 0);
    for (int place = thread * 4; place < places; place += kSelectThreads * 4) {
        const float4 four = *reinterpret_cast<const float4*>(arrays.masses + place);
        const float masses[4] = {four.x, four.y, four.z, four.w};
        uint32_t packed = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float below = largest - masses[i];
            const uint64_t mass = fixed_mass(below);
            const int bin = mass_bin(below);
            if (mass != 0) shared.histogram.add(bin, mass);
            packed |= static_cast<uint32_t>(bin) << 8 * i;
        }
        const int block = dealt.block(place);
        if (block < blocks) *reinterpret_cast<uint32_t*>(bins + block) = packed;
    }
    __syncthreads();
    *in_cluster(arrays.gathered + dealt.rank * kBins + thread, 0) = shared.histogram.sum();
}

// Blocks of bins up to `last` and those that are kept anyway, as words; how many this thread has.
DEVICE int keep_words(const SelectArgs& args, int64_t head, int blocks, int last,
                      const ClusterArrays& arrays) {
    int kept = 0;
    for (int word = threadIdx.x; word * kWordBlocks < blocks; word += kSelectThreads) {
        const uint4* bins = reinterpret_cast<const uint4*>(arrays.bins + word * kWordBlocks);
        const uint4 low = bins[0], high = bins[1];
        const uint32_t fours[8] = {low.x,  low.y,  low.z,  low.w,
                                   high.x, high.y, high.z, high.w};
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            bits |= bytes_up_to(fours[i], static_cast<uint32_t>(last)) << 4 * i;
        }
        const int left = blocks - word * kWordBlocks;
        if (left < kWordBlocks) bits &= (1u << left) - 1;
        bits |= forced_bits(word, blocks);
        arrays.words[word] = bits;
        args.words[head * args.words_width + word] = bits;
        kept += __popc(bits);
    }
    __syncthreads();
    return kept;
}

// The list of a head's group, unless another head of the group is to write it.
DEVICE void write_own_list(const SelectArgs& args, int64_t head, int group, int context,
                           ClusterShared& shared, const uint32_t* words) {
    const uint32_t heads = __popc(static_cast<uint32_t>(shared.group.retrieval));
    if (heads > 1 && !arrive(args.group_done + group, 1, heads, &shared.flag)) return;
    const SelectedWords selected{args.words, args.words_width, static_cast<int>(head),
                                 words};
    const WindowBlocks window = window_blocks(context, args.block_tokens, args.window, args.sinks);
    const int count = write_list(selected, shared.group, window, args.lists + group * args.width,
                                 shared.list);
    if (threadIdx.x == 0) args.list_counts[group] = count;
}

}  // namespace rtpurbo
