// Attention of one query token per row over paged caches, all head roles of a layer in one launch.
//
// An item is a row and a group: a KV head with the query heads that read it. Its blocks come from a
// list (some head selected them, or a local head sees them), from the window rule, or are all of
// the context; each is read once for all heads of the group. The blocks of all items are one line,
// cut into equal shares, a CTA each, so that long and short items fill the device alike. Inside a
// CTA every warp attends to strips of its own (strip.cuh), three copies ahead. An item that lies in
// several shares leaves partial results, and the CTA that completes it merges them in the order of
// the shares: the same inputs give the same bits. Bound by memory bandwidth on keys and values.
//
// Items that need no list come first. After index_select the kernel may be started early
// (`overlap`): it attends to those while blocks are still being chosen, and then waits for the lists.
// A multiprocessor has no registers for both kernels, so where blocks are being chosen a CTA starts
// late. Shares are therefore taken in the order of arrival, and CTAs that come last take none of the
// early items; they are the first for items with lists.

#include "args.h"
#include "cta.cuh"
#include "device.cuh"
#include "partition.cuh"
#include "strip.cuh"

namespace rtpurbo {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kStages = 3;        // strips in a warp's ring
constexpr int kLeastBlocks = 2;   // of a share: eight strips of 64-token blocks
constexpr float kLog2E = 1.4426950408889634f;

// A strip on its way, as its reader needs it.
struct InFlight {
    int32_t first;      // position of its first token, -1: nobody sees it and nothing was copied
    uint32_t selected;  // slots that selected its block
};

// Shared memory of a CTA.
template <typename Strip, int kDim>
struct Layout {
    static constexpr int kHalfBytes = kStripTokens * kDim * sizeof(typename Strip::Element);
    static constexpr int kRingBytes = kStages * 2 * kHalfBytes;  // of a warp
    static constexpr int kPartsAtOnce = sizeof(typename Strip::Element) == 2 ? 16 : 8;  // merged

    static constexpr int kStarts = 0;
    static constexpr int kFlag = (kMaxItems + 1) * 4;
    static constexpr int kStats = (kFlag + 4 + 127) / 128 * 128;
    static constexpr int kInFlight = kStats + kMaxWarps * kTileHeads * sizeof(Stats);
    static constexpr int kScratch = kInFlight + kMaxWarps * kStages * sizeof(InFlight);
    static constexpr int kRing =
        (kScratch + kMaxWarps * Strip::kScratchFloats * 4 + 127) / 128 * 128;

    static_assert(kRingBytes >= kTileHeads * kDim * 4, "a warp's result fits into its ring");

    static constexpr int bytes(int warps) { return kRing + warps * kRingBytes; }
};

// A row and a group, and the blocks to read for them.
struct Item {
    int64_t row;
    int64_t index;
    const Group* group;
    int64_t context;
    WindowBlocks window;
    const ListEntry* list;  // or null
    uint32_t local;         // bit per slot: under the window rule

    DEVICE Item(const DecodeArgs& args, int64_t item) : index(item) {
        row = item / args.group_count;
        group = args.groups + item % args.group_count;
        context = args.context_lens[row];
        window = window_blocks(context, args.block_tokens, args.window, args.sinks);
        const bool listed = args.lists != nullptr && group->retrieval != 0 && context > 0 &&
                            context >= args.dense_below;
        list = listed ? args.lists + item * args.list_width : nullptr;
        local = ((1u << group->heads) - 1) & ~static_cast<uint32_t>(group->retrieval);
    }

    // Blocks; of an item with a list only when the list is there.
    DEVICE int count(const DecodeArgs& args) const {
        if (list != nullptr) return __ldcg(args.list_counts + index);
        return group->retrieval != 0 ? window.blocks : window.count();
    }

