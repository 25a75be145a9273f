// Prefill attention on Hopper: window and sinks, everything before a query, or lists of blocks.
//
// A CTA of three warpgroups computes 128 queries of one head. One warp of the first loads pages by
// TMA, two stages ahead; the other two compute 64 rows each (products by wgmma, probabilities stay
// in registers). They take turns in issuing products, so that one's softmax runs under the other's
// products, and each issues its next scores before it multiplies the last probabilities with their
// values. This is the structure of FlashAttention-3 (arXiv 2407.08608).
//
// A tile of keys is two pages. The sinks are an extra tile; only tiles at an edge (diagonal, far end
// of the window, sinks, a list with an odd number of blocks) are masked. Pages that no query of the
// tile sees are never read: their rows are filled with zeros, for what lies there may be another
// sequence's, or no number at all. So is the unwritten end of a context's last page.
//
// CTAs stay and take tiles at fixed steps, the longest contexts first; the loading warp runs ahead
// into the next one. Heads stand side by side, so that those of a KV head share it in the L2 cache.

#include "hopper.cuh"
#include "span_args.h"

namespace rtpurbo {
namespace {

constexpr int kStages = 2;
constexpr int kKeys = 2 * kSpanBlock;  // of a tile
constexpr int kComputeThreads = 256;
constexpr int kThreads = 128 + kComputeThreads;
constexpr int kComputeWarps = kComputeThreads / 32;
constexpr int kNoBlock = 1 << 24;  // times 64 is a position that no query reaches
constexpr int kTurnBarrier = 1;    // and 2: named barriers; 0 is __syncthreads
constexpr int kAllBarrier = 3;
constexpr int kHalfColumns = 64;
constexpr uint32_t kQuad = 0xffffffffu;

struct SpanLaunch {
    CUtensorMap queries;  // [T, H, D], boxes of 128 x 1 x 64
    CUtensorMap keys;     // rows of all pages, boxes of 64 x 64
    CUtensorMap values;
    SpanArgs args;
};

template <int kDim>
struct alignas(1024) SpanShared {
    static constexpr int kHalves = kDim / kHalfColumns;
    unsigned char queries[kHalves][kSpanQueries * 128];
    unsigned char keys[kStages][kHalves][kKeys * 128];
    unsigned char values[kStages][kHalves][kKeys * 128];
    uint64_t queries_full, queries_empty;
    uint64_t keys_full[kStages], keys_empty[kStages];
    uint64_t values_full[kStages], values_empty[kStages];
};

// Place in the ring of stages, and the parity of the round.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    DEVICE void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// 128 queries of one head: where they stand, and which tiles of keys they need, newest first.
struct Work {
    int64_t head;
    int64_t row_begin;  // among all query tokens
    int rows;           // in use
    int span, kv_row, context;
    int first, last;  // positions of the first and last query
    int lowest;       // position at which the first query's window begins
    int high, low, sink_tiles;  // tiles [low, high] and [0, sink_tiles) by the window rule
    const int32_t* list;        // or null
    int count;                  // blocks of the list
    int tiles;

    // False if no span has such a tile.
    DEVICE bool find(const SpanArgs& args, int64_t item) {
        int64_t tile = args.tiles - 1 - item / args.group;
        const int64_t member = item % args.group;
        const int64_t at = tile * args.group + member;
        int64_t begin = 0, end = 0;
        for (span = 0; span < args.spans; ++span) {
            begin = args.query_starts[span];
            end = args.query_starts[span + 1];
            const int64_t own = (end - begin + kSpanQueries - 1) / kSpanQueries;
            if (tile < own) break;
            tile -= own;
        }
        if (span == args.spans) return false;
        head = args.heads[member];
        kv_row = static_cast<int>(args.kv_rows[member]);
        context = static_cast<int>(args.context_lens[span]);
        row_begin = begin + tile * kSpanQueries;
        rows = static_cast<int>(min(end - row_begin, int64_t{kSpanQueries}));
        first = context - static_cast<int>(end - row_begin);
        last = first + rows - 1;
        list = nullptr;
        if (args.lists != nullptr) {
            list = args.lists + at * args.list_width;
            count = args.list_counts[at];
            tiles = (count + 1) / 2;
            return true;
        }
        lowest = max(first - static_cast<int>(args.window) + 1, 0);
        high = last / kKeys;
        low = lowest / kKeys;
        sink_tiles = min((static_cast<int>(args.sinks) + kKeys - 1) / kKeys, low);
        tiles = high - low + 1 + sink_tiles;
        return true;
    }

