// The indexer in one launch: scores of all index keys, and the top-p choice of blocks.
//
// All blocks of all rows and heads are one line of units, cut into equal shares, a CTA each. A warp
// scores four blocks at a time (index_score.cuh), reading whole keys in 16-byte pieces; where registers
// suffice, as with int8 keys, it looks up the pages of the next four meanwhile. No share is smaller than
// that, so that short contexts leave multiprocessors to the attention that starts meanwhile. The CTA
// that completes a row's head chooses that head's blocks from the log masses (block_choice.cuh); the one
// that completes the heads of a group writes the list of blocks that sparse_decode.cu reads
// (block_list.cuh). Masses are summed as integers, so neither depends on who came last. Bytes read once:
// index keys; bound by memory bandwidth. A single row has index_cluster.cu.

#include "args.h"
#include "block_choice.cuh"
#include "block_list.cuh"
#include "cta.cuh"
#include "device.cuh"
#include "index_cluster.h"
#include "index_keys.cuh"
#include "index_score.cuh"
#include "launch.cuh"
#include "partition.cuh"
#include "selection.cuh"

namespace rtpurbo {
namespace {

constexpr int kMostKept = 16384;  // by a CTA: contexts of 1M tokens
// Of a share: as long as a single unit takes.
constexpr int kLeastUnits = kSelectWarps * kBlocksAtOnce;

DEVICE void write_group_list(const SelectArgs& args, int64_t row, int group_index,
                             SelectScratch& scratch) {
    const SelectedWords selected{args.words + row * args.heads * args.words_width,
                                 args.words_width};
    const int64_t at = row * args.group_count + group_index;
    const WindowBlocks window =
        window_blocks(args.context_lens[row], args.block_tokens, args.window, args.sinks);
    const int count = write_list(selected, args.groups[group_index], window,
                                 args.lists + at * args.width, scratch.list);
    if (threadIdx.x == 0) args.list_counts[at] = count;
}

// The selection of a head whose scores are complete, and the list of a group whose heads are.
// `kept` has room for args.most_kept log masses.
DEVICE void finish(const SelectArgs& args, int64_t row, int64_t head, float* kept,
                   SelectScratch& scratch) {
    choose(args, row, head, kept, scratch);
    if (args.groups == nullptr) return;
    const int group = args.group_of_head[head];
    const uint32_t heads = __popc(args.groups[group].retrieval);
    if (arrive(args.group_done + row * args.group_count + group, 1, heads, &scratch.flag)) {
        write_group_list(args, row, group, scratch);
    }
}

template <typename Keys>
__global__ void __launch_bounds__(kSelectThreads, 2)
    index_select_kernel(const __grid_constant__ SelectArgs args) {
    DYNAMIC_SHARED(dynamic);
    __shared__ SelectScratch scratch;
    wait_for_previous_kernel();  // so the next, which may start now, need not wait for that one
    let_next_kernel_start();
    int64_t* starts = reinterpret_cast<int64_t*>(dynamic);
    const int rows = static_cast<int>(args.rows);
    fill_starts(starts, rows, [&](int row) { return scored_blocks(args, row) * args.heads; });
    if (blockIdx.x == 0 && args.attended != nullptr) {
        for (int64_t at = threadIdx.x; at < args.rows * args.heads; at += kSelectThreads) {
            if (scored_blocks(args, at / args.heads) == 0) args.attended[at] = 0;
        }
    }
    const int64_t total = starts[rows];
    const int64_t ctas = working_ctas(total, gridDim.x, kLeastUnits);
    if (blockIdx.x >= ctas) return;
    int64_t unit = share_start(blockIdx.x, total, ctas);
    int left = static_cast<int>(share_start(blockIdx.x + 1, total, ctas) - unit);
    while (left > 0) {
        const uint32_t row = static_cast<uint32_t>(item_of(starts, rows, unit));
        const int blocks = scored_blocks(args, row);
        const uint32_t of_row = static_cast<uint32_t>(unit - starts[row]);  // 2^32 fit no GPU
        const uint32_t head = of_row / static_cast<uint32_t>(blocks);
        const int first = static_cast<int>(of_row - head * static_cast<uint32_t>(blocks));
        const int count = min(left, blocks - first);
        score<Keys>(args, row, head, first, count);
        if (args.words != nullptr && arrive(args.head_done + row * args.heads + head,
                                            static_cast<uint32_t>(count),
                                            static_cast<uint32_t>(blocks), &scratch.flag)) {
            finish(args, row, head, reinterpret_cast<float*>(starts + rows + 1), scratch);
            __syncthreads();
        }
        unit += count;
        left -= count;
    }
}

// Selection alone, from log masses that are there: a CTA per (head, row).
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const __grid_constant__ SelectArgs args) {
    DYNAMIC_SHARED(dynamic);
    __shared__ SelectScratch scratch;
    finish(args, blockIdx.y, blockIdx.x, reinterpret_cast<float*>(dynamic), scratch);
}

// Lists alone, from masks that are there: a CTA per (group, row).
__global__ void __launch_bounds__(kSelectThreads)
    list_kernel(const __grid_constant__ SelectArgs args) {
    __shared__ SelectScratch scratch;
    const int64_t row = blockIdx.y;
    const int blocks = blocks_of(args, row);
    const Group& group = args.groups[blockIdx.x];
    for (int slot = 0; slot < group.heads; ++slot) {
        if (!(group.retrieval >> slot & 1)) continue;
        const int64_t at = row * args.heads + group.selected[slot];
        for (int base = 0; base < blocks; base += kSelectThreads) {
            const int block = base + threadIdx.x;
            const bool keep = block < blocks && args.mask[at * args.width + block] != 0;
            const uint32_t word = __ballot_sync(kAllLanes, keep);
            if (threadIdx.x % 32 == 0 && block < blocks) {
                args.words[at * args.words_width + block / 32] = word;
            }
        }
    }
    __threadfence();
    __syncthreads();
    write_group_list(args, row, blockIdx.x, scratch);
}

SelectKernel find_kernel(const SelectArgs& args) {
    return kernel_for_keys(args, [](auto keys) { return index_select_kernel<decltype(keys)>; });
}

// Log masses that a launch keeps: of its longest row, as far as `bytes` of shared memory go.
int64_t kept_masses(int64_t width, int64_t bytes) {
    const int64_t wanted = (width + kSelectThreads - 1) / kSelectThreads * kSelectThreads;
    const int64_t room = bytes / static_cast<int64_t>(kSelectThreads * sizeof(float)) * kSelectThreads;
    return wanted < room ? wanted : room < 0 ? 0 : room;
}

}  // namespace
}  // namespace rtpurbo

