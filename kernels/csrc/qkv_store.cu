// From the projection of a layer to where attention reads: RMS norm of queries and keys, RoPE, the
// store of keys and values into their pages, and both projections to the index space, in one launch.
//
// The work of a token is a list of tasks: a query head, a key, a value, a row of index keys, a head
// that selects. A team of D / 4 lanes does one task of one token; lane l holds elements 2l, 2l + 1
// and their partners of the rotation, D / 2 further on. A task of the index space reads and norms
// its head again: waiting for another team would take longer. All warps of a CTA do the same task,
// so they share its weights in L1. Nothing depends on the other tokens of the batch.
// Bytes read and written once; bound by latency at decode, by memory bandwidth at prefill.

#include <cfloat>

#include "cta.cuh"
#include "device.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "layer_args.h"

namespace rtpurbo {
namespace {

constexpr int kThreads = 128;
constexpr int kMostCtas = 4096;  // some more than a large GPU holds at once
constexpr int kOutputsAtOnce = 8;  // of a projection
constexpr float kIndexSteps = 127.0f;  // of an index key in 8 bits, to either side of 0

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

// What a lane holds of a head.
template <typename Pair>
struct Share {
    Pair first, second;
};

template <typename Pair, int kDim>
DEVICE Share<Pair> load_share(const void* from, int64_t vector, int lane) {
    const Pair* pairs = static_cast<const Pair*>(from) + vector * (kDim / 2);
    return {pairs[lane], pairs[kDim / 4 + lane]};
}

template <typename Pair, int kDim>
DEVICE void store_share(void* to, int64_t vector, int lane, const Share<Pair>& share) {
    Pair* pairs = static_cast<Pair*>(to) + vector * (kDim / 2);
    pairs[lane] = share.first;
    pairs[kDim / 4 + lane] = share.second;
}

template <int kLanes>
DEVICE float team_sum(float value) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, step);
    }
    return value;
}

// Over the root mean square, rounded to the data type before the weight as in engine/model/layers.py.
template <typename Pair, int kDim>
DEVICE Share<Pair> normalised(const Share<Pair>& share, const Share<Pair>& weight, float eps) {
    const float2 a = share.first.floats(), b = share.second.floats();
    const float squares = team_sum<kDim / 4>(a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y);
    const float scale = 1.0f / sqrtf(squares / kDim + eps);
    const float2 first = Pair::of(make_float2(a.x * scale, a.y * scale)).floats();
    const float2 second = Pair::of(make_float2(b.x * scale, b.y * scale)).floats();
    const float2 u = weight.first.floats(), v = weight.second.floats();
    return {Pair::of(make_float2(first.x * u.x, first.y * u.y)),
            Pair::of(make_float2(second.x * v.x, second.y * v.y))};
}

template <typename Pair, int kDim>
DEVICE Share<Pair> rotated(const StoreArgs& args, int64_t token, int lane,
                           const Share<Pair>& share) {
    const int64_t at = token * (kDim / 4) + lane;
    const float2 cosine = reinterpret_cast<const float2*>(args.cosines)[at];
    const float2 sine = reinterpret_cast<const float2*>(args.sines)[at];
    const float2 a = share.first.floats(), b = share.second.floats();
    return {Pair::of(make_float2(a.x * cosine.x - b.x * sine.x, a.y * cosine.y - b.y * sine.y)),
            Pair::of(make_float2(b.x * cosine.x + a.x * sine.x, b.y * cosine.y + a.y * sine.y))};
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

// Projection [I, D] times the head: lane l gets outputs 2 l and 2 l + 1, those after I / 2 nothing.
// All lanes of the warp take part.
template <typename Pair, int kDim>
DEVICE Pair project(const void* projection, int64_t row, int index_dim, const Share<Pair>& share,
                    int lane) {
    constexpr int kLanes = kDim / 4;
    const float2 a = share.first.floats(), b = share.second.floats();
    Pair mine = {};
    for (int begin = 0; begin < index_dim; begin += kOutputsAtOnce) {
        float sums[kOutputsAtOnce];
#pragma unroll
        for (int i = 0; i < kOutputsAtOnce; ++i) {
            const Share<Pair> weight =
                load_share<Pair, kDim>(projection, row * index_dim + begin + i, lane);
            const float2 u = weight.first.floats(), v = weight.second.floats();
            sums[i] = a.x * u.x + a.y * u.y + b.x * v.x + b.y * v.y;
        }
#pragma unroll
        for (int i = 0; i < kOutputsAtOnce; ++i) sums[i] = team_sum<kLanes>(sums[i]);
#pragma unroll
        for (int i = 0; i < kOutputsAtOnce / 2; ++i) {
            if (lane == begin / 2 + i) mine = Pair::of(make_float2(sums[2 * i], sums[2 * i + 1]));
        }
    }
    return mine;
}

DEVICE int8_t index_step(float value, float scale) {
    const float steps = rintf(value / scale);
    if (!(fabsf(steps) <= FLT_MAX)) return 0;
    return static_cast<int8_t>(fminf(fmaxf(steps, -kIndexSteps), kIndexSteps));
}

// An index key in 8 bits with its scale (kernels/reference.py, quantise_index_keys). All lanes of
// the warp take part; lanes after I / 2 hold zeros.
template <typename Pair, int kLanes>
DEVICE void store_int8_key(const StoreArgs& args, int64_t at, int lane, bool writes, Pair mine) {
    const float2 key = mine.floats();
    // Of numbers without a sign the larger has the larger bits, and one that is none the largest.
    uint32_t most = max(float_to_bits(fabsf(key.x)), float_to_bits(fabsf(key.y)));
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
        most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    }
    const Bfloat16 scale = Bfloat16::of(bits_to_float(most) / kIndexSteps);
    const int64_t pairs = args.index_dim / 2;
    if (writes && lane < pairs) {
        const uint8_t low = static_cast<uint8_t>(index_step(key.x, scale.value()));
        const uint8_t high = static_cast<uint8_t>(index_step(key.y, scale.value()));
        static_cast<uint16_t*>(args.index_keys)[at * pairs + lane] =
            static_cast<uint16_t>(low | high << 8);
    }
    if (writes && lane == 0) args.index_scales[at] = scale.raw;
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
