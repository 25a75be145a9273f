// Arguments of the launchers: plain structs of 8-byte fields, mirrored in kernels/_args.py.
//
// Shapes as in kernels/reference.py: R decode rows, H query heads of the call, D head_dim,
// I index_dim, P pages, K tokens of a page (block), B block-table width in logical blocks.
// G group tiles: a KV head with at most 16 of the query heads that read it. Strides are in elements.
#pragma once

#include <cstdint>

namespace rtpurbo {

constexpr int kTileHeads = 16;
constexpr int kMaxItems = 1024;    // rows x group tiles of one launch
constexpr int kFewItems = 64;      // at most, for clusters
constexpr int kMaxBlocks = 65535;  // of one sequence
constexpr int kAgeRanges = 16;     // of blocks, kernels/block_age.py

enum DataType : int64_t { kBfloat16 = 0, kFloat32 = 1, kInt8 = 2 };

// A KV head and the query heads that read it, as `heads` slots. int32 [G, 36] in Python.
struct Group {
    int32_t pool;       // 0 full, 1 window
    int32_t kv_row;     // row in that pool's cache
    int32_t heads;      // slots in use
    int32_t retrieval;  // bit per slot: sees the whole context, or what was selected
    int32_t head[kTileHeads];     // query head of the slot
    int32_t selected[kTileHeads]; // its row among the selected heads, -1: none
};

// One block that at least one head of a group reads; int32 [2] in Python.
struct ListEntry {
    int32_t block;
    uint32_t heads;  // bit per slot that selected it
};

// A number to divide by, as a product and a shift (partition.cuh).
struct Divisor {
    uint32_t factor;
    uint32_t shift;
};

// Block table of a pool.
struct Table {
    const void* pages;   // [R, B]
    int64_t row_stride;
    int64_t is_64_bit;   // int64, else int32
};

struct SelectArgs {
    const void* queries;  // [R, H, I]
    int64_t query_row_stride;
    int64_t query_head_stride;
    const void* index_cache;    // [P, index_rows, K, I]
    const uint16_t* index_scales;  // bfloat16 [P, index_rows, K], of int8 keys
    const int64_t* index_row;   // [H]
    const float* age_bias;      // [H, kAgeRanges] added to log masses, or null
    int64_t index_rows;
    int64_t index_dim;
    int64_t data_type;  // of the queries
    int64_t key_type;   // of the index keys: the same, or int8
    Table table;
    const int64_t* context_lens;  // [R]
    int64_t rows;
    int64_t heads;
    int64_t block_tokens;
    float* log_mass;      // [R, H, width]
    int64_t width;
    const float* top_p;   // [R, H] by strides
    int64_t top_p_row_stride;
    int64_t top_p_head_stride;
    const float* own_top_p;  // [R] or null; NaN: top_p holds
    int64_t dense_below;     // rows of shorter contexts are skipped
    uint32_t* words;         // [R, H, words_width] selected blocks as bits; null: score only
    int64_t words_width;
    uint8_t* mask;           // [R, H, width] the same as bytes, or null
    int64_t* attended;       // [R, H] tokens in the selected blocks, or null
    uint32_t* head_done;     // [R, H] zeros, and zeros again afterwards
    const Group* groups;     // [G] or null: no lists
    const int32_t* group_of_head;  // [H]
    int64_t group_count;
    uint32_t* group_done;    // [R, G] zeros, and zeros again afterwards
    ListEntry* lists;        // [R, G, width]
    int32_t* list_counts;    // [R, G]
    int64_t window;
    int64_t sinks;
    int64_t ctas;
    int64_t shared_bytes;  // of a CTA, for where rows start and for log masses
    int64_t most_kept;     // log masses that fit; set by the launcher
    int64_t cluster;       // CTAs for each head of a single row, which then leave no log masses; 0: none
    int64_t overlap;       // 1: may start before the kernel before it on the stream has ended
};

// How a launch of index_select fits the current device.
struct SelectPlan {
    int64_t ctas;
    int64_t shared_bytes;
    int64_t clusters_of_8;   // CTAs; how many run at once, 0: none
    int64_t clusters_of_16;
};

struct DecodeArgs {
    const void* queries;  // [R, H, D]
    int64_t query_row_stride;
    int64_t query_head_stride;
    void* out;            // [R, H, D]
    int64_t out_row_stride;
    int64_t out_head_stride;
    const void* keys[2];    // by pool: [P, kv_rows, K, D]
    const void* values[2];
    int64_t kv_rows[2];
    Table tables[2];
    const int64_t* context_lens;  // [R]
    int64_t rows;
    const Group* groups;  // [G]
    int64_t group_count;
    int64_t tile_heads;   // of the group that has most
    int64_t block_tokens;
    int64_t head_dim;
    int64_t data_type;
    double scale;
    int64_t window;       // here and below at most 2^30
    int64_t sinks;
    const ListEntry* lists;  // [R, G, list_width], or null: retrieval heads see everything
    const int32_t* list_counts;
    int64_t list_width;
    int64_t dense_below;  // rows of shorter contexts take no list
    float* partial;       // [4 ctas + 2 kFewItems, 16, D]
    float* partial_stats; // [4 ctas + 2 kFewItems, 16, 2] maximum and sum; for clusters by 16 of D
    uint32_t* item_done;  // [R, G, 16] zeros, and zeros again afterwards
    int64_t ctas;
    int64_t warps;
    int64_t shared_bytes;
    int64_t overlap;  // 1: straight after index_select on the stream; start before it has ended
    int64_t held_back;  // CTAs or clusters, not all, that take items with lists only
    int64_t cluster;    // CTAs of a cluster, which takes whole pieces; 0: none, each CTA for itself
    int64_t placement;  // of a cluster's CTAs on multiprocessors, a cudaClusterSchedulingPolicy
    int64_t least_blocks;  // of a piece, where there is no list
    int64_t least_listed;  // of a piece of a list
    Divisor by_groups;     // set by the launcher: group_count
    Divisor by_tokens;     // block_tokens
    Divisor by_strips;     // strips of a block
};

// How a decode launch fits the current device.
struct DecodePlan {
    int64_t ctas;
    int64_t warps;
    int64_t shared_bytes;
    int64_t overlap;  // 1: the device can start a kernel before the one before it has ended
    int64_t clusters_of_8;   // CTAs; how many run at once, 0: none
    int64_t clusters_of_16;
};

}  // namespace rtpurbo
