// The indexer in one launch: scores of all index keys, and the top-p choice of blocks.
//
// All blocks of all rows and heads are one line of units, cut into equal shares, a CTA each. A warp
// scores four blocks at a time, reading whole keys in 16-byte pieces; of int8 ones, which come with
// scales, it looks up the pages of the next four meanwhile. No share is smaller than that, so that short
// contexts leave multiprocessors to the attention that starts meanwhile. The CTA that completes a
// row's head chooses that head's blocks from the log masses; the one that completes the heads of a group
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
constexpr int kMassesToKeep = 32;  // log masses that a thread reads at once in the first pass,
constexpr int kMassesAtOnce = 8;   // and in the others, of those that were not kept
constexpr int kMostKept = 16384;   // by a CTA: contexts of 1M tokens
constexpr int kLeastUnits = kWarps * kBlocksAtOnce;  // of a share: as long as a single unit takes
constexpr int kReplicas = 16;    // of the histogram, so that few lanes meet in one bin
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
DEVICE void unpack_bfloat16(uint4 raw, float* out) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = bits_to_float(words[i] << 16);
        out[2 * i + 1] = bits_to_float(words[i] & 0xffff0000u);
    }
}

DEVICE void unpack_float32(uint4 raw, float* out) {
    out[0] = bits_to_float(raw.x);
    out[1] = bits_to_float(raw.y);
    out[2] = bits_to_float(raw.z);
    out[3] = bits_to_float(raw.w);
}

DEVICE void unpack_int8(uint32_t word, float* out) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(static_cast<int8_t>(word >> 8 * i));
}

// How index keys lie in the cache: kLanes lanes share one, each with a piece of kElements, and a
// lane has kLoadsAtOnce pieces of a block under way, as many as registers hold.
template <int kDim>
struct Bfloat16Keys {
    using Piece = uint4;
    static constexpr int kElements = 8, kLanes = kDim / kElements;
    static constexpr int kLoadsAtOnce = kLanes == 1 ? 2 : 4;
    static constexpr bool kScaled = false;
    static DEVICE void unpack(Piece raw, float* out) { unpack_bfloat16(raw, out); }
};

template <int kDim>
struct Float32Keys {
    using Piece = uint4;
    static constexpr int kElements = 4, kLanes = kDim / kElements, kLoadsAtOnce = 2;
    static constexpr bool kScaled = false;
    static DEVICE void unpack(Piece raw, float* out) { unpack_float32(raw, out); }
};

template <int kDim>
struct Int8Keys {
    using Piece = uint4;
    static constexpr int kElements = 16, kLanes = kDim / kElements, kLoadsAtOnce = 2;
    static constexpr bool kScaled = true;
    static DEVICE void unpack(Piece raw, float* out) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) unpack_int8(words[i], out + 4 * i);
    }
};

template <>
struct Int8Keys<8> {
    using Piece = uint2;
    static constexpr int kElements = 8, kLanes = 1, kLoadsAtOnce = 2;
    static constexpr bool kScaled = true;
    static DEVICE void unpack(Piece raw, float* out) {
        unpack_int8(raw.x, out);
        unpack_int8(raw.y, out + 4);
    }
};

// Elements [at, at + kElements) of the queries, times log2(e).
template <int kElements>
DEVICE void load_query(const SelectArgs& args, int64_t at, float (&query)[kElements]) {
    if (args.data_type == kBfloat16) {
        const char* from = static_cast<const char*>(args.queries) + at * 2;
#pragma unroll
        for (int i = 0; i < kElements / 8; ++i) {
            unpack_bfloat16(reinterpret_cast<const uint4*>(from)[i], query + 8 * i);
        }
    } else {
        const char* from = static_cast<const char*>(args.queries) + at * 4;
#pragma unroll
        for (int i = 0; i < kElements / 4; ++i) {
            unpack_float32(reinterpret_cast<const uint4*>(from)[i], query + 4 * i);
        }
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) query[e] *= kLog2E;
}