    DEVICE ListEntry entry(int place) const {
        if (list != nullptr) {
            const int2 found = __ldcg(reinterpret_cast<const int2*>(list) + place);
            return {found.x, static_cast<uint32_t>(found.y)};
        }
        if (group->retrieval != 0) return {place, static_cast<uint32_t>(group->retrieval)};
        return {window.at(place), 0};
    }
};

// A strip and where it lies.
struct Target {
    int first;        // position of its first token, -1: nobody sees it
    uint32_t heads;   // slots that selected its block
    int64_t token;    // of the pool: (page * kv_rows + kv_row) * block_tokens + place
};

// The strip that begins at token `place` of an item's block number `index`.
DEVICE Target find_strip(const DecodeArgs& args, const Item& item, int index, int place) {
    const ListEntry entry = item.entry(index);
    const int pool = item.group->pool;
    // Looked up even if nobody sees the strip: the two loads do not wait for the answer.
    const int64_t page = page_of(args.tables[pool], item.row, entry.block);
    const int64_t first = entry.block * args.block_tokens + place;
    // The window sees the strip if it sees the strip's newest token.
    const int64_t last = min(first + kStripTokens, item.context) - 1;
    const bool near = first < args.sinks || item.context - 1 - last < args.window;
    const bool seen =
        first < item.context && (entry.heads != 0 || (item.local != 0 && near));
    return {seen ? static_cast<int>(first) : -1, entry.heads,
            (page * args.kv_rows[pool] + item.group->kv_row) * args.block_tokens + place};
}

// Copies a warp's strip of keys and values; tokens past the context become zeros, since memory that
// was never written may hold NaN, which a weight of zero does not silence.
template <typename Strip, int kDim>
DEVICE void copy_strip(const DecodeArgs& args, const Item& item, const Target& target,
                       unsigned char* stage) {
    using Element = typename Strip::Element;
    constexpr int kHalfBytes = Layout<Strip, kDim>::kHalfBytes;
    const int pool = item.group->pool;
    const int64_t offset = target.token * kDim * static_cast<int64_t>(sizeof(Element));
    const unsigned char* keys = static_cast<const unsigned char*>(args.keys[pool]) + offset;
    const unsigned char* values = static_cast<const unsigned char*>(args.values[pool]) + offset;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const unsigned char* source = half == 0 ? keys : values;
#pragma unroll
        for (int i = 0; i < kHalfBytes / 16 / 32; ++i) {
            const int chunk = i * 32 + lane;
            const int row = chunk / Strip::kChunks, column = chunk % Strip::kChunks;
            const int to = row * Strip::kChunks + (column ^ (row % 8));
            copy_async_16(stage + half * kHalfBytes + to * 16, source + chunk * 16,
                          target.first + row < item.context ? 16 : 0);
        }
    }
}

