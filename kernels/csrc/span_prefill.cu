// Prefill attention on Hopper: window and sinks, everything before a query, or lists of blocks.
//
// A CTA of three warpgroups computes 128 queries of one head. One warp of the first loads pages by
// TMA, three stages ahead (span_load.cuh); the other two compute 64 rows each (products by wgmma,
// probabilities stay in registers: span_rows.cuh). They take turns in issuing products, so that one's
// softmax runs under the other's products, and each issues its next scores before it multiplies the
// last probabilities with their values. This is the structure of FlashAttention-3 (arXiv 2407.08608).
//
// A tile of keys is two pages. The sinks are an extra tile; only tiles at an edge (diagonal, far end
// of the window, sinks, a list with an odd number of blocks) are masked, and all others run through a
// loop of their own without a branch. Pages that no query of the tile sees are never read: their rows
// are filled with zeros, for what lies there may be another sequence's, or no number at all. So is the
// unwritten end of a context's last page.
//
// CTAs stay and take tiles of queries, the longest contexts first. With a counter each takes the next
// one when it is done: so they end together, and those at work have the same keys in the L2 cache. At
// fixed steps the first CTA would have a longer context than the last in every round and fall behind
// it by thousands of tiles; where all have a window's keys that cannot be, and fixed steps are faster.
// The loading warp runs ahead into the next tile; it alone looks up where tiles stand. Heads stand
// side by side, so that those of a KV head share it in the L2 cache.

#include <type_traits>

#include "device.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "numbers.cuh"
#include "span_args.h"
#include "span_load.cuh"
#include "span_rows.cuh"
#include "span_shared.cuh"
#include "span_work.cuh"

namespace rtpurbo {
namespace {

constexpr int kThreads = 128 + kComputeThreads;
constexpr int kComputeWarps = kComputeThreads / 32;

// A warpgroup's 64 rows of all tiles of this CTA's work.
template <int kDim>
DEVICE void compute_everything(const SpanLaunch& launch, SpanShared<kDim>& shared) {
    const SpanArgs& args = launch.args;
    const int mine = hopper::of_warp(threadIdx.x / 128 - 1);
    const int row = mine * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const bool is_lane_0 = threadIdx.x % 32 == 0;
    const float scale = static_cast<float>(args.scale * kLog2E<double>);
    Ring keys, values;

    auto release = [&](uint64_t* barrier) {
        if (is_lane_0) hopper::barrier_arrive(barrier);
    };
    auto take_turn = [&] { hopper::named_sync(kTurnBarrier + mine, kComputeThreads); };
    auto pass_turn = [&] { hopper::named_arrive(kTurnBarrier + 1 - mine, kComputeThreads); };
    if (mine == 1) pass_turn();  // the first turn is the other's

    for (uint32_t parity = 0;; parity ^= 1) {
        hopper::barrier_wait(&shared.queries_full, parity);
        const SpanWork& work = shared.work;  // until the queries are released
        const int tiles = work.tiles;
        if (tiles == 0) break;
        const unsigned char* queries = shared.queries[0] + mine * 64 * 128;
        float s[64], o[kDim / 2];
        uint32_t p[32];
        SpanRows sums = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
        float shrink[2];
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] = 0.f;

        hopper::barrier_wait(&shared.keys_full[keys.stage], keys.parity);
        hopper::pin(s);
        hopper::products_begin();
        multiply_keys<kDim>(s, queries, shared.keys[keys.stage][0]);
        hopper::products_commit();
        hopper::products_wait<0>();
        hopper::pin(s);
        release(&shared.keys_empty[keys.stage]);
        keys.advance();
        if (!work.is_whole(0)) hide_unseen(s, work, args, 0, row);
        sums.weigh(s, scale, shrink);
        pack(p, s);
        if (work.unwritten_begin < work.unwritten_end) {
            hopper::barrier_wait(&shared.values_full[values.stage], values.parity);
            clear_unwritten<kDim>(work, shared.values[values.stage]);
        }

        // Scores of tile i, while the weights of the one before meet their values.
        auto step = [&](int i, auto is_whole) {
            hopper::barrier_wait(&shared.keys_full[keys.stage], keys.parity);
            take_turn();
            hopper::pin(s);
            hopper::pin(o);
            hopper::products_begin();
            multiply_keys<kDim>(s, queries, shared.keys[keys.stage][0]);
            hopper::products_commit();
            hopper::barrier_wait(&shared.values_full[values.stage], values.parity);
            multiply_values<kDim>(o, p, shared.values[values.stage][0]);
            hopper::products_commit();
            pass_turn();
            hopper::products_wait<1>();
            hopper::pin(s);
            release(&shared.keys_empty[keys.stage]);
            keys.advance();
            if constexpr (!decltype(is_whole)::value) hide_unseen(s, work, args, i, row);
            sums.weigh(s, scale, shrink);
            hopper::pin(s);
            hopper::after(sums.total[0] + sums.total[1]);
            hopper::products_wait<0>();
            hopper::pin(o);
            release(&shared.values_empty[values.stage]);
            values.advance();
            shrink_sums(o, shrink);
            pack(p, s);
        };
        for (int i = 1; i < tiles;) {
            if (work.is_whole(i)) {
                const int end = work.whole_end;
                do step(i, std::true_type{});
                while (++i < end);
            } else {
                step(i++, std::false_type{});
            }
        }
        const SpanPlace place(args, work, row);
        // Each for itself: racecheck does not follow a thread that arrives for its warp.
        hopper::barrier_arrive(&shared.queries_empty);

        hopper::barrier_wait(&shared.values_full[values.stage], values.parity);
        hopper::pin(o);
        hopper::products_begin();
        multiply_values<kDim>(o, p, shared.values[values.stage][0]);
        hopper::products_commit();
        hopper::products_wait<0>();
        hopper::pin(o);
        release(&shared.values_empty[values.stage]);
        values.advance();
        write_out<kDim>(place, o, sums);
    }
    // A turn may be left that nobody takes.
    if (mine == 0) take_turn();
}

template <int kDim, bool kFixedSteps>
__global__ void __launch_bounds__(kThreads, 1)
    span_prefill_kernel(const __grid_constant__ SpanLaunch launch) {
#ifdef RTPURBO_HAS_HOPPER
    DYNAMIC_SHARED(raw);
    const uint32_t misaligned = hopper::shared_address(raw) % 1024;
    auto& shared = *reinterpret_cast<SpanShared<kDim>*>(raw + (1024 - misaligned) % 1024);
    if (threadIdx.x == 0) {
        hopper::barrier_init(&shared.queries_full, 1);
        hopper::barrier_init(&shared.queries_empty, kComputeThreads);
        for (int stage = 0; stage < kSpanStages; ++stage) {
            hopper::barrier_init(&shared.keys_full[stage], 1);
            hopper::barrier_init(&shared.keys_empty[stage], kComputeWarps);
            hopper::barrier_init(&shared.values_full[stage], 1);
            hopper::barrier_init(&shared.values_empty[stage], kComputeWarps);
        }
        hopper::publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        hopper::give_registers_back<56>();
        if (threadIdx.x == 0) load_everything<kDim, kFixedSteps>(launch, shared);
    } else {
        hopper::take_registers<224>();
        compute_everything<kDim>(launch, shared);
    }
#endif
}

int encode_maps(SpanLaunch& launch) {
    const SpanArgs& args = launch.args;
    const auto dim = static_cast<uint64_t>(args.head_dim);
    const uint64_t query_sizes[] = {dim, static_cast<uint64_t>(args.layer_heads),
                                    static_cast<uint64_t>(args.tokens)};
    const uint64_t query_strides[] = {static_cast<uint64_t>(args.query_head_stride) * 2,
                                      static_cast<uint64_t>(args.query_row_stride) * 2};
    const uint32_t query_box[] = {kHalfColumns, 1, kSpanQueries};
    const uint64_t rows = static_cast<uint64_t>(args.pages * args.cache_heads) * kSpanBlock;
    const uint64_t page_sizes[] = {dim, rows};
    const uint64_t page_strides[] = {dim * 2};
    const uint32_t page_box[] = {kHalfColumns, kSpanBlock};
    if (int error = hopper::encode_map(&launch.queries, args.queries, 3, query_sizes,
                                       query_strides, query_box)) {
        return error;
    }
    if (int error = hopper::encode_map(&launch.keys, args.keys, 2, page_sizes, page_strides,
                                       page_box)) {
        return error;
    }
    return hopper::encode_map(&launch.values, args.values, 2, page_sizes, page_strides, page_box);
}

template <int kDim, bool kFixedSteps>
int launch_kernel(const SpanLaunch& prepared, int ctas, void* stream) {
    const auto kernel = span_prefill_kernel<kDim, kFixedSteps>;
    const int shared_bytes = static_cast<int>(sizeof(SpanShared<kDim>)) + 1024;
    if (int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         shared_bytes)) {
        return error;
    }
    return launch(kernel, dim3(static_cast<unsigned>(ctas)), kThreads, shared_bytes, stream,
                  prepared);
}