DEVICE int blocks_of(const SelectArgs& args, int64_t row) {
    const int64_t context = args.context_lens[row];
    return static_cast<int>((context + args.block_tokens - 1) / args.block_tokens);
}

// Blocks to score: none in a row that is short enough to be attended densely.
DEVICE int scored_blocks(const SelectArgs& args, int64_t row) {
    return args.context_lens[row] < args.dense_below ? 0 : blocks_of(args, row);
}

// Log masses of blocks [first, first + count) of one row and head.
template <typename Keys>
DEVICE void score(const SelectArgs& args, int64_t row, int64_t head, int first, int count) {
    using Piece = typename Keys::Piece;
    constexpr int kElements = Keys::kElements, kLanes = Keys::kLanes;
    constexpr int kTokens = 32 / kLanes;  // of one load by the warp
    constexpr int kLoadsAtOnce = Keys::kLoadsAtOnce;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int block_tokens = static_cast<int>(args.block_tokens);
    const int loads = ceil_div(block_tokens, kTokens);
    const int end = static_cast<int>(args.context_lens[row]) - first * block_tokens;
    const int64_t index_row = args.index_row[head];
    const Piece* cache = static_cast<const Piece*>(args.index_cache);

    // Pages of the blocks that start at `base`, as page * index_rows + index_row. Always a load, so
    // that all are under way together; past the end any will do.
    const auto find_places = [&](int base, uint32_t(&place)[kBlocksAtOnce]) {
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; ++u) {
            const int64_t page = page_of(args.table, row, first + min(base + u * kWarps, count - 1));
            place[u] = static_cast<uint32_t>(page * args.index_rows + index_row);
        }
    };
    constexpr bool kLooksAhead = kLoadsAtOnce <= 2;  // else registers do not suffice
    uint32_t next[kBlocksAtOnce];
    if (kLooksAhead) find_places(warp, next);

    float query[kElements];
    load_query(args,
               row * args.query_row_stride + head * args.query_head_stride +
                   lane % kLanes * kElements,
               query);

    for (int base = warp; base < count; base += kWarps * kBlocksAtOnce) {
        uint32_t place[kBlocksAtOnce];
        float largest[kBlocksAtOnce], sum[kBlocksAtOnce];
#pragma unroll
        for (int u = 0; u < kBlocksAtOnce; ++u) {
            if (kLooksAhead) place[u] = next[u];
            largest[u] = -INFINITY;
            sum[u] = 0.0f;
        }
        if (kLooksAhead) {
            find_places(base + kWarps * kBlocksAtOnce, next);
        } else {
            find_places(base, place);
        }
        for (int load = 0; load < loads; load += kLoadsAtOnce) {
            Piece raw[kBlocksAtOnce][kLoadsAtOnce];
            uint16_t scale[kBlocksAtOnce][kLoadsAtOnce];
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
                const int64_t block_at = static_cast<int64_t>(place[u]) * block_tokens;
                const Piece* keys = cache + block_at * kLanes;
                const uint16_t* scales = args.index_scales + block_at;
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    // Never past the page; what lies past the context is not looked at below.
                    const int piece = min((load + i) * 32 + lane, block_tokens * kLanes - 1);
                    raw[u][i] = load_streaming(keys + piece);
                    if (Keys::kScaled) scale[u][i] = load_streaming(scales + piece / kLanes);
                }
            }
            // All loads are issued before the first is used: left alone, the compiler waits for some
            // of them halfway, to save registers. Products begin with the first word of a piece.
            uint32_t loaded = 0;
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    loaded ^= raw[u][i].x;
                    if (Keys::kScaled) loaded ^= scale[u][i];
                }
            }
            const uint32_t zero = zero_after(loaded);
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) raw[u][i].x ^= zero;
            }
