// A mixture of experts for few tokens, with nothing for the host to decide: the choice of experts,
// and the products of the pairs (token, chosen expert) with the chosen experts' weights.
//
// Each weight that somebody chose is read once: the CTAs of an expert find its pairs in the list of
// all, and a warp multiplies a few rows with the inputs of up to four pairs at a time. Sums are made
// in an order that no other pair changes. Bytes read: the chosen experts' weights; bound by memory
// bandwidth up to some ten pairs an expert. For long prompts products by cuBLAS are faster.

#include "cta.cuh"
#include "device.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "layer_args.h"
#include "numbers.cuh"

namespace rtpurbo {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;            // weight rows of a warp
constexpr int kRouteThreads = 128;  // a warp a token
constexpr int kKept = kMaxExperts / 32;

// The best probability that is left, and its expert; the lower number of two that are equal.
DEVICE void best_of_warp(float& value, int& expert) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, value, step);
        const int its = __shfl_xor_sync(kAllLanes, expert, step);
        if (other > value || (other == value && its < expert)) {
            value = other;
            expert = its;
        }
    }
}

template <typename Type>
__global__ void __launch_bounds__(kRouteThreads)
    route_kernel(const __grid_constant__ RouteArgs args) {
    const int lane = threadIdx.x % 32, experts = static_cast<int>(args.expert_count);
    const int64_t token = blockIdx.x * (kRouteThreads / 32) + threadIdx.x / 32;
    if (token >= args.tokens) return;
    const Type* logits = static_cast<const Type*>(args.logits) + token * experts;
    float kept[kKept], most = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        const int expert = i * 32 + lane;
        kept[i] = expert < experts ? logits[expert].value() : -INFINITY;
        most = fmaxf(most, kept[i]);
    }
    most = warp_max(most);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        kept[i] = i * 32 + lane < experts ? expf(kept[i] - most) : -1.0f;
        if (i * 32 + lane < experts) sum += kept[i];
    }
    sum = warp_sum(sum);
    float mine = 0.0f, total = 0.0f;  // lane c holds the weight of choice c
    for (int choice = 0; choice < args.chosen; ++choice) {
        float value = -1.0f;
        int expert = 0;  // where nothing is a number; its weight is none either
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
            if (kept[i] > value) {
                value = kept[i];
                expert = i * 32 + lane;
            }
        }
        best_of_warp(value, expert);
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
            if (expert == i * 32 + lane) kept[i] = -1.0f;
        }
        const float weight = isnan(sum) ? sum : value / sum;
        total += weight;
        if (lane == choice) {
            mine = weight;
            args.experts[token * args.chosen + choice] = expert;
        }
    }
    if (lane < args.chosen) {
        static_cast<Type*>(args.weights)[token * args.chosen + lane] =
            Type::of(args.normalise ? mine / total : mine);
    }
}

// Products of a warp's rows with the inputs of pairs list[0 .. kPairs), each lane a share of them.
template <typename Piece, int kPairs>
DEVICE void add_products(const ExpertArgs& args, const Piece* const (&rows)[kRows],
                         const int32_t* list, float (&sums)[kRows][kPairs]) {
    constexpr int kElements = Piece::kElements;
    const int lane = threadIdx.x % 32, pieces = static_cast<int>(args.size / kElements);
    const Piece* inputs[kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        inputs[p] = static_cast<const Piece*>(args.input) + list[p] / args.share * pieces;
    }
    for (int at = lane; at < pieces; at += 32) {
        Piece weights[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) weights[r] = rows[r][at];
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
            float input[kElements];
            inputs[p][at].floats(input);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float weight[kElements];
                weights[r].floats(weight);
#pragma unroll
                for (int e = 0; e < kElements; ++e) {
                    sums[r][p] = fmaf(weight[e], input[e], sums[r][p]);
                }
            }
        }
    }
}

template <typename Piece, typename Pair, bool kGated, int kPairs>
DEVICE void write_products(const ExpertArgs& args, const Piece* const (&rows)[kRows],
                           const int32_t* list, int64_t first) {
    float sums[kRows][kPairs] = {};
    add_products<Piece, kPairs>(args, rows, list, sums);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r][p] = warp_sum(sums[r][p]);
        if (threadIdx.x % 32 != 0) continue;
        Pair* out = static_cast<Pair*>(args.out) + (list[p] * args.outputs + first) / 2;
        if (kGated) {
            const float a = silu(sums[0][p]) * sums[2][p];
            const float b = silu(sums[1][p]) * sums[3][p];
            out[0] = Pair::of(make_float2(a, b));
        } else {
            out[0] = Pair::of(make_float2(sums[0][p], sums[1][p]));
            out[1] = Pair::of(make_float2(sums[2][p], sums[3][p]));
        }
    }
}

