// The ends of a decode step, one launch each: where its rows stand, and what they yield.
//
// Both replace a dozen launches of two microseconds, in which nearly all is waiting.

#include "cta.cuh"
#include "device.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "numbers.cuh"
#include "step_args.h"

namespace rtpurbo {
namespace {

constexpr int kPlaceThreads = 256;
constexpr int kPickThreads = 1024;  // at most: a thread for each piece of the logits

// Rows of `inputs`.
enum Input { kToken, kPosition, kContext, kTableRow, kFullPage, kWindowPage, kSamples, kTopP };

constexpr int64_t kNewestToken = -1;  // NEWEST_TOKEN of kernels/step_ops.py

template <typename Args>
DEVICE int64_t input_of(const Args& args, int which, int64_t row) {
    return args.inputs[which * args.input_stride + row];
}

// A CTA for each row and pool. Rows that pad the batch share a row of the tables and put the null
// page into it, all of them alike.
__global__ void __launch_bounds__(kPlaceThreads)
    place_kernel(const __grid_constant__ PlaceArgs args) {
    const int64_t row = blockIdx.x, pool = blockIdx.y;
    const auto input = [&](int which) { return input_of(args, which, row); };
    const int64_t position = input(kPosition), page = input(kFullPage + static_cast<int>(pool));
    const int64_t column = position / args.block_tokens;
    int64_t* table = args.tables[pool] + input(kTableRow) * args.width;
    int64_t* own = args.row_tables[pool] + row * args.width;
    for (int64_t at = threadIdx.x; at < args.width; at += kPlaceThreads) {
        own[at] = at == column ? page : table[at];
        if (at == column) table[at] = page;
    }
    if (threadIdx.x != 0) return;
    args.token_slots[pool][row] = page * args.block_tokens + position % args.block_tokens;
    if (pool == 0) {
        const int64_t token = input(kToken);
        args.token_ids[row] = token == kNewestToken ? args.newest[input(kTableRow)] : token;
        const double* bits = reinterpret_cast<const double*>(args.inputs);
        args.top_p[row] = static_cast<float>(bits[kTopP * args.input_stride + row]);
    }
}

struct Best {
    float value;
    int64_t at;
};

// The larger value, the lower place of two that are equal.
DEVICE Best better(const Best& a, const Best& b) {
    return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a;
}

// Calls use(element, place) for all elements of a row, a thread for every so many of them.
template <typename Type, typename Piece, typename Use>
DEVICE void for_each(const void* rows, int64_t row, int64_t size, Use use) {
    constexpr int kElements = Piece::kElements;
    const Type* elements = static_cast<const Type*>(rows) + row * size;
    if (size % kElements != 0) {
        for (int64_t at = threadIdx.x; at < size; at += blockDim.x) {
            use(elements[at].value(), at);
        }
        return;
    }
    const Piece* pieces = reinterpret_cast<const Piece*>(elements);
#pragma unroll 4
    for (int64_t at = threadIdx.x; at < size / kElements; at += blockDim.x) {
        float values[kElements];
        pieces[at].floats(values);
#pragma unroll
        for (int e = 0; e < kElements; ++e) use(values[e], at * kElements + e);
    }
}

// Token of a row, and whether its numbers are finite.
template <typename Type, typename Piece>
DEVICE void pick_token(const PickArgs& args, int64_t row) {
    __shared__ Best of_warps[kPickThreads / 32];
    Best best = {-INFINITY, args.vocabulary - 1};
    bool wrong = false;
    for_each<Type, Piece>(args.logits, row, args.vocabulary, [&](float value, int64_t at) {
        wrong |= !is_finite(value);
        best = better(best, {value, at});
    });
    for_each<Type, Piece>(args.hidden, row, args.hidden_size,
                          [&](float value, int64_t) { wrong |= !is_finite(value); });
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float value = __shfl_xor_sync(kAllLanes, best.value, step);
        const int64_t at = __shfl_xor_sync(kAllLanes, best.at, step);
        best = better(best, {value, at});
    }
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
    const int failed = __syncthreads_count(wrong);
    if (threadIdx.x != 0) return;
    const int warps = blockDim.x / 32;
    for (int warp = 1; warp < warps; ++warp) best = better(best, of_warps[warp]);
    args.out[row] = static_cast<double>(best.at);
    args.out[args.rows + row] = failed == 0;
    if (input_of(args, kContext, row) > 0) args.newest[input_of(args, kTableRow, row)] = best.at;
}

struct Sums {
    double pairs, tokens, fraction;
};

DEVICE void add_count(const PickArgs& args, int64_t row, int64_t head, Sums& sums) {
    const int64_t samples = input_of(args, kSamples, row);
    const int64_t count = args.counts[row * args.heads + head] * samples;
    const int64_t length = input_of(args, kContext, row), context = length > 1 ? length : 1;
    sums.pairs += count > 0;
    sums.tokens += static_cast<double>(count);
    sums.fraction += static_cast<double>(count) / static_cast<double>(context);
}

// Of a row over its heads, by one warp.
DEVICE void sum_row(const PickArgs& args, int64_t row) {
    if (threadIdx.x >= 32) return;
    Sums sums = {};
    for (int64_t head = threadIdx.x; head < args.heads; head += 32) {
        add_count(args, row, head, sums);
    }
    sums = {warp_sum(sums.pairs), warp_sum(sums.tokens), warp_sum(sums.fraction)};
    if (threadIdx.x != 0) return;
    args.out[2 * args.rows + row] = sums.pairs;
    args.out[3 * args.rows + row] = sums.tokens;
    args.out[4 * args.rows + row] = sums.fraction;
}

// Of each head over the rows.
DEVICE void sum_heads(const PickArgs& args) {
    double* out = args.out + 5 * args.rows;
    for (int64_t head = threadIdx.x; head < args.heads; head += blockDim.x) {
        Sums sums = {};
        for (int64_t row = 0; row < args.rows; ++row) add_count(args, row, head, sums);
        out[head] = sums.fraction;
        out[args.heads + head] = sums.pairs;
    }
}

// A CTA for each row, and one more for what is summed over the rows.
template <typename Type, typename Piece>
__global__ void __launch_bounds__(kPickThreads)
    pick_kernel(const __grid_constant__ PickArgs args) {
    const int64_t row = blockIdx.x;
    if (row == args.rows) {
        sum_heads(args);
        return;
    }
    if (args.counts != nullptr) sum_row(args, row);
    pick_token<Type, Piece>(args, row);
}

}  // namespace
}  // namespace rtpurbo

using namespace rtpurbo;

extern "C" int64_t rtpurbo_place_rows_bytes() { return sizeof(PlaceArgs); }

extern "C" int rtpurbo_place_rows(const PlaceArgs* args, void* stream) {
    return launch(place_kernel, dim3(static_cast<unsigned>(args->rows), 2), kPlaceThreads, 0,
                  stream, *args);
}

extern "C" int64_t rtpurbo_pick_tokens_bytes() { return sizeof(PickArgs); }

extern "C" int rtpurbo_pick_tokens(const PickArgs* args, void* stream) {
    const dim3 grid(static_cast<unsigned>(args->rows + (args->counts != nullptr)));
    const int64_t wanted = (args->vocabulary / piece_elements(args->data_type) + 31) / 32 * 32;
    const int64_t threads = wanted < 32 ? 32 : wanted < kPickThreads ? wanted : kPickThreads;
    return launch(args->data_type == kBfloat16 ? pick_kernel<Bfloat16, Bfloat16Piece>
                                               : pick_kernel<Float32, Float32Piece>,
                  grid, static_cast<int>(threads), 0, stream, *args);
}
