// Arguments of the prefill launcher: a plain struct of 8-byte fields, mirrored in
// kernels/cuda_prefill.py. Shapes as in kernels/span_inputs.py; strides are in elements.
#pragma once

#include "args.h"

namespace rtpurbo {

constexpr int kSpanQueries = 128;  // of a tile
constexpr int kSpanBlock = 64;     // tokens of a page

struct SpanArgs {
    const void* queries;  // bfloat16 [T, H, D]
    int64_t query_row_stride;
    int64_t query_head_stride;
    void* out;  // bfloat16 [T, H, D]
    int64_t out_row_stride;
    int64_t out_head_stride;
    const int64_t* heads;    // [G]
    const int64_t* kv_rows;  // [G]
    const void* keys;        // bfloat16 [P, N, 64, D]
    const void* values;
    Table table;                  // [S, B]
    const int64_t* query_starts;  // [S + 1]
    const int64_t* context_lens;  // [S]
    int64_t tokens;               // T
    int64_t layer_heads;          // H
    int64_t group;                // G
    int64_t spans;                // S
    int64_t tiles;                // of queries, at most; one that no span has is skipped
    int64_t pages;                // P
    int64_t cache_heads;          // N
    int64_t head_dim;
    int64_t window;  // here and below at most 2^30
    int64_t sinks;
    double scale;
    const int32_t* lists;        // [tiles, G, list_width] ascending blocks, or null: the window rule
    const int32_t* list_counts;  // [tiles, G], at least 1
    int64_t list_width;
    uint32_t* taken;  // one, zero: tiles that CTAs have asked for; null: they take fixed steps
};

}  // namespace rtpurbo
