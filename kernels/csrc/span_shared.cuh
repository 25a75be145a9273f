// What the warps of a prefilling CTA share: descriptors of tensors, stages of tiles, and barriers.
#pragma once

#include "hopper.cuh"
#include "span_args.h"
#include "span_work.cuh"

namespace rtpurbo {

constexpr int kSpanStages = 3;
constexpr int kComputeThreads = 256;
constexpr int kTurnBarrier = 1;  // and 2: named barriers; 0 is __syncthreads
constexpr int kAllBarrier = 3;
constexpr int kHalfColumns = 64;

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
    unsigned char keys[kSpanStages][kHalves][kSpanKeys * 128];
    unsigned char values[kSpanStages][kHalves][kSpanKeys * 128];
    SpanWork work;  // of the queries
    uint64_t queries_full, queries_empty;
    uint64_t keys_full[kSpanStages], keys_empty[kSpanStages];
    uint64_t values_full[kSpanStages], values_empty[kSpanStages];
};

// Place in the ring of stages, and the parity of the round.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    DEVICE void advance() {
        if (++stage == kSpanStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

}  // namespace rtpurbo