#pragma unroll
            for (int u = 0; u < kBlocksAtOnce; ++u) {
                float scores[kLoadsAtOnce];
                float most = largest[u];
                const int index = base + u * kWarps;
                const int valid = index < count ? min(end - index * block_tokens, block_tokens) : 0;
#pragma unroll
                for (int i = 0; i < kLoadsAtOnce; ++i) {
                    float key[kElements];
                    Keys::unpack(raw[u][i], key);
                    float dot = 0.0f;
#pragma unroll
                    for (int e = 0; e < kElements; ++e) dot = fmaf(key[e], query[e], dot);
#pragma unroll
                    for (int step = 1; step < kLanes; step *= 2) {
                        dot += __shfl_xor_sync(kAllLanes, dot, step);
                    }
                    if (Keys::kScaled) {
                        dot *= bits_to_float(static_cast<uint32_t>(scale[u][i]) << 16);
                    }
                    const int token = (load + i) * kTokens + lane / kLanes;
                    scores[i] = token < valid ? dot : -INFINITY;
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

// Log masses of a row and head, for three passes over them; thread t has those of blocks t,
// t + kThreads and so on. The first pass reads them in batches and keeps what fits in shared memory:
// this is one CTA's work while the others are done, so latency is all that counts.
struct Masses {
    const float* log_mass;
    int blocks;
    float* kept;
    int most_kept;  // a multiple of kThreads

    // Blocks from `first` on, from memory. Always loads, so that those of a batch are under way
    // together; past the end any will do.
    template <int kAtOnce, typename Use>
    DEVICE void read(int first, Use use) const {
        for (int base = first; base < blocks; base += kThreads * kAtOnce) {
            float masses[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int block = base + i * kThreads + static_cast<int>(threadIdx.x);
                masses[i] = __ldcg(log_mass + min(block, blocks - 1));
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int block = base + i * kThreads + static_cast<int>(threadIdx.x);
                if (base + i * kThreads < blocks) {
                    use(block, block < blocks ? finite_or_none(masses[i]) : -INFINITY);
                }
            }
        }
    }

    // The first pass: the largest of this thread.
    DEVICE float keep() const {
        float most = -FLT_MAX;
        read<kMassesToKeep>(0, [&](int block, float mass) {
            if (block < most_kept) kept[block] = mass;
            most = fmaxf(most, mass);
        });
        return most;
    }

    // Another pass: use(block, log mass) for all blocks; threads stay together, and get no mass
    // past the end. No thread reads what another kept.
    template <typename Use>
    DEVICE void for_each(Use use) const {
        const int in_shared = min(blocks, most_kept);
#pragma unroll 4
        for (int base = 0; base < in_shared; base += kThreads) {
            const int block = base + static_cast<int>(threadIdx.x);
            use(block, kept[block]);
        }
        if (blocks > in_shared) read<kMassesAtOnce>(in_shared, use);
    }
};

DEVICE Threshold find_threshold(const Masses& masses, float top_p, SelectScratch& scratch) {
    const int thread = threadIdx.x;
    Histogram& histogram = scratch.histogram;
    for (int i = thread; i < kBins * kReplicas; i += kThreads) {
        histogram.high[i] = 0;
        histogram.low[i] = 0;
    }
    const float most = cta_max(masses.keep(), scratch.most);
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
        // Each lane begins elsewhere: bins are a multiple of the banks apart.
        const int place = thread * kReplicas + (i + thread / 2) % kReplicas;
        cumulative += (static_cast<uint64_t>(histogram.high[place]) << 16) + histogram.low[place];
    }
    uint64_t total = 0;
    cumulative = cta_running_sum(cumulative, scratch.sums, total);
    const double wanted = wanted_mass(top_p, total);
    const int bin = __syncthreads_count(static_cast<double>(cumulative) < wanted);
    return {top_p >= 1.0f || bin > kBins - 1 ? kBins - 1 : bin, most};
}

// Chooses the blocks of one row and head from its log masses.
DEVICE void choose(const SelectArgs& args, int64_t row, int64_t head, float* kept,
                   SelectScratch& scratch) {
    const int thread = threadIdx.x, lane = thread % 32;
    const int blocks = blocks_of(args, row);
    const int64_t at = row * args.heads + head;
    const Masses masses{args.log_mass + at * args.width, blocks, kept,
                        static_cast<int>(args.most_kept)};
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
        score<Keys>(args, row, head, first, count);
        if (args.words != nullptr && arrive(args.head_done + row * args.heads + head,
                                            static_cast<uint32_t>(count),
                                            static_cast<uint32_t>(blocks), &scratch.flag)) {
            finish(args, row, head, reinterpret_cast<float*>(starts + rows + 1), scratch);
            __syncthreads();
        }
        unit += count;
    }
}