// Attention of an item's blocks [begin, end), by all warps: leaves each warp's result in its ring
// and its statistics in shared memory.
template <typename Strip, int kDim>
DEVICE void attend(const DecodeArgs& args, const Item& item, int begin, int end,
                   unsigned char* shared) {
    using Layout = Layout<Strip, kDim>;
    using Element = typename Strip::Element;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    unsigned char* ring = shared + Layout::kRing + warp * Layout::kRingBytes;
    InFlight* in_flight = reinterpret_cast<InFlight*>(shared + Layout::kInFlight) + warp * kStages;
    float* scratch =
        reinterpret_cast<float*>(shared + Layout::kScratch) + warp * Strip::kScratchFloats;
    const int per_block = static_cast<int>(args.block_tokens) / kStripTokens;
    const int strips = (end - begin) * per_block;

    Strip strip;
    strip.begin(static_cast<const Element*>(args.queries) + item.row * args.query_row_stride,
                args.query_head_stride, *item.group, scratch);
    const auto find = [&](int index) -> Target {
        if (index >= strips) return {-1, 0, 0};
        return find_strip(args, item, begin + index / per_block, index % per_block * kStripTokens);
    };
    // Every call closes a group of copies, empty or not, so that waiting can count them.
    const auto copy = [&](const Target& target, int stage) {
        if (target.first >= 0) {
            copy_strip<Strip, kDim>(args, item, target, ring + stage * 2 * Layout::kHalfBytes);
        }
        if (lane == 0) in_flight[stage] = {target.first, target.heads};
        copy_async_commit();
    };
    Target ahead[kStages];
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) ahead[stage] = find(warp + stage * warps);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) copy(ahead[stage], stage);
    int stage = 0;
    for (int index = warp; index < strips; index += warps) {
        const Target next = find(index + kStages * warps);
        copy_async_wait<kStages - 1>();
        __syncwarp();
        const InFlight now = in_flight[stage];
        if (now.first >= 0) {
            const unsigned char* keys = ring + stage * 2 * Layout::kHalfBytes;
            const Sight sight{now.first,
                              now.selected,
                              item.local,
                              static_cast<int>(item.context),
                              static_cast<int>(args.window),
                              static_cast<int>(args.sinks)};
            strip.step(keys, keys + Layout::kHalfBytes, sight,
                       static_cast<float>(args.scale) * kLog2E, scratch);
        }
        __syncwarp();
        copy(next, stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    copy_async_wait<0>();
    __syncwarp();
    strip.end(reinterpret_cast<float*>(ring),
              reinterpret_cast<Stats*>(shared + Layout::kStats) + warp * kTileHeads);
}

DEVICE void store(uint16_t* out, float4 value) {
    *reinterpret_cast<uint2*>(out) =
        make_uint2(pack_bfloat16(value.x, value.y), pack_bfloat16(value.z, value.w));
}

DEVICE void store(float* out, float4 value) { *reinterpret_cast<float4*>(out) = value; }

DEVICE void add_scaled(float4& sum, float weight, float4 value) {
    sum.x = fmaf(weight, value.x, sum.x);
    sum.y = fmaf(weight, value.y, sum.y);
    sum.z = fmaf(weight, value.z, sum.z);
    sum.w = fmaf(weight, value.w, sum.w);
}

template <typename Element>
DEVICE Element* out_of(const DecodeArgs& args, const Item& item, int slot) {
    return static_cast<Element*>(args.out) + item.row * args.out_row_stride +
           item.group->head[slot] * args.out_head_stride;
}

// Merges the warps' results: into `out` if the item is complete, else into part `part`.
template <typename Strip, int kDim>
DEVICE void merge_warps(const DecodeArgs& args, const Item& item, bool complete, int64_t part,
                        unsigned char* shared) {
    using Layout = Layout<Strip, kDim>;
    const int warps = blockDim.x / 32;
    const Stats* stats = reinterpret_cast<const Stats*>(shared + Layout::kStats);
    for (int i = threadIdx.x; i < item.group->heads * (kDim / 4); i += blockDim.x) {
        const int slot = i / (kDim / 4), column = i % (kDim / 4) * 4;
        float most = -INFINITY, sum = 0.0f;
        for (int warp = 0; warp < warps; ++warp) {
            most = fmaxf(most, stats[warp * kTileHeads + slot].most);
        }
        const float reference = reference_of(most);
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int warp = 0; warp < warps; ++warp) {
            const Stats own = stats[warp * kTileHeads + slot];
            const float factor = exp2f(own.most - reference);
            const float* result =
                reinterpret_cast<const float*>(shared + Layout::kRing + warp * Layout::kRingBytes);
            sum = fmaf(factor, own.sum, sum);
            add_scaled(total, factor,
                       *reinterpret_cast<const float4*>(result + slot * kDim + column));
        }
        if (complete) {
            float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            add_scaled(value, sum == 0.0f ? 0.0f : 1.0f / sum, total);
            store(out_of<typename Strip::Element>(args, item, slot) + column, value);
        } else {
            const int64_t at = part * kTileHeads + slot;
            *reinterpret_cast<float4*>(args.partial + at * kDim + column) = total;
            if (column == 0) {
                reinterpret_cast<float2*>(args.partial_stats)[at] = make_float2(most, sum);
            }
        }
    }
}

