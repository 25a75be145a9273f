// Arguments of what a layer does around attention: plain structs of 8-byte fields, mirrored in
// kernels/cuda_{store,layer,experts}.py. Shapes: T tokens, H query heads, N KV heads, D head_dim,
// E hidden size, F intermediate size, I index_dim, P pages of a pool, K tokens of a page, X rows of
// index keys, S heads that select. All tensors are of one data type unless another is named.
#pragma once

#include "args.h"

namespace rtpurbo {

struct StoreArgs {
    const void* projected;   // [T, H + 2 N, D] queries, keys, values
    const void* norm;        // [2, D] weights of queries and of keys, or null: no norm
    double eps;
    const float* cosines;    // [T, D / 2]
    const float* sines;
    const int32_t* kv_rows;  // [N] row in the full pool, or -1 - row in the window pool
    void* queries;           // [T, H, D]
    void* keys[2];           // by pool, full and window: [P, cache_rows, K, D]
    void* values[2];
    int64_t cache_rows[2];
    const int64_t* slots[2];  // [T] page * K + place in the page
    int64_t block_tokens;     // K
    int64_t tokens;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t data_type;
    const void* key_projection;    // [X, I, D]
    const int64_t* key_head;       // [X] KV head
    int64_t index_rows;            // X, 0: no index keys
    void* index_keys;              // [P, X, K, I] at the slots of the full pool, or as below
    uint16_t* index_scales;        // bfloat16 [P, X, K], index keys are int8 then; or null
    int64_t index_keys_in_rows;    // 1: [T, X, I]
    const void* query_projection;  // [S, I, D]
    const int64_t* query_head;     // [S] query head
    int64_t selecting;             // S, 0: no index queries
    void* index_queries;           // [index_query_tokens, S, I]
    int64_t index_query_tokens;    // the first of the T
    int64_t index_dim;             // a multiple of 8, at most D / 2
};

struct NormArgs {
    const void* input;   // [T, E]
    const void* branch;  // [T, E] added to it, or null
    void* sum;           // [T, E] what was added up; not written without a branch
    const void* weight;  // [E]
    void* out;           // [T, E]
    double eps;
    int64_t tokens;
    int64_t size;        // E, in whole pieces of 16 bytes
    int64_t data_type;
};

struct GatedArgs {
    const void* gate_up;  // [T, 2, F]
    void* out;            // [T, F]
    int64_t tokens;
    int64_t size;         // F, in whole pieces of 16 bytes
    int64_t data_type;
};

constexpr int kMaxExperts = 256;
constexpr int kMaxPairs = 2048;  // of tokens and chosen experts, of one launch

struct RouteArgs {
    const void* logits;  // [T, experts]
    void* weights;       // [T, chosen]
    int32_t* experts;    // [T, chosen], by falling probability
    int64_t tokens;
    int64_t expert_count;
    int64_t chosen;      // of a token, at most 32
    int64_t normalise;   // 1: the weights of a token sum to 1
    int64_t data_type;
};

struct ExpertArgs {
    const void* input;       // [pairs / share, size]
    const int32_t* experts;  // [pairs]
    const void* weights;     // [experts, outputs, size]; gated: [experts, 2 outputs, size]
    void* out;               // [pairs, outputs]
    int64_t pairs;
    int64_t share;           // neighbouring pairs that have one input
    int64_t expert_count;
    int64_t outputs;         // a multiple of 4
    int64_t size;            // in whole pieces of 16 bytes
    int64_t gated;           // 1: silu of the first half of the rows times the second
    int64_t data_type;
};

}  // namespace rtpurbo