    // Block of a half of tile i, or kNoBlock.
    DEVICE int block_of(int i, int half) const {
        if (list != nullptr) {
            const int at = count - 2 - 2 * i + half;
            return at < 0 ? kNoBlock : list[at];
        }
        const int behind = high - i;
        return 2 * (behind >= low ? behind : behind - low + sink_tiles) + half;
    }

    DEVICE bool sees(const SpanArgs& args, int block) const {
        const int begin = block * kSpanBlock;
        if (begin > last) return false;
        return list != nullptr || begin + kSpanBlock > lowest || begin < args.sinks;
    }

    // Whether some query may not see some key of tile i.
    DEVICE bool is_edge(const SpanArgs& args, int i) const {
        const int lower = block_of(i, 0), upper = block_of(i, 1);
        if (lower == kNoBlock || (upper + 1) * kSpanBlock - 1 > first) return true;
        return list == nullptr && lower * kSpanBlock <= last - static_cast<int>(args.window);
    }
};

DEVICE int64_t page_at(const SpanArgs& args, int span, int block) {
    const int64_t at = span * args.table.row_stride + block;
    return args.table.is_64_bit ? static_cast<const int64_t*>(args.table.pages)[at]
                                : static_cast<const int32_t*>(args.table.pages)[at];
}

// One lane loads all tiles of this CTA's work.
template <int kDim>
DEVICE void load_everything(const SpanLaunch& launch, SpanShared<kDim>& shared) {
    constexpr int kHalves = SpanShared<kDim>::kHalves;
    const SpanArgs& args = launch.args;
    const int64_t items = args.tiles * args.group;
    const int nowhere = static_cast<int>(args.pages * args.cache_heads) * kSpanBlock;
    Ring keys, values;
    uint32_t queries_parity = 0;
    Work work;

    auto row_of = [&](int i, int half) {
        const int block = work.block_of(i, half);
        if (!work.sees(args, block)) return nowhere;  // rows past the end arrive as zeros
        const int64_t page = page_at(args, work.span, block);
        return static_cast<int>(page * args.cache_heads + work.kv_row) * kSpanBlock;
    };
    auto load = [&](const CUtensorMap& map, unsigned char (&tile)[kHalves][kKeys * 128],
                    uint64_t* full, int i) {
        hopper::barrier_expect_bytes(full, kKeys * kDim * 2);
        for (int page = 0; page < 2; ++page) {
            const int row = row_of(i, page);
            for (int half = 0; half < kHalves; ++half) {
                hopper::load_2d(tile[half] + page * kSpanBlock * 128, &map, full,
                                half * kHalfColumns, row);
            }
        }
    };

    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        if (!work.find(args, item)) continue;
        hopper::barrier_wait(&shared.queries_empty, queries_parity ^ 1);
        queries_parity ^= 1;
        hopper::barrier_expect_bytes(&shared.queries_full, kSpanQueries * kDim * 2);
        for (int half = 0; half < kHalves; ++half) {
            hopper::load_3d(shared.queries[half], &launch.queries, &shared.queries_full,
                            half * kHalfColumns, static_cast<int>(work.head),
                            static_cast<int>(work.row_begin));
        }
        for (int i = 0; i <= work.tiles; ++i) {  // values stay a tile behind keys
            if (i < work.tiles) {
                hopper::barrier_wait(&shared.keys_empty[keys.stage], keys.parity ^ 1);
                load(launch.keys, shared.keys[keys.stage], &shared.keys_full[keys.stage], i);
                keys.advance();
            }
            if (i > 0) {
                hopper::barrier_wait(&shared.values_empty[values.stage], values.parity ^ 1);
                load(launch.values, shared.values[values.stage],
                     &shared.values_full[values.stage], i - 1);
                values.advance();
            }
        }
    }
}

// Scores of a tile: s = q k^T for the 64 rows of this warpgroup. Thread t holds of rows
// 16 (t / 32) + t % 32 / 4 and 8 further down the columns 8 j + 2 (t % 4) and the next:
// s[4 j], s[4 j + 1], and s[4 j + 2], s[4 j + 3].
template <int kDim>
DEVICE void multiply_keys(float (&s)[64], const unsigned char* queries, const unsigned char* keys) {
    const uint64_t q = hopper::tile_descriptor(queries, 0);
    const uint64_t k = hopper::tile_descriptor(keys, 0);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
        // 16 columns are 32 bytes; halves of queries and keys are as large as each other.
        const uint64_t at = (step % 4 * 32 + step / 4 * kKeys * 128) >> 4;
        hopper::multiply_64x128(s, q + at, k + at, step != 0);
    }
}