// Selection alone, from log masses that are there: a CTA per (head, row).
__global__ void __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ SelectArgs args) {
    DYNAMIC_SHARED(dynamic);
    __shared__ SelectScratch scratch;
    finish(args, blockIdx.y, blockIdx.x, reinterpret_cast<float*>(dynamic), scratch);
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

template <template <int> typename Keys>
SelectKernel kernel_of(int64_t index_dim) {
    if (index_dim == 8) return index_select_kernel<Keys<8>>;
    if (index_dim == 16) return index_select_kernel<Keys<16>>;
    if (index_dim == 32) return index_select_kernel<Keys<32>>;
    return nullptr;
}

// The kernel for a type of keys and index_dim, or null.
SelectKernel find_kernel(const SelectArgs& args) {
    if (args.key_type == kBfloat16) return kernel_of<Bfloat16Keys>(args.index_dim);
    if (args.key_type == kFloat32) return kernel_of<Float32Keys>(args.index_dim);
    if (args.key_type == kInt8) return kernel_of<Int8Keys>(args.index_dim);
    return nullptr;
}

// Log masses that a launch keeps: of its longest row, as far as `bytes` of shared memory go.
int64_t kept_masses(int64_t width, int64_t bytes) {
    const int64_t wanted = (width + kThreads - 1) / kThreads * kThreads;
    const int64_t room = bytes / static_cast<int64_t>(kThreads * sizeof(float)) * kThreads;
    return wanted < room ? wanted : room < 0 ? 0 : room;
}

}  // namespace
}  // namespace rtpurbo

using namespace rtpurbo;

extern "C" int rtpurbo_index_select(const SelectArgs* args, void* stream) {
    const SelectKernel kernel = find_kernel(*args);
    if (kernel == nullptr || args->rows > kMaxItems) return cudaErrorInvalidValue;
    const int64_t start_bytes = (args->rows + 1) * static_cast<int64_t>(sizeof(int64_t));
    SelectArgs given = *args;
    given.most_kept = kept_masses(args->width, args->shared_bytes - start_bytes);
    const int64_t bytes = start_bytes + given.most_kept * static_cast<int64_t>(sizeof(float));
    return launch(kernel, dim3(static_cast<unsigned>(args->ctas)), kThreads,
                  static_cast<int>(bytes), stream, given);
}

extern "C" int rtpurbo_select(const SelectArgs* args, void* stream) {
    const dim3 grid(static_cast<unsigned>(args->heads), static_cast<unsigned>(args->rows));
    SelectArgs given = *args;
    given.most_kept = kept_masses(args->width, args->shared_bytes);
    const int bytes = static_cast<int>(given.most_kept * static_cast<int64_t>(sizeof(float)));
    return launch(select_kernel, grid, kThreads, bytes, stream, given);
}

extern "C" int rtpurbo_list(const SelectArgs* args, void* stream) {
    const dim3 grid(static_cast<unsigned>(args->group_count), static_cast<unsigned>(args->rows));
    return launch(list_kernel, grid, kThreads, 0, stream, *args);
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
            &resident, kernel, kThreads, static_cast<size_t>(plan->shared_bytes))) {
        return error;
    }
    plan->ctas = static_cast<int64_t>(multiprocessors) * resident;
    return cudaSuccess;
}