// Where a CTA leaves its part of an item. A share's first item may have begun in an earlier share,
// its last may go on in a later one: at most one of either kind, of items with and without lists.
DEVICE int64_t part_of(int64_t cta, bool listed, bool begins_item) {
    return cta * 4 + listed * 2 + begins_item;
}

// Merges the parts of an item that shares [first, last] hold, in their order.
template <typename Strip, int kDim>
DEVICE void merge_parts(const DecodeArgs& args, const Item& item, int64_t first, int64_t last,
                        unsigned char* shared) {
    using Layout = Layout<Strip, kDim>;
    const int heads = item.group->heads, parts = static_cast<int>(last - first + 1);
    const bool listed = item.list != nullptr;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    float2* stats = reinterpret_cast<float2*>(shared + Layout::kRing);  // [parts, heads]
    for (int i = threadIdx.x; i < parts * heads; i += blockDim.x) {
        const int64_t part = part_of(first + i / heads, listed, i < heads);
        stats[i] = __ldcg(reinterpret_cast<const float2*>(args.partial_stats) + part * kTileHeads +
                          i % heads);
    }
    __syncthreads();
    for (int slot = warp; slot < heads; slot += warps) {
        float most = -INFINITY, sum = 0.0f;
        for (int i = lane; i < parts; i += 32) most = fmaxf(most, stats[i * heads + slot].x);
        const float reference = reference_of(warp_max(most));
        for (int i = lane; i < parts; i += 32) {
            const float2 own = stats[i * heads + slot];
            sum = fmaf(exp2f(own.x - reference), own.y, sum);
        }
        sum = warp_sum(sum);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        for (int i = lane; i < parts; i += 32) {
            stats[i * heads + slot].x = exp2f(stats[i * heads + slot].x - reference) * inverse;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * (kDim / 4); i += blockDim.x) {
        const int slot = i / (kDim / 4), column = i % (kDim / 4) * 4;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll Layout::kPartsAtOnce
        for (int j = 0; j < parts; ++j) {
            const int64_t at = part_of(first + j, listed, j == 0) * kTileHeads + slot;
            add_scaled(total, stats[j * heads + slot].x,
                       __ldcg(reinterpret_cast<const float4*>(args.partial + at * kDim + column)));
        }
        store(out_of<typename Strip::Element>(args, item, slot) + column, total);
    }
}

template <typename Strip, int kDim>
DEVICE void clear(const DecodeArgs& args, const Item& item) {
    for (int i = threadIdx.x; i < item.group->heads * (kDim / 4); i += blockDim.x) {
        store(out_of<typename Strip::Element>(args, item, i / (kDim / 4)) + i % (kDim / 4) * 4,
              make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
}

// All items that have a list, or all that have none, by `workers` CTAs; this is number `place`.
template <typename Strip, int kDim>
DEVICE void attend_items(const DecodeArgs& args, bool listed, int place, int workers,
                         unsigned char* shared) {
    using Layout = Layout<Strip, kDim>;
    int* starts = reinterpret_cast<int*>(shared + Layout::kStarts);
    int* flag = reinterpret_cast<int*>(shared + Layout::kFlag);
    const int items = static_cast<int>(args.rows * args.group_count);
    fill_starts(starts, items, [&](int index) {
        const Item item(args, index);
        return (item.list != nullptr) == listed ? item.count(args) : 0;
    });
    // Items with nothing to read give zeros.
    for (int index = place; place < workers && index < items; index += workers) {
        if (starts[index] != starts[index + 1]) continue;
        const Item item(args, index);
        if ((item.list != nullptr) == listed) clear<Strip, kDim>(args, item);
    }
    const int64_t total = starts[items];
    const int64_t ctas = working_ctas(total, workers, kLeastBlocks);
    const bool works = place < ctas;
    int64_t unit = works ? share_start(place, total, ctas) : 0;
    const int64_t end = works ? share_start(place + 1, total, ctas) : 0;
    while (unit < end) {
        const int index = item_of(starts, items, unit);
        const Item item(args, index);
        const int64_t start = starts[index], stop = starts[index + 1];
        const int64_t until = min(end, stop);
        attend<Strip, kDim>(args, item, static_cast<int>(unit - start),
                            static_cast<int>(until - start), shared);
        __syncthreads();
        const bool complete = unit == start && until == stop;
        merge_warps<Strip, kDim>(args, item, complete, part_of(place, listed, unit == start),
                                 shared);
        if (!complete) {
            const int64_t first = share_owner(start, total, ctas);
            const int64_t last = share_owner(stop - 1, total, ctas);
            if (arrive(args.item_done + index, 1, static_cast<uint32_t>(last - first + 1), flag)) {
                merge_parts<Strip, kDim>(args, item, first, last, shared);
            }
        }
        __syncthreads();  // the rings are free for the next item
        unit = until;
    }
    __syncthreads();
}

template <typename Strip, int kDim>
__global__ void __launch_bounds__(kMaxWarps * 32)
    sparse_decode_kernel(const __grid_constant__ DecodeArgs args) {
    DYNAMIC_SHARED(shared);
    const int phases = args.lists == nullptr ? 1 : 2;
    int place = blockIdx.x, workers = gridDim.x;
    if (args.held_back > 0) {
        place = arrival(args.tickets, reinterpret_cast<int*>(shared + Layout<Strip, kDim>::kFlag));
        workers -= static_cast<int>(args.held_back);
    }
#pragma unroll 1
    for (int phase = 0; phase < phases; ++phase) {
        if (phase == 1) {
            wait_for_previous_kernel();
            workers = gridDim.x;
            place = workers - 1 - place;
        }
        attend_items<Strip, kDim>(args, phase == 1, place, workers, shared);
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
    return {sparse_decode_kernel<Strip, kDim>, Layout<Strip, kDim>::bytes(0),
            Layout<Strip, kDim>::kRingBytes};
}

DecodeKernel find_kernel(int64_t data_type, int64_t head_dim) {
    if (data_type == kBfloat16) {
        if (head_dim == 64) return describe<Bfloat16Strip<64>, 64>();
        if (head_dim == 128) return describe<Bfloat16Strip<128>, 128>();
    } else if (data_type == kFloat32) {
        if (head_dim == 64) return describe<Float32Strip<64>, 64>();
        if (head_dim == 128) return describe<Float32Strip<128>, 128>();
    }
    return {};
}

}  // namespace
}  // namespace rtpurbo

using namespace rtpurbo;

// How to launch for a data type and head_dim on the current device. To be called before the first
// launch there: it also allows the kernel that much shared memory.
extern "C" int rtpurbo_decode_plan(int64_t data_type, int64_t head_dim, DecodePlan* plan) {
    const DecodeKernel kernel = find_kernel(data_type, head_dim);
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
    if (int error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &resident, kernel.run, static_cast<int>(plan->warps * 32),
            static_cast<size_t>(plan->shared_bytes))) {
        return error;
    }
    // What merge_parts keeps of every part must fit into the rings.
    const int64_t most_ctas = plan->warps * kernel.warp_bytes / (kTileHeads * sizeof(float2));
    const int64_t ctas = static_cast<int64_t>(multiprocessors) * resident;
    plan->ctas = ctas < most_ctas ? ctas : most_ctas;
    return cudaSuccess;
}

extern "C" int rtpurbo_sparse_decode(const DecodeArgs* args, void* stream) {
    const DecodeKernel kernel = find_kernel(args->data_type, args->head_dim);
    if (kernel.run == nullptr || args->rows * args->group_count > kMaxItems ||
        args->block_tokens % kStripTokens != 0) {
        return cudaErrorInvalidValue;
    }
    return launch(kernel.run, dim3(static_cast<unsigned>(args->ctas)),
                  static_cast<int>(args->warps * 32), static_cast<int>(args->shared_bytes), stream,
                  *args, args->overlap != 0);
}
