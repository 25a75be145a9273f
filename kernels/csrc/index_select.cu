// The indexer in one launch: scores of all index keys, and the top-p choice of blocks.
//
// All blocks of all rows and heads are one line of units, cut into equal shares, a CTA each. A warp
// scores four blocks at a time, reading whole keys in 16-byte pieces; no share is smaller than that,
// so that short contexts leave multiprocessors to the attention that starts meanwhile. The CTA that completes a row's
// head chooses that head's blocks from the log masses; the one that completes the heads of a group
// writes the list of blocks that sparse_decode.cu reads. Masses are summed as integers, so neither
// depends on who came last. Bytes read once: index keys; bound by memory bandwidth.

#include "args.h"
#include "block_list.cuh"
#include "cta.cuh"
#include "device.cuh"
#include "partition.cuh"
#include "selection.cuh"

namespace rtpurbo {
namespace {

constexpr int kThreads = 256;  // one a bin
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksAtOnce = 4;
constexpr int kLoadsAtOnce = 4;  // 16 bytes a lane and block
constexpr int kMassesKept = 8;     // log masses that a thread keeps from pass to pass
constexpr int kMassesAtOnce = 16;  // and that it reads before it uses them, of those that follow
constexpr int kLeastUnits = kWarps * kBlocksAtOnce;  // of a share: as long as a single unit takes
constexpr int kReplicas = 8;     // of the histogram, so that few lanes meet in one bin
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

static_assert(kThreads == kBins && kThreads == kListThreads, "a thread is a bin and a word");

struct Histogram {
    // Masses in two halves of 16 bits, since shared memory adds 32-bit integers natively.
    uint32_t high[kBins * kReplicas];
    uint32_t low[kBins * kReplicas];
};

struct SelectScratch {
    union {
        Histogram histogram;
        ListScratch list;
    };
    uint64_t sums[kWarps];
    float most[kWarps];
    int flag;
};

// Elements of a 16-byte piece as floats.
DEVICE void unpack(uint4 raw, float (&out)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = bits_to_float(words[i] << 16);
        out[2 * i + 1] = bits_to_float(words[i] & 0xffff0000u);
    }
}

DEVICE void unpack(uint4 raw, float (&out)[4]) {
    out[0] = bits_to_float(raw.x);
    out[1] = bits_to_float(raw.y);
    out[2] = bits_to_float(raw.z);
    out[3] = bits_to_float(raw.w);
}

DEVICE int blocks_of(const SelectArgs& args, int64_t row) {
    const int64_t context = args.context_lens[row];
    return static_cast<int>((context + args.block_tokens - 1) / args.block_tokens);
}

// Blocks to score: none in a row that is short enough to be attended densely.
DEVICE int scored_blocks(const SelectArgs& args, int64_t row) {
    return args.context_lens[row] < args.dense_below ? 0 : blocks_of(args, row);
}

// Log masses of blocks [first, first + count) of one row and head. kLanes lanes share a key.
template <int kElements, int kLanes>
DEVICE void score(const SelectArgs& args, int64_t row, int64_t head, int first, int count) {
    constexpr int kTokens = 32 / kLanes;  // of one load by the warp
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int block_tokens = static_cast<int>(args.block_tokens);
    const int loads = ceil_div(block_tokens, kTokens);
    const int64_t context = args.context_lens[row];
    const int64_t index_row = args.index_row[head];
    const uint4* cache = static_cast<const uint4*>(args.index_cache);

    float query[kElements];
    const int64_t query_at = row * args.query_row_stride + head * args.query_head_stride;
    constexpr int kElementBytes = 16 / kElements;
    unpack(*reinterpret_cast<const uint4*>(static_cast<const char*>(args.queries) +
                                           query_at * kElementBytes + (lane % kLanes) * 16),
           query);
#pragma unroll
    for (int e = 0; e < kElements; ++e) query[e] *= kLog2E;

    for (int base = warp; base < count; base += kWarps * kBlocksAtOnce) {
        uint32_t place[kBlocksAtOnce];  // page * index_rows + index_row
        int valid[kBlocksAtOnce];       // tokens
        float largest[kBlocksAtOnce], sum[kBlocksAtOnce];
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; ++u) {
            // Always a load, so that all are under way together; past the end any will do.
            const int index = min(base + u * kWarps, count - 1);
            const int64_t page = page_of(args.table, row, first + index);
            place[u] = static_cast<uint32_t>(page * args.index_rows + index_row);
            largest[u] = -INFINITY;
            sum[u] = 0.0f;
        }
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; ++u) {
            const int index = base + u * kWarps;
            const int64_t left = context - static_cast<int64_t>(first + index) * block_tokens;
            valid[u] = index >= count ? 0 : left < block_tokens ? static_cast<int>(left) : block_tokens;
        }
        for (int load = 0; load < loads; load += kLoadsAtOnce) {
            uint4 raw[kBlocksAtOnce][kLoadsAtOnce];
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
                const uint4* keys = cache + static_cast<int64_t>(place[u]) * block_tokens * kLanes;
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    const int token = (load + i) * kTokens + lane / kLanes;
                    raw[u][i] = load_streaming(keys + (token < valid[u] ? (load + i) * 32 + lane : 0));
                }
            }
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
                float scores[kLoadsAtOnce];
                float most = largest[u];
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    float key[kElements];
                    unpack(raw[u][i], key);
                    float dot = 0.0f;
