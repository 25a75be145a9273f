// What a warpgroup does with its 64 rows of queries and one tile: products, softmax, edges, output.
#pragma once

#include "cta.cuh"
#include "device.cuh"
#include "hopper.cuh"
#include "numbers.cuh"
#include "span_args.h"
#include "span_shared.cuh"
#include "span_work.cuh"

namespace rtpurbo {

// Scores of a tile: s = q k^T for the 64 rows of this warpgroup. Thread t holds of rows
// 16 (t / 32) + t % 32 / 4 and 8 further down the columns 8 j + 2 (t % 4) and the next:
// s[4 j], s[4 j + 1], and s[4 j + 2], s[4 j + 3].
template <int kDim>
DEVICE void multiply_keys(float (&s)[64], const unsigned char* queries, const unsigned char* keys) {
    const hopper::Tile q(queries, 0), k(keys, 0);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
        // 16 columns are 32 bytes; halves of queries and keys are as large as each other.
        const int at = step % 4 * 32 + step / 4 * kSpanKeys * 128;
        hopper::multiply_64x128(s, q + at, k + at, step != 0);
    }
}

template <int kDim>
DEVICE void multiply_values(float (&o)[kDim / 2], const uint32_t (&p)[32],
                            const unsigned char* values) {
    const hopper::Tile v(values, kSpanKeys * 128);
#pragma unroll
    for (int step = 0; step < kSpanKeys / 16; ++step) {
        hopper::multiply_add_rows(o, p + 4 * step, v + step * 16 * 128);
    }
}

// What this thread keeps of its two rows.
struct SpanRows {
    float peak[2];   // largest score so far
    float total[2];  // sum of its own columns' weights

    // Scores to weights 2^(scale (s - peak)); returns by what earlier sums shrink, most often 1.
    DEVICE void weigh(float (&s)[64], float scale, float (&shrink)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float highest = largest(s, r);
            highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
            const float origin = reference_of(highest);
            const float base = origin * scale;
            shrink[r] = exp2_fast((peak[r] - origin) * scale);
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

    // Of a row's own columns and its peak; four at a time, for a maximum waits for the one before.
    DEVICE float largest(const float (&s)[64], int r) const {
        float part[4] = {peak[r], peak[r], peak[r], peak[r]};
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            part[j % 4] = fmaxf(part[j % 4], s[4 * (j / 2) + 2 * r + j % 2]);
        }
        return fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
    }
};

// Skipped by a warp none of whose rows has a new peak.
template <int kCount>
DEVICE void shrink_sums(float (&o)[kCount], const float (&shrink)[2]) {
    if (!__any_sync(kAllLanes, shrink[0] != 1.f || shrink[1] != 1.f)) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) o[j] *= shrink[j / 2 % 2];
}

DEVICE void hide_unseen(float (&s)[64], const SpanWork& work, const SpanArgs& args, int i,
                        int row) {
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
DEVICE void clear_unwritten(const SpanWork& work,
                            unsigned char (&values)[kDim / 64][kSpanKeys * 128]) {
    constexpr int kRowChunks = 8;  // of 16 bytes; swizzling keeps them in their row
    constexpr int kPageChunks = kSpanBlock * kRowChunks;
    for (int at = threadIdx.x - 128; at < kPageChunks * (kDim / 64); at += kComputeThreads) {
        const int chunk = at % kRowChunks;
        const int row = work.unwritten_begin + at % kPageChunks / kRowChunks;
        if (row >= work.unwritten_end) continue;
        unsigned char* target = values[at / kPageChunks] + row * 128;
        reinterpret_cast<uint4*>(target)[chunk] = make_uint4(0, 0, 0, 0);
    }
    hopper::publish_shared();
    hopper::named_sync(kAllBarrier, kComputeThreads);
}

// Where a thread's two rows go.
struct SpanPlace {
    uint32_t* row;
    int64_t step;  // to the second
    bool is_used[2];

    DEVICE SpanPlace(const SpanArgs& args, const SpanWork& work, int first_row)
        : step(4 * args.out_row_stride) {
        const int64_t at = (work.row_begin + first_row) * args.out_row_stride +
                           work.head * args.out_head_stride + threadIdx.x % 4 * 2;
        row = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(args.out) + at);
        for (int r = 0; r < 2; ++r) is_used[r] = first_row + 8 * r < work.rows;
    }
};

template <int kDim>
DEVICE void write_out(const SpanPlace& place, const float (&o)[kDim / 2], const SpanRows& sums) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float total = sums.total[r];
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        const float inverse = 1.f / total;
        if (!place.is_used[r]) continue;
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) {
            place.row[r * place.step + 4 * j] =
                pack_bfloat16(o[4 * j + 2 * r] * inverse, o[4 * j + 2 * r + 1] * inverse);
        }
    }
}

}  // namespace rtpurbo
