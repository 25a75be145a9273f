// A strip: 16 tokens of one page, to which a warp attends with up to 16 query heads at once.
//
// A warp works alone: strips of keys and values lie in its own ring in shared memory, and it keeps the
// running maximum, sum and weighted values of those that it has seen. How it does that is a type for each
// type of data, Bfloat16Strip (strip_bfloat16.cuh) and Float32Strip (strip_float32.cuh), with
//
//     name_heads   before `begin`, which then need not wait to know whose queries to load
//     begin        loads the queries of the row's [H, D], and forgets what was seen
//     step         attends to a strip; `scale` turns q·k into log2 of a weight
//     end          leaves weighted values [8 kTiles, kPitch] and statistics [8 kTiles] in shared memory
//
// Rows of a strip are cut into 16-byte chunks; chunk c of row r lies at c ^ (r % 8), so that the
// eight rows that a matrix load or eight lanes touch at once are in different banks.
#pragma once

#include "device.cuh"

namespace rtpurbo {

constexpr int kStripTokens = 16;

// Which slots see which tokens of a strip.
struct Sight {
    int first;          // position of the strip's first token
    uint32_t selected;  // bit per slot: sees all tokens below `context`
    uint32_t local;     // bit per slot: sees those in the window and the sinks
    int context;
    int window;
    int sinks;

    // Whether all of `slots` see all of its tokens.
    DEVICE bool is_clear(uint32_t slots) const {
        const int last = first + kStripTokens - 1;
        const bool near = context - 1 - first < window || last < sinks;
        return last < context && (slots & ~(selected | (near ? local : 0))) == 0;
    }

    DEVICE bool sees(int slot, int token) const {
        const int position = first + token;
        const bool near = context - 1 - position < window || position < sinks;
        return position < context && ((selected >> slot & 1) || ((local >> slot & 1) && near));
    }
};

// Maximum (in units of log2) and sum of a head's weights.
struct Stats {
    float most;
    float sum;
};

template <int kChunks>
DEVICE const unsigned char* chunk_at(const unsigned char* strip, int row, int chunk) {
    return strip + (row * kChunks + (chunk ^ (row % 8))) * 16;
}

}  // namespace rtpurbo