template <int kDim>
DEVICE void multiply_values(float (&o)[kDim / 2], const uint32_t (&p)[32],
                            const unsigned char* values) {
    const uint64_t v = hopper::tile_descriptor(values, kKeys * 128);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
        hopper::multiply_add_rows(o, p + 4 * step, v + (step * 16 * 128 >> 4));
    }
}

// What this thread keeps of its two rows.
struct Rows {
    float peak[2];   // largest score so far
    float total[2];  // sum of its own columns' weights

    // Scores to weights 2^(scale (s - peak)); returns by what earlier sums shrink.
    DEVICE void weigh(float (&s)[64], float scale, float (&shrink)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float highest = peak[r];
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                highest = fmaxf(highest, s[4 * (j / 2) + 2 * r + j % 2]);
            }
            highest = fmaxf(highest, __shfl_xor_sync(kQuad, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(kQuad, highest, 2));
            const float base = highest == -INFINITY ? 0.f : highest * scale;
            shrink[r] = exp2_fast(peak[r] * scale - base);
            peak[r] = highest;
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                float& value = s[4 * (j / 2) + 2 * r + j % 2];
                value = exp2_fast(value * scale - base);
                sum += value;
            }
            total[r] = total[r] * shrink[r] + sum;
        }
    }
};

DEVICE void hide_unseen(float (&s)[64], const Work& work, const SpanArgs& args, int i, int row) {
    const int lane_column = threadIdx.x % 4 * 2;
    const int window = work.list == nullptr ? static_cast<int>(args.window) : kNoBlock * kSpanBlock;
    const int sinks = static_cast<int>(args.sinks);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int begin = work.block_of(i, half) * kSpanBlock + lane_column;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int position = min(work.first + row + 8 * r, work.last);
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const int key = begin + j / 2 * 8 + j % 2;
                const bool seen =
                    key <= position && (position - key < window || key < sinks);
                float& value = s[32 * half + 4 * (j / 2) + 2 * r + j % 2];
                if (!seen) value = -INFINITY;
            }
        }
    }
}

DEVICE void pack(uint32_t (&p)[32], const float (&s)[64]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pack_bfloat16(s[2 * i], s[2 * i + 1]);
    hopper::pin(p);
}

// The last page of a context may end in places that were never written: zeros, for 0 * NaN is NaN.
template <int kDim>
DEVICE void clear_unwritten(const Work& work, unsigned char (&values)[kDim / 64][kKeys * 128]) {
    const int written = work.context % kSpanBlock;
    const int half = work.block_of(0, 1) == work.context / kSpanBlock;
    const int thread = threadIdx.x - 128;
    constexpr int kRowChunks = 8;  // of 16 bytes; swizzling keeps them in their row
    for (int at = thread; at < (kSpanBlock - written) * kRowChunks * (kDim / 64);
         at += kComputeThreads) {
        const int chunk = at % kRowChunks, row = at / kRowChunks % (kSpanBlock - written);
        const int columns = at / kRowChunks / (kSpanBlock - written);
        unsigned char* target = values[columns] + (half * kSpanBlock + written + row) * 128;
        reinterpret_cast<uint4*>(target)[chunk] = make_uint4(0, 0, 0, 0);
    }
    hopper::publish_shared();
    hopper::named_sync(kAllBarrier, kComputeThreads);
}

DEVICE bool has_unwritten(const Work& work) {
    const int block = work.context / kSpanBlock;
    return work.context % kSpanBlock != 0 &&
           (work.block_of(0, 0) == block || work.block_of(0, 1) == block);
}

template <int kDim>
DEVICE void write_out(const SpanArgs& args, const Work& work, const float (&o)[kDim / 2],
                      const Rows& sums, int row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float total = sums.total[r];
        total += __shfl_xor_sync(kQuad, total, 1);
        total += __shfl_xor_sync(kQuad, total, 2);
        const float inverse = 1.f / total;
        if (row + 8 * r >= work.rows) continue;
        const int64_t at = (work.row_begin + row + 8 * r) * args.out_row_stride +
                           work.head * args.out_head_stride + threadIdx.x % 4 * 2;
        uint32_t* target = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(args.out) + at);
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) {
            target[4 * j] =
                pack_bfloat16(o[4 * j + 2 * r] * inverse, o[4 * j + 2 * r + 1] * inverse);
        }
    }
}

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
    Work work;

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
        Rows sums = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
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
        for (int stage = 0; stage < kStages; ++stage) {
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