// A CTA has some outputs of one expert. There is a column of CTAs for each expert or, if these are
// fewer, for each pair, where the first pair of an expert works for all of them.
template <typename Piece, typename Pair, bool kGated>
__global__ void __launch_bounds__(kThreads)
    expert_kernel(const __grid_constant__ ExpertArgs args) {
    constexpr int kOutputs = kGated ? kRows / 2 : kRows;  // of a warp
    __shared__ int32_t list[kMaxPairs];
    __shared__ int found;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int pairs = static_cast<int>(args.pairs), column = static_cast<int>(blockIdx.y);
    const bool by_pair = pairs <= args.expert_count;
    const int expert = by_pair ? args.experts[column] : column;
    if (warp == 0) {
        int count = 0;
        for (int base = 0; base < pairs; base += 32) {
            const int pair = base + lane;
            const bool is_its = pair < pairs && args.experts[pair] == expert;
            const uint32_t all = __ballot_sync(kAllLanes, is_its);
            if (is_its) list[count + __popc(all & ((1u << lane) - 1))] = pair;
            count += __popc(all);
        }
        if (lane == 0) found = count;
    }
    __syncthreads();
    const int count = found;
    if (count == 0 || (by_pair && list[0] != column)) return;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kOutputs;
    if (first >= args.outputs) return;
    const int64_t pieces = args.size / Piece::kElements;
    const int64_t weight_rows = (kGated ? 2 : 1) * args.outputs;
    const Piece* weights = static_cast<const Piece*>(args.weights) +
                           (expert * weight_rows + first) * pieces;
    const Piece* rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int64_t row = kGated && r >= kOutputs ? args.outputs + r - kOutputs : r;
        rows[r] = weights + row * pieces;
    }
    int at = 0;
    for (; at + 4 <= count; at += 4) {
        write_products<Piece, Pair, kGated, 4>(args, rows, list + at, first);
    }
    for (; at + 2 <= count; at += 2) {
        write_products<Piece, Pair, kGated, 2>(args, rows, list + at, first);
    }
    if (at < count) write_products<Piece, Pair, kGated, 1>(args, rows, list + at, first);
}

template <bool kGated>
int launch_products(const ExpertArgs& args, void* stream) {
    constexpr int kOutputs = kWarps * (kGated ? kRows / 2 : kRows);
    if (args.pairs > kMaxPairs || args.size % piece_elements(args.data_type) != 0 ||
        args.outputs % kRows != 0) {
        return cudaErrorInvalidValue;
    }
    const int64_t columns = args.pairs < args.expert_count ? args.pairs : args.expert_count;
    const dim3 grid(static_cast<unsigned>((args.outputs + kOutputs - 1) / kOutputs),
                    static_cast<unsigned>(columns));
    return launch(args.data_type == kBfloat16 ? expert_kernel<Bfloat16Piece, Bfloat16Pair, kGated>
                                              : expert_kernel<Float32Piece, Float32Pair, kGated>,
                  grid, kThreads, 0, stream, args);
}

}  // namespace
}  // namespace rtpurbo

using namespace rtpurbo;

extern "C" int64_t rtpurbo_route_experts_bytes() { return sizeof(RouteArgs); }

extern "C" int rtpurbo_route_experts(const RouteArgs* args, void* stream) {
    if (args->expert_count > kMaxExperts || args->chosen > 32 ||
        args->chosen > args->expert_count) {
        return cudaErrorInvalidValue;
    }
    constexpr int64_t kTokens = kRouteThreads / 32;
    return launch(args->data_type == kBfloat16 ? route_kernel<Bfloat16> : route_kernel<Float32>,
                  dim3(static_cast<unsigned>((args->tokens + kTokens - 1) / kTokens)),
                  kRouteThreads, 0, stream, *args);
}

extern "C" int64_t rtpurbo_expert_products_bytes() { return sizeof(ExpertArgs); }

extern "C" int rtpurbo_expert_products(const ExpertArgs* args, void* stream) {
    return args->gated ? launch_products<true>(*args, stream)
                       : launch_products<false>(*args, stream);
}