#pragma unroll
                    for (int e = 0; e < kElements; ++e) dot = fmaf(key[e], query[e], dot);
#pragma unroll
                    for (int step = 1; step < kLanes; step *= 2) {
                        dot += __shfl_xor_sync(kAllLanes, dot, step);
                    }
                    const int token = (load + i) * kTokens + lane / kLanes;
                    scores[i] = token < valid[u] ? dot : -INFINITY;
                    most = fmaxf(most, scores[i]);
                }
                const float reference = most == -INFINITY ? 0.0f : most;
                float total = sum[u] * exp2_fast(largest[u] - reference);
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) total += exp2_fast(scores[i] - reference);
                largest[u] = most;
                sum[u] = total;
            }
        }
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; ++u) {
            const float most = warp_max(largest[u]);
            const float reference = most == -INFINITY ? 0.0f : most;
            // The lanes of a key hold the same score, so each was counted kLanes times.
            const float total =
                warp_sum(sum[u] * exp2_fast(largest[u] - reference)) * (1.0f / kLanes);
            const int index = base + u * kWarps;
            if (lane == 0 && index < count) {
                args.log_mass[(row * args.heads + head) * args.width + first + index] =
                    (reference + log2f(total)) * kLn2;
            }
        }
    }
}

// The bin up to which blocks are kept, and the log mass that bins are counted from.
struct Threshold {
    int bin;
    float most;
};

// Log masses of a row and head, for several passes over them: thread t has those of blocks t,
// t + kThreads and so on. Loads go in batches, and the first one stays in registers: this is one
// CTA's work while the others are done, so latency is all that counts.
struct Masses {
    const float* log_mass;
    int blocks;
    float kept[kMassesKept];

    DEVICE Masses(const float* of_head, int count) : log_mass(of_head), blocks(count) {
        load(0, kept);
    }

    // Always loads, so that all are under way together; past the end any will do.
    template <int kCount>
    DEVICE void load(int base, float (&masses)[kCount]) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int block = base + i * kThreads + static_cast<int>(threadIdx.x);
            masses[i] = __ldcg(log_mass + min(block, blocks - 1));
        }
    }

    template <int kCount, typename Use>
    DEVICE void use_batch(int base, const float (&masses)[kCount], Use use) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int block = base + i * kThreads + static_cast<int>(threadIdx.x);
            if (base + i * kThreads < blocks) {
                use(block, block < blocks ? finite_or_none(masses[i]) : -INFINITY);
            }
        }
    }

    // Calls use(block, log mass) for all blocks; threads stay together, and get no mass past the end.
    template <typename Use>
    DEVICE void for_each(Use use) const {
        use_batch(0, kept, use);
        for (int base = kThreads * kMassesKept; base < blocks; base += kThreads * kMassesAtOnce) {
            float masses[kMassesAtOnce];
            load(base, masses);
            use_batch(base, masses, use);
        }
    }
};