using namespace rtpurbo;

extern "C" int rtpurbo_index_select(const SelectArgs* args, void* stream) {
    if (args->cluster != 0 && suits_clusters(*args)) return launch_index_cluster(*args, stream);
    const SelectKernel kernel = find_kernel(*args);
    if (kernel == nullptr || args->rows > kMaxItems) return cudaErrorInvalidValue;
    const int64_t start_bytes = (args->rows + 1) * static_cast<int64_t>(sizeof(int64_t));
    SelectArgs given = *args;
    given.most_kept = kept_masses(args->width, args->shared_bytes - start_bytes);
    const int64_t bytes = start_bytes + given.most_kept * static_cast<int64_t>(sizeof(float));
    return launch(kernel, dim3(static_cast<unsigned>(args->ctas)), kSelectThreads,
                  static_cast<int>(bytes), stream, given, given.overlap != 0);
}

extern "C" int rtpurbo_select(const SelectArgs* args, void* stream) {
    const dim3 grid(static_cast<unsigned>(args->heads), static_cast<unsigned>(args->rows));
    SelectArgs given = *args;
    given.most_kept = kept_masses(args->width, args->shared_bytes);
    const int bytes = static_cast<int>(given.most_kept * static_cast<int64_t>(sizeof(float)));
    return launch(select_kernel, grid, kSelectThreads, bytes, stream, given);
}

extern "C" int rtpurbo_list(const SelectArgs* args, void* stream) {
    const dim3 grid(static_cast<unsigned>(args->group_count), static_cast<unsigned>(args->rows));
    return launch(list_kernel, grid, kSelectThreads, 0, stream, *args);
}

// How to launch for a type of keys and index_dim on the current device. To be called before the
// first launch there: it also allows the kernel that much shared memory.
extern "C" int rtpurbo_select_plan(const SelectArgs* args, SelectPlan* plan) {
    const SelectKernel kernel = find_kernel(*args);
    if (kernel == nullptr) return cudaErrorInvalidValue;
    int device = 0, multiprocessors = 0, resident = 0, most_bytes = 0;
    if (int error = cudaGetDevice(&device)) return error;
    if (int error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                           device)) {
        return error;
    }
    // The attention that starts meanwhile needs shared memory, which a busy multiprocessor does not
    // take from its L1 cache.
    if (int error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared)) {
        return error;
    }
    if (int error = cudaDeviceGetAttribute(
            &most_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)) {
        return error;
    }
    // Half a multiprocessor each, of which the system takes 1 KiB.
    constexpr int kStartBytes = (kMaxItems + 1) * static_cast<int>(sizeof(int64_t));
    const int room = most_bytes / 2 - 1024 - static_cast<int>(sizeof(SelectScratch));
    const int most = kStartBytes + kMostKept * static_cast<int>(sizeof(float));
    plan->shared_bytes = room < kStartBytes ? kStartBytes : room < most ? room : most;
    if (int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(plan->shared_bytes))) {
        return error;
    }
    if (int error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &resident, kernel, kSelectThreads, static_cast<size_t>(plan->shared_bytes))) {
        return error;
    }
    plan->ctas = static_cast<int64_t>(multiprocessors) * resident;
    return plan_index_cluster(*args, *plan);
}
