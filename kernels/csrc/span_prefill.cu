// Prefill attention on Hopper: window and sinks, everything before a query, or lists of blocks.
//
// A CTA of three warpgroups computes 128 queries of one head. One warp of the first loads pages by
// TMA, two stages ahead (span_load.cuh); the other two compute 64 rows each (products by wgmma,
// probabilities stay in registers: span_rows.cuh). They take turns in issuing products, so that one's
// softmax runs under the other's products, and each issues its next scores before it multiplies the
// last probabilities with their values. This is the structure of FlashAttention-3 (arXiv 2407.08608).
//
// A tile of keys is two pages. The sinks are an extra tile; only tiles at an edge (diagonal, far end
// of the window, sinks, a list with an odd number of blocks) are masked. Pages that no query of the
// tile sees are never read: their rows are filled with zeros, for what lies there may be another
// sequence's, or no number at all. So is the unwritten end of a context's last page.
//
// CTAs stay and take tiles at fixed steps, the longest contexts first; the loading warp runs ahead
// into the next one. Heads stand side by side, so that those of a KV head share it in the L2 cache.

#include "device.cuh"
#include "hopper.cuh"
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
    const int64_t items = args.tiles * args.group;
    const int mine = threadIdx.x / 128 - 1;
    const int row = mine * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const bool is_lane_0 = threadIdx.x % 32 == 0;
    const float scale = static_cast<float>(args.scale * 1.4426950408889634);
    Ring keys, values;
    uint32_t queries_parity = 0;
    SpanWork work;

    auto release = [&](uint64_t* barrier) {
        if (is_lane_0) hopper::barrier_arrive(barrier);
    };
    auto take_turn = [&] { hopper::named_sync(kTurnBarrier + mine, kComputeThreads); };
    auto pass_turn = [&] { hopper::named_arrive(kTurnBarrier + 1 - mine, kComputeThreads); };
    if (mine == 1) pass_turn();  // the first turn is the other's

    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        if (!work.find(args, item)) continue;
        const unsigned char* queries = shared.queries[0] + mine * 64 * 128;
        float s[64], o[kDim / 2];
        uint32_t p[32];
        SpanRows sums = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
        float shrink[2];
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] = 0.f;

        hopper::barrier_wait(&shared.queries_full, queries_parity);
        queries_parity ^= 1;
        hopper::barrier_wait(&shared.keys_full[keys.stage], keys.parity);
        hopper::pin(s);
        hopper::products_begin();
        multiply_keys<kDim>(s, queries, shared.keys[keys.stage][0]);
        hopper::products_commit();
        hopper::products_wait<0>();
        hopper::pin(s);
        release(&shared.keys_empty[keys.stage]);
        keys.advance();
        if (work.is_edge(args, 0)) hide_unseen(s, work, args, 0, row);
        sums.weigh(s, scale, shrink);
        pack(p, s);
        if (has_unwritten(work)) {
            hopper::barrier_wait(&shared.values_full[values.stage], values.parity);
            clear_unwritten<kDim>(work, shared.values[values.stage]);
        }

        for (int i = 1; i < work.tiles; ++i) {
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
            if (work.is_edge(args, i)) hide_unseen(s, work, args, i, row);
            sums.weigh(s, scale, shrink);
            hopper::pin(s);
            hopper::after(sums.total[0] + sums.total[1]);
            hopper::products_wait<0>();
            hopper::pin(o);
            release(&shared.values_empty[values.stage]);
            values.advance();
#pragma unroll
            for (int j = 0; j < kDim / 2; ++j) o[j] *= shrink[j / 2 % 2];
            pack(p, s);
        }
        release(&shared.queries_empty);

        hopper::barrier_wait(&shared.values_full[values.stage], values.parity);
        hopper::pin(o);
        hopper::products_begin();
        multiply_values<kDim>(o, p, shared.values[values.stage][0]);
        hopper::products_commit();
        hopper::products_wait<0>();
        hopper::pin(o);
        release(&shared.values_empty[values.stage]);
        values.advance();
        write_out<kDim>(args, work, o, sums, row);
    }
    // A turn may be left that nobody takes.
    if (mine == 0) take_turn();
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    span_prefill_kernel(const __grid_constant__ SpanLaunch launch) {
#ifdef RTPURBO_HAS_HOPPER
    DYNAMIC_SHARED(raw);
    const uint32_t misaligned = hopper::shared_address(raw) % 1024;
    auto& shared = *reinterpret_cast<SpanShared<kDim>*>(raw + (1024 - misaligned) % 1024);
    if (threadIdx.x == 0) {
        hopper::barrier_init(&shared.queries_full, 1);
        hopper::barrier_init(&shared.queries_empty, kComputeWarps);
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
        hopper::give_registers_back<40>();
        if (threadIdx.x == 0) load_everything<kDim>(launch, shared);
    } else {
        hopper::take_registers<232>();
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

template <int kDim>
int launch_spans(const SpanLaunch& prepared, int ctas, void* stream) {
    const int shared_bytes = static_cast<int>(sizeof(SpanShared<kDim>)) + 1024;
    if (int error = cudaFuncSetAttribute(span_prefill_kernel<kDim>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         shared_bytes)) {
        return error;
    }
    return launch(span_prefill_kernel<kDim>, dim3(static_cast<unsigned>(ctas)), kThreads,
                  shared_bytes, stream, prepared);
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
    if (rows >= int64_t{1} << 31 || args->window > 1 << 30 || args->sinks > 1 << 30) {
        return cudaErrorInvalidValue;
    }
    const int64_t items = args->tiles * args->group;
    if (items == 0) return cudaSuccess;
    SpanLaunch prepared = {};
    prepared.args = *args;
    if (int error = encode_maps(prepared)) return error;
    const int ctas = static_cast<int>(items < multiprocessors ? items : multiprocessors);
    if (args->head_dim == 128) return launch_spans<128>(prepared, ctas, stream);
    if (args->head_dim == 64) return launch_spans<64>(prepared, ctas, stream);
    return cudaErrorInvalidValue;
}
