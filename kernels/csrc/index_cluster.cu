// The indexer of a single row in one launch: a cluster of CTAs for each head, which score its blocks
// (index_ring.cuh) and choose among them (cluster_choice.cuh) without a trip to memory.
//
// The first CTA of a cluster ends with the list of the head's group; the others make room for the
// attention that starts meanwhile. If other heads select for the group, the last of them writes the
// list, from words in memory. A single row's launch gives the same bits as index_select.cu.

#include <cfloat>

#include "args.h"
#include "block_choice.cuh"
#include "cluster_choice.cuh"
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

int shared_bytes(int64_t width, int ranks) {
    return static_cast<int>(sizeof(ClusterShared)) + ClusterArrays::bytes(width, ranks);
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
    for (int rank = 0; rank < kMaxRanks; ++rank) {
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
    if (kernel == nullptr || ranks > kMaxRanks) return cudaErrorInvalidValue;
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