DEVICE Threshold find_threshold(const Masses& masses, float top_p, SelectScratch& scratch) {
    const int thread = threadIdx.x;
    float most = -FLT_MAX;
    masses.for_each([&](int, float mass) { most = fmaxf(most, mass); });
    most = cta_max(most, scratch.most);

    Histogram& histogram = scratch.histogram;
    for (int i = thread; i < kBins * kReplicas; i += kThreads) {
        histogram.high[i] = 0;
        histogram.low[i] = 0;
    }
    __syncthreads();
    masses.for_each([&](int, float log_mass) {
        const float below = most - log_mass;
        const uint64_t mass = fixed_mass(below);
        if (mass != 0) {
            const int place = mass_bin(below) * kReplicas + thread % kReplicas;
            atomicAdd(&histogram.high[place], static_cast<uint32_t>(mass >> 16));
            atomicAdd(&histogram.low[place], static_cast<uint32_t>(mass & 0xffffu));
        }
    });
    __syncthreads();
    uint64_t cumulative = 0;
    for (int i = 0; i < kReplicas; ++i) {
        const int place = thread * kReplicas + i;
        cumulative += (static_cast<uint64_t>(histogram.high[place]) << 16) + histogram.low[place];
    }
    uint64_t total = 0;
    cumulative = cta_running_sum(cumulative, scratch.sums, total);
    const double wanted = wanted_mass(top_p, total);
    const int bin = __syncthreads_count(static_cast<double>(cumulative) < wanted);
    return {top_p >= 1.0f || bin > kBins - 1 ? kBins - 1 : bin, most};
}

// Chooses the blocks of one row and head from its log masses.
DEVICE void choose(const SelectArgs& args, int64_t row, int64_t head, SelectScratch& scratch) {
    const int thread = threadIdx.x, lane = thread % 32;
    const int blocks = blocks_of(args, row);
    const int64_t at = row * args.heads + head;
    const Masses masses(args.log_mass + at * args.width, blocks);
    float top_p = args.top_p[row * args.top_p_row_stride + head * args.top_p_head_stride];
    if (args.own_top_p != nullptr && !isnan(args.own_top_p[row])) top_p = args.own_top_p[row];
    const Threshold threshold = find_threshold(masses, top_p, scratch);

    uint32_t* words = args.words + at * args.words_width;
    uint8_t* mask = args.mask == nullptr ? nullptr : args.mask + at * args.width;
    uint64_t kept_blocks = 0;
    masses.for_each([&](int block, float mass) {
        const bool inside = block < blocks;
        const bool keep = inside && (mass_bin(threshold.most - mass) <= threshold.bin ||
                                     is_forced(block, blocks));
        const uint32_t word = __ballot_sync(kAllLanes, keep);
        if (lane == 0 && inside) words[block / 32] = word;
        if (lane == 0) kept_blocks += __popc(word);
        if (inside && mask != nullptr) mask[block] = keep;
    });
    if (mask != nullptr) {
        for (int64_t block = blocks + thread; block < args.width; block += kThreads) mask[block] = 0;
    }
    uint64_t total = 0;
    cta_running_sum(kept_blocks, scratch.sums, total);
    if (thread == 0 && args.attended != nullptr) {
        // The newest block is always kept, and the only one that may be partial.
        const int64_t kept = static_cast<int64_t>(total) * args.block_tokens;
        args.attended[at] = kept - (blocks * args.block_tokens - args.context_lens[row]);
    }
}

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
DEVICE void finish(const SelectArgs& args, int64_t row, int64_t head, SelectScratch& scratch) {
    choose(args, row, head, scratch);
    if (args.groups == nullptr) return;
    const int group = args.group_of_head[head];
    const uint32_t heads = __popc(args.groups[group].retrieval);
    if (arrive(args.group_done + row * args.group_count + group, 1, heads, &scratch.flag)) {
        write_group_list(args, row, group, scratch);
    }
}