template <int kDim>
int launch_spans(const SpanLaunch& prepared, int ctas, void* stream) {
    if (prepared.args.taken == nullptr) return launch_kernel<kDim, true>(prepared, ctas, stream);
    return launch_kernel<kDim, false>(prepared, ctas, stream);
}

}  // namespace
}  // namespace rtpurbo

using namespace rtpurbo;

extern "C" int64_t rtpurbo_span_args_bytes() { return sizeof(SpanArgs); }

// cudaErrorNoKernelImageForDevice on any chip but those of compute capability 9.0.
extern "C" int rtpurbo_span_prefill(const SpanArgs* args, void* stream) {
    int device = 0, major = 0, minor = 0, multiprocessors = 0;
    if (int error = cudaGetDevice(&device)) return error;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (major != 9 || minor != 0) return cudaErrorNoKernelImageForDevice;
    const int64_t rows = args->pages * args->cache_heads * kSpanBlock;
    const int64_t items = args->tiles * args->group;
    if (rows >= int64_t{1} << 31 || items >= int64_t{1} << 31 || args->window > 1 << 30 ||
        args->sinks > 1 << 30) {
        return cudaErrorInvalidValue;
    }
    if (items == 0) return cudaSuccess;
    SpanLaunch prepared = {};
    prepared.args = *args;
    if (int error = encode_maps(prepared)) return error;
    const int ctas = static_cast<int>(items < multiprocessors ? items : multiprocessors);
    if (args->head_dim == 128) return launch_spans<128>(prepared, ctas, stream);
    if (args->head_dim == 64) return launch_spans<64>(prepared, ctas, stream);
    return cudaErrorInvalidValue;
}
