// Arguments of what surrounds the layers of a decode step, mirrored in kernels/cuda_step.py. Shapes:
// R rows, B block-table width, V logits width, E hidden size, H heads of all layers that select.
#pragma once

#include "args.h"

namespace rtpurbo {

struct PlaceArgs {
    const int64_t* inputs;  // [8, R], rows `input_stride` apart: kernels/step_ops.py says what
    int64_t input_stride;
    int64_t rows;
    const int64_t* newest;  // [slots] by row of the tables
    int64_t* token_ids;     // [R]
    int64_t* tables[2];     // full and window: [slots, B]; each row's newest page is written
    int64_t* row_tables[2];  // [R, B] the rows' tables
    int64_t width;          // B
    int64_t* token_slots[2];  // [R] page * block_tokens + place in the page
    float* top_p;           // [R]
    int64_t block_tokens;
};

struct PickArgs {
    const void* logits;  // [R, V]
    const void* hidden;  // [R, E]
    const int64_t* counts;    // [R, H] tokens that each head attended, or null
    const int64_t* inputs;    // as above
    int64_t input_stride;
    int64_t* newest;     // [slots] by row of the tables; written
    double* out;         // [5 R + 2 H], without counts [2 R]: kernels/step_ops.py says what
    int64_t rows;
    int64_t vocabulary;
    int64_t hidden_size;
    int64_t heads;
    int64_t data_type;
};

}  // namespace rtpurbo