template <int kElements, int kLanes>
__global__ void __launch_bounds__(kThreads, 2)
    index_select_kernel(const __grid_constant__ SelectArgs args) {
    DYNAMIC_SHARED(dynamic);
    __shared__ SelectScratch scratch;
    let_next_kernel_start();
    int64_t* starts = reinterpret_cast<int64_t*>(dynamic);
    const int rows = static_cast<int>(args.rows);
    fill_starts(starts, rows, [&](int row) { return scored_blocks(args, row) * args.heads; });
    if (blockIdx.x == 0 && args.attended != nullptr) {
        for (int64_t at = threadIdx.x; at < args.rows * args.heads; at += kThreads) {
            if (scored_blocks(args, at / args.heads) == 0) args.attended[at] = 0;
        }
    }
    const int64_t total = starts[rows];
    const int64_t ctas = working_ctas(total, gridDim.x, kLeastUnits);
    if (blockIdx.x >= ctas) return;
    int64_t unit = share_start(blockIdx.x, total, ctas);
    const int64_t end = share_start(blockIdx.x + 1, total, ctas);
    while (unit < end) {
        const int row = item_of(starts, rows, unit);
        const int blocks = scored_blocks(args, row);
        const int64_t head = (unit - starts[row]) / blocks;
        const int first = static_cast<int>((unit - starts[row]) % blocks);
        const int count = static_cast<int>(min(end - unit, static_cast<int64_t>(blocks - first)));
        score<kElements, kLanes>(args, row, head, first, count);
        if (args.words != nullptr && arrive(args.head_done + row * args.heads + head,
                                            static_cast<uint32_t>(count),
                                            static_cast<uint32_t>(blocks), &scratch.flag)) {
            finish(args, row, head, scratch);
            __syncthreads();
        }
        unit += count;
    }
}

// Selection alone, from log masses that are there: a CTA per (head, row).
__global__ void __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ SelectArgs args) {
    __shared__ SelectScratch scratch;
    finish(args, blockIdx.y, blockIdx.x, scratch);
}

// Lists alone, from masks that are there: a CTA per (group, row).
__global__ void __launch_bounds__(kThreads)
    list_kernel(const __grid_constant__ SelectArgs args) {
    __shared__ SelectScratch scratch;
    const int64_t row = blockIdx.y;
    const int blocks = blocks_of(args, row);
    const Group& group = args.groups[blockIdx.x];
    for (int slot = 0; slot < group.heads; ++slot) {
        if (!(group.retrieval >> slot & 1)) continue;
        const int64_t at = row * args.heads + group.selected[slot];
        for (int base = 0; base < blocks; base += kThreads) {
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

using SelectKernel = void (*)(SelectArgs);

// The kernel for a data type and index_dim, or null.
SelectKernel find_kernel(const SelectArgs& args) {
    if (args.data_type == kBfloat16) {
        if (args.index_dim == 8) return index_select_kernel<8, 1>;
        if (args.index_dim == 16) return index_select_kernel<8, 2>;
        if (args.index_dim == 32) return index_select_kernel<8, 4>;
    } else if (args.data_type == kFloat32) {
        if (args.index_dim == 8) return index_select_kernel<4, 2>;
        if (args.index_dim == 16) return index_select_kernel<4, 4>;
        if (args.index_dim == 32) return index_select_kernel<4, 8>;
    }
    return nullptr;
}

}  // namespace
}  // namespace rtpurbo

using namespace rtpurbo;

extern "C" int rtpurbo_index_select(const SelectArgs* args, void* stream) {
    const SelectKernel kernel = find_kernel(*args);
    if (kernel == nullptr || args->rows > kMaxItems) return cudaErrorInvalidValue;
    const int shared_bytes = static_cast<int>((args->rows + 1) * sizeof(int64_t));
    return launch(kernel, dim3(static_cast<unsigned>(args->ctas)), kThreads, shared_bytes, stream,
                  *args);
}

extern "C" int rtpurbo_select(const SelectArgs* args, void* stream) {
    const dim3 grid(static_cast<unsigned>(args->heads), static_cast<unsigned>(args->rows));
    return launch(select_kernel, grid, kThreads, 0, stream, *args);
}

extern "C" int rtpurbo_list(const SelectArgs* args, void* stream) {
    const dim3 grid(static_cast<unsigned>(args->group_count), static_cast<unsigned>(args->rows));
    return launch(list_kernel, grid, kThreads, 0, stream, *args);
}

// CTAs that fill the current device.
extern "C" int rtpurbo_select_ctas(const SelectArgs* args, int64_t* ctas) {
    const SelectKernel kernel = find_kernel(*args);
    if (kernel == nullptr) return cudaErrorInvalidValue;
    int device = 0, multiprocessors = 0, resident = 0;
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
    const size_t shared_bytes = (kMaxItems + 1) * sizeof(int64_t);
    if (int error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads,
                                                                  shared_bytes)) {
        return error;
    }
    *ctas = static_cast<int64_t>(multiprocessors) * resident;
    return cudaSuccess;
}
