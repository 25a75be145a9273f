// From the projection of a layer to where attention reads: RMS norm of queries and keys, RoPE, the
// store of keys and values into their pages, and both projections to the index space, in one launch.
//
// The work of a token is a list of tasks: a query head, a key, a value, a row of index keys, a head
// that selects. A team of lanes does one task of one token (store_head.cuh). A task of the index space
// reads and norms its head again (store_index.cuh): waiting for another team would take longer. All
// warps of a CTA do the same task, so they share its weights in L1. Nothing depends on the other tokens
// of the batch. Bytes read and written once; bound by latency at decode, by memory bandwidth at prefill.

#include "device.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "layer_args.h"
#include "store_head.cuh"
#include "store_index.cuh"

namespace rtpurbo {
namespace {

constexpr int kThreads = 128;
constexpr int kMostCtas = 4096;  // some more than a large GPU holds at once

enum Kind { kQuery, kKey, kValue, kIndexKey, kIndexQuery };

struct Task {
    Kind kind;
    int64_t row;   // among those of its kind
    int64_t head;  // among the H + 2 N of the projection
};

DEVICE Task task_of(const StoreArgs& args, int64_t number) {
    if (number < args.heads) return {kQuery, number, number};
    const int64_t keys = args.heads, values = keys + args.kv_heads;
    if (number < values) return {kKey, number - keys, number};
    if (number < values + args.kv_heads) return {kValue, number - values, number};
    const int64_t row = number - values - args.kv_heads;
    if (row < args.index_rows) return {kIndexKey, row, keys + args.key_head[row]};
    return {kIndexQuery, row - args.index_rows, args.query_head[row - args.index_rows]};
}

// Row of a cache [P, rows, K, ...] as if it were [P * rows * K, ...].
DEVICE int64_t cache_place(int64_t slot, int64_t rows, int64_t row, int64_t block_tokens) {
    const int64_t page = slot / block_tokens;
    return (page * rows + row) * block_tokens + (slot - page * block_tokens);
}

template <typename Pair, int kDim>
DEVICE void store_in_page(const StoreArgs& args, const Task& task, int64_t token, int lane,
                          const Share<Pair>& share) {
    const int32_t place = args.kv_rows[task.row];
    const int pool = place < 0;
    const int64_t row = pool ? -1 - place : place;
    void* cache = task.kind == kKey ? args.keys[pool] : args.values[pool];
    const int64_t at =
        cache_place(args.slots[pool][token], args.cache_rows[pool], row, args.block_tokens);
    store_share<Pair, kDim>(cache, at, lane, share);
}

template <typename Pair, int kDim>
DEVICE void do_task(const StoreArgs& args, const Task& task, int64_t token, int lane, bool writes,
                    const Share<Pair>& share) {
    const int64_t index_pairs = args.index_dim / 2;
    const int index_dim = static_cast<int>(args.index_dim);
    if (task.kind == kQuery) {
        const Share<Pair> turned = rotated<Pair, kDim>(args, token, lane, share);
        if (writes) {
            store_share<Pair, kDim>(args.queries, token * args.heads + task.row, lane, turned);
        }
    } else if (task.kind == kKey) {
        const Share<Pair> turned = rotated<Pair, kDim>(args, token, lane, share);
        if (writes) store_in_page<Pair, kDim>(args, task, token, lane, turned);
    } else if (task.kind == kValue) {
        if (writes) store_in_page<Pair, kDim>(args, task, token, lane, share);
    } else if (task.kind == kIndexKey) {
        const int64_t at = args.index_keys_in_rows
                               ? token * args.index_rows + task.row
                               : cache_place(args.slots[0][token], args.index_rows, task.row,
                                             args.block_tokens);
        const Pair mine =
            project<Pair, kDim>(args.key_projection, task.row, index_dim, share, lane);
        if (args.index_scales != nullptr) {
            store_int8_key<Pair, kDim / 4>(args, at, lane, writes, mine);
        } else if (writes && lane < index_pairs) {
            static_cast<Pair*>(args.index_keys)[at * index_pairs + lane] = mine;
        }
    } else {
        const int64_t at = token * args.selecting + task.row;
        const Pair mine =
            project<Pair, kDim>(args.query_projection, task.row, index_dim, share, lane);
        if (writes && lane < index_pairs) {
            static_cast<Pair*>(args.index_queries)[at * index_pairs + lane] = mine;
        }
    }
}

template <typename Pair, int kDim>
__global__ void __launch_bounds__(kThreads)
    qkv_store_kernel(const __grid_constant__ StoreArgs args) {
    let_next_kernel_start();
    constexpr int kLanes = kDim / 4, kTeams = kThreads / kLanes;
    const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes;
    const Task task = task_of(args, blockIdx.y);
    const int64_t tokens = task.kind == kIndexQuery ? args.index_query_tokens : args.tokens;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kTeams;
    const int64_t vectors = args.heads + 2 * args.kv_heads;  // of a token
    const bool norms = args.norm != nullptr && task.kind != kValue;
    const bool is_query = task.kind == kQuery || task.kind == kIndexQuery;
    Share<Pair> weight = {};
    if (norms) weight = load_share<Pair, kDim>(args.norm, is_query ? 0 : 1, lane);
    // The next token is fetched while this one is computed; past the end any will do.
    const auto fetch = [&](int64_t token) {
        return load_share<Pair, kDim>(args.projected, min(token, tokens - 1) * vectors + task.head,
                                      lane);
    };
    int64_t base = static_cast<int64_t>(blockIdx.x) * kTeams;
    if (base >= tokens) return;
    Share<Pair> share = fetch(base + team);
    for (; base < tokens; base += step) {
        const int64_t token = base + team;
        const Share<Pair> next = fetch(token + step);
        if (norms) share = normalised<Pair, kDim>(share, weight, static_cast<float>(args.eps));
        do_task<Pair, kDim>(args, task, min(token, tokens - 1), lane, token < tokens, share);
        share = next;
    }
}

using StoreKernel = void (*)(StoreArgs);

StoreKernel find_kernel(const StoreArgs& args) {
    if (args.data_type == kBfloat16) {
        if (args.head_dim == 64) return qkv_store_kernel<Bfloat16Pair, 64>;
        if (args.head_dim == 128) return qkv_store_kernel<Bfloat16Pair, 128>;
    } else if (args.data_type == kFloat32) {
        if (args.head_dim == 64) return qkv_store_kernel<Float32Pair, 64>;
        if (args.head_dim == 128) return qkv_store_kernel<Float32Pair, 128>;
    }
    return nullptr;
}

}  // namespace
}  // namespace rtpurbo

using namespace rtpurbo;

extern "C" int64_t rtpurbo_qkv_store_bytes() { return sizeof(StoreArgs); }

extern "C" int rtpurbo_qkv_store(const StoreArgs* args, void* stream) {
    const StoreKernel kernel = find_kernel(*args);
    if (kernel == nullptr || args->index_dim % kOutputsAtOnce != 0 ||
        args->index_dim > args->head_dim / 2) {
        return cudaErrorInvalidValue;
    }
    const int64_t teams = kThreads / (args->head_dim / 4);
    const int64_t tasks = args->heads + 2 * args->kv_heads + args->index_rows + args->selecting;
    const int64_t most = kMostCtas / tasks + 1, wanted = (args->tokens + teams - 1) / teams;
    const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most),
                    static_cast<unsigned>(tasks));
    return launch(kernel, grid, kThreads, 0, stream, *args);
}
