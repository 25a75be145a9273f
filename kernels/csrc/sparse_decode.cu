// Attention of one query token per row over paged caches, all head roles of a layer in one launch.
//
// An item is a row and a group: a KV head with the query heads that read it (decode_item.cuh). Its
// blocks come from a list (some head selected them, or a local head sees them), from the window rule,
// or are all of the context; each is read once for all heads of the group. Items are cut into pieces,
// a CTA each (partition.cuh). Inside a CTA every warp attends to strips of its own (decode_strips.cuh),
// the next ones on their way. An item of several pieces leaves partial results, and the CTA that
// completes it merges them in the order of the pieces (decode_merge.cuh): the same inputs give the same
// bits. Bound by memory bandwidth on keys and values; with few rows by the chain of loads that depend
// on each other, so CTAs are small, several on a multiprocessor, and each does one thing.
//
// Of the CTAs some take items with lists only, at the same time as the others attend to the window.
// After index_select the kernel may be started early (`overlap`): the others then work while blocks
// are still being chosen, and only those with lists wait. Long lists are shared out over all CTAs.

#include "args.h"
#include "cta.cuh"
#include "decode_item.cuh"
#include "decode_layout.cuh"
#include "decode_merge.cuh"
#include "decode_strips.cuh"
#include "device.cuh"
#include "partition.cuh"

namespace rtpurbo {
namespace {

// Blocks of a piece at least. A merge of more pieces takes longer than their blocks: a window of 8192
// tokens makes 26, which are merged in one go.
constexpr int kLeastBlocks = 5, kLeastListed = 2;
constexpr int kListedAlone = 8;  // blocks, for each CTA that takes items with lists only

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
    using Layout = DecodeLayout<Strip, kDim>;
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
    return {sparse_decode_kernel<Strip, kDim>, DecodeLayout<Strip, kDim>::bytes(0),
            DecodeLayout<Strip, kDim>::kRingBytes};
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
