// The indexer of a single row in one launch: a cluster of CTAs for each head, which score its blocks
// (index_ring.cuh) and choose among them without a trip to memory.
//
// Twice all CTAs of a cluster wait for each other: the largest log mass must be known before masses are
// counted in bins, and all bins before one is the last that is kept. They write to each other's shared
// memory: every CTA its largest mass to all, then its bins, and their masses, to the first. That one
// alone goes on, from bins to words to the list of the head's group; the others make room for the
// attention that starts meanwhile. If other heads select for the group, the last of them writes the
// list, from words in memory. What is summed and compared is what index_select.cu sums and compares,
// so both give the same bits.

#include "args.h"
#include "block_choice.cuh"
#include "block_list.cuh"
#include "clusters.cuh"
#include "cta.cuh"
#include "device.cuh"
#include "index_cluster.h"
#include "index_keys.cuh"
#include "index_ring.cuh"
#include "launch.cuh"
#include "partition.cuh"
#include "selection.cuh"

namespace rtpurbo {
namespace {

constexpr int kMostRanks = 16;
constexpr int kClusterCopies = 4;  // of the histogram

// Shared memory of a CTA, followed by what depends on the launch.
struct ClusterShared {
    alignas(128) unsigned char rings[kSelectWarps][kRingBytes];
    Histogram<kClusterCopies> histogram;
    uint64_t sums[kSelectWarps];
    float most[kSelectWarps];
    float peaks[kMostRanks];  // largest log mass of each CTA
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

int shared_bytes(int64_t width, int ranks) {
    return static_cast<int>(sizeof(ClusterShared)) + ClusterArrays::bytes(width, ranks);
}

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
    for (int rank = 1; rank < kMostRanks; ++rank) {
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

template <typename Keys>
__global__ void __launch_bounds__(kSelectThreads, 2)
    index_cluster_kernel(const __grid_constant__ SelectArgs args) {
    DYNAMIC_SHARED(dynamic);
    cluster_start();
    wait_for_previous_kernel();  // so the next, which may start now, need not wait for that one
    let_next_kernel_start();
    ClusterShared& shared = *reinterpret_cast<ClusterShared*>(dynamic);
    const int thread = threadIdx.x;
    const Dealt dealt{cluster_rank(), cluster_size()};
    const ClusterArrays arrays(shared, args.width, dealt);
    const int64_t head = blockIdx.y;
    const bool is_first = dealt.rank == 0;
    DealtScores<Keys> scores(args, dealt, 0, head);
    const int group = args.groups == nullptr ? -1 : args.group_of_head[head];
    const int context = static_cast<int>(args.context_lens[0]);
    shared.histogram.clear();  // while these loads are under way
    const int block_tokens = static_cast<int>(args.block_tokens);
    const int blocks =
        context < args.dense_below ? 0 : divide(context + block_tokens - 1, block_tokens);
    if (blocks == 0) {
        if (is_first && thread == 0 && args.attended != nullptr) args.attended[head] = 0;
        return;
    }
    float most = -FLT_MAX;
    scores.run(context, blocks, shared.rings[thread / 32], [&](int place, int block, float mass) {
        const float finite = block < blocks ? finite_or_none(mass) : -INFINITY;
        if (thread % 16 == 0) arrays.masses[place] = finite;
        most = fmaxf(most, finite);
    });
    float share = 0.0f;
    int32_t group_word = 0;
    constexpr int kGroupWords = sizeof(Group) / sizeof(int32_t);
    const bool has_word = group >= 0 && thread < kGroupWords;
    const float largest = largest_of_cluster(most, dealt, shared, [&] {
        if (!is_first) return;
        share = wanted_share(args, 0, head);
        if (has_word) group_word = reinterpret_cast<const int32_t*>(args.groups + group)[thread];
    });
    give_bins(largest, blocks, dealt, shared, arrays);
    cluster_arrive();
    if (!is_first) return;
    if (has_word) reinterpret_cast<int32_t*>(&shared.group)[thread] = group_word;
    cluster_wait();
    uint64_t mass = 0;
#pragma unroll
    for (int rank = 0; rank < kMostRanks; ++rank) {
        if (rank < dealt.ranks) mass += arrays.gathered[rank * kBins + thread];
    }
    const int last = threshold_bin(mass, share, shared.sums);
    const int kept = keep_words(args, head, blocks, last, arrays);
    if (group >= 0) write_own_list(args, head, group, context, shared, arrays.words);
    if (args.attended == nullptr) return;
    int total = 0;  // counted last: attention waits for the list, nobody for this
    cta_running_sum(kept, shared.list.sums, total);
    if (thread == 0) {
        args.attended[head] = tokens_of(total, blocks, args.block_tokens, context);
    }
}

SelectKernel find_kernel(const SelectArgs& args) {
    return kernel_for_keys(args, [](auto keys) { return index_cluster_kernel<decltype(keys)>; });
}

}  // namespace

int launch_index_cluster(const SelectArgs& args, void* stream) {
    const SelectKernel kernel = find_kernel(args);
    const int ranks = static_cast<int>(args.cluster);
    if (kernel == nullptr || ranks > kMostRanks) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(ranks), static_cast<unsigned>(args.heads));
    return launch(kernel, grid, kSelectThreads, shared_bytes(args.width, ranks), stream,
                  args, args.overlap != 0, ranks);
}

int plan_index_cluster(const SelectArgs& args, SelectPlan& plan) {
    plan.clusters_of_8 = plan.clusters_of_16 = 0;
    const SelectKernel kernel = find_kernel(args);
    int device = 0, major = 0, most_bytes = 0;
    if (int error = cudaGetDevice(&device)) return error;
    if (int error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) {
        return error;
    }
    if (int error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                           device)) {
        return error;
    }
    const int bytes = shared_bytes(kMaxBlocks, 8);
    if (kernel == nullptr || major < 9 || bytes > most_bytes) return cudaSuccess;
    return plan_clusters(kernel, kSelectThreads, bytes, plan);
}

}  // namespace rtpurbo
