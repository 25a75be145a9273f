// Attention of one query token per row over paged caches, all head roles of a layer in one launch.
//
// An item is a row and a group: a KV head with the query heads that read it (decode_item.cuh). Its
// blocks come from a list (some head selected them, or a local head sees them), from the window rule,
// or are all of the context; each is read once for all heads of the group. Items are cut into pieces.
// Of many items a CTA takes each piece (decode_shares.cuh), of few a cluster of CTAs (decode_cluster.cuh).
// Inside a CTA every warp attends to strips of its own (decode_strips.cuh), the next ones on their way.
// An item of several pieces leaves partial results, and whoever completes it merges them in the order of
// the pieces (decode_merge.cuh, decode_gather.cuh): the same inputs give the same bits. Bound by memory
// bandwidth on keys and values; with few rows by the chain of loads that depend on each other, so CTAs
// are small, several on a multiprocessor, and each does one thing.
//
// Of the workers, CTAs or clusters, some take items with lists only, at the same time as the others
// attend to the window. After index_select the kernel may be started early (`overlap`): the others then
// work while blocks are still being chosen, and only those with lists wait. Long lists are shared out
// over all workers.

#include "args.h"
#include "clusters.cuh"
#include "decode_cluster.cuh"
#include "decode_layout.cuh"
#include "decode_shares.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "strip.cuh"
#include "strip_bfloat16.cuh"
#include "strip_float32.cuh"

namespace rtpurbo {
namespace {

// Shared memory is enough for three; a cluster has use for the registers of a fourth.
template <typename Strip, bool kClusters>
constexpr int kResident = kClusters && Strip::kResidentCtas > 3 ? 3 : Strip::kResidentCtas;

template <typename Strip, int kDim, bool kClusters>
__global__ void __launch_bounds__(kMaxWarps * 32, kResident<Strip, kClusters>)
    sparse_decode_kernel(const __grid_constant__ DecodeArgs args) {
    DYNAMIC_SHARED(shared);
    let_next_kernel_start();
    // A worker is a cluster or a CTA.
    const int ranks = log2_of(kClusters ? cluster_size() : 1);
    const int workers = gridDim.x >> ranks, worker = blockIdx.x >> ranks;
    const int held = static_cast<int>(args.held_back);
    if constexpr (kClusters) {
        using Layout = DecodeLayout<Strip, kDim>;
        if (threadIdx.x == 0) {
            deliveries_init(reinterpret_cast<uint64_t*>(shared + Layout::kArrived));
        }
        cluster_start();
    }
    int round = 0;
    // They start in their order, as they find room: the first take windows, then come those for lists.
    const int first = min(held, workers - held);
    const bool holds_back = worker >= first && worker < first + held;
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
        const bool listed = phase == 1;
        if (listed ? args.lists == nullptr : holds_back) continue;
        const int place = listed ? (holds_back       ? worker - first
                                    : worker < first ? worker + held
                                                     : worker)
                                 : (worker < first ? worker : worker - held);
        const int count = listed ? workers : workers - held;
        if constexpr (kClusters) {
            round = attend_few<Strip, kDim>(args, listed, place, count, round, shared);
        } else {
            attend_items<Strip, kDim>(args, listed, place, count, shared);
        }
    }
}

using Kernel = void (*)(DecodeArgs);

// Kernels for one type of data, and what they take of a CTA's shared memory.
struct DecodeKernels {
    Kernel alone = nullptr, clusters = nullptr;
    int fixed_bytes = 0;
    int warp_bytes = 0;
};

template <typename Strip, int kDim>
DecodeKernels describe() {
    return {sparse_decode_kernel<Strip, kDim, false>, sparse_decode_kernel<Strip, kDim, true>,
            DecodeLayout<Strip, kDim>::bytes(0), DecodeLayout<Strip, kDim>::kRingBytes};
}

// For groups of at most `heads` query heads.
DecodeKernels find_kernels(int64_t data_type, int64_t head_dim, int64_t heads) {
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
    const DecodeKernels kernels = find_kernels(data_type, head_dim, heads);
    if (kernels.alone == nullptr) return cudaErrorInvalidValue;
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
    const int warps = (most_bytes - kernels.fixed_bytes) / kernels.warp_bytes;
    if (warps < 1) return cudaErrorInvalidConfiguration;
    plan->warps = warps < kMaxWarps ? warps : kMaxWarps;
    plan->shared_bytes = kernels.fixed_bytes + plan->warps * kernels.warp_bytes;
    const int threads = static_cast<int>(plan->warps * 32);
    const int shared_bytes = static_cast<int>(plan->shared_bytes);
    if (int error = allow_shared(kernels.alone, shared_bytes)) return error;
    if (int error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &resident, kernels.alone, threads, static_cast<size_t>(shared_bytes))) {
        return error;
    }
    plan->ctas = static_cast<int64_t>(multiprocessors) * resident;
    plan->clusters_of_8 = plan->clusters_of_16 = 0;
    if (major < 9) return cudaSuccess;
    return plan_clusters(kernels.clusters, threads, shared_bytes, *plan);
}

extern "C" int rtpurbo_sparse_decode(const DecodeArgs* args, void* stream) {
    const DecodeKernels kernels = find_kernels(args->data_type, args->head_dim, args->tile_heads);
    const bool in_clusters = args->cluster != 0;  // one CTA is none: launched as such, it could not wait
    const int64_t most = in_clusters ? kFewItems : kMaxItems;
    if (kernels.alone == nullptr || args->rows * args->group_count > most ||
        args->block_tokens % kStripTokens != 0 || args->cluster == 1 || args->cluster > kMaxRanks) {
        return cudaErrorInvalidValue;
    }
    if (args->held_back * (in_clusters ? args->cluster : 1) >= args->ctas) return cudaErrorInvalidValue;
    DecodeArgs given = *args;
    given.by_groups = divisor_of(args->group_count);
    given.by_tokens = divisor_of(args->block_tokens);
    given.by_strips = divisor_of(args->block_tokens / kStripTokens);
    return launch(in_clusters ? kernels.clusters : kernels.alone,
                  dim3(static_cast<unsigned>(given.ctas)), static_cast<int>(given.warps * 32),
                  static_cast<int>(given.shared_bytes), stream, given, given.overlap != 0,
                  in_clusters ? static_cast<int>(given.cluster) : 1,
                  static_cast<int>(given.placement));
}
