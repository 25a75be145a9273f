// A head's index query as a warp multiplies keys with it: a piece of 16 bytes or 8 of each lane at a time,
// where kLanes lanes share a key.
//
// Tensor cores multiply 16 rows of 8 words with 8 columns. Here what a lane holds is words of two rows as
// it lies in registers: the first and the third of one row, the second and the fourth of the row 8
// further; four neighbouring lanes share these rows. Columns 2j and 2j + 1 are for lane j. The query
// stands in them at the places of the lanes that share its key, in the one column what belongs to the
// first and third words, in the other the rest, and zeros elsewhere. So a lane gets, in two parts, the
// dot product of its own key, and nothing is moved or unpacked. What is not finite reaches the other
// keys of the four lanes. What lies behind a context must not get there; other keys are of the same
// block, which has no mass then.
#pragma once

#include "args.h"
#include "cta.cuh"
#include "device.cuh"
#include "elements.cuh"
#include "matrices.cuh"
#include "numbers.cuh"

namespace rtpurbo {

// Elements of a 16-byte piece as floats.
DEVICE void unpack_bfloat16(uint4 raw, float* out) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = low_bfloat16(words[i]);
        out[2 * i + 1] = high_bfloat16(words[i]);
    }
}

DEVICE void unpack_float32(uint4 raw, float* out) {
    out[0] = bits_to_float(raw.x);
    out[1] = bits_to_float(raw.y);
    out[2] = bits_to_float(raw.z);
    out[3] = bits_to_float(raw.w);
}

// Elements [at, at + kElements) of the queries.
template <int kElements>
DEVICE void load_query(const SelectArgs& args, int64_t at, float (&query)[kElements]) {
    if (args.data_type == kBfloat16) {
        const char* from = static_cast<const char*>(args.queries) + at * 2;
#pragma unroll
        for (int i = 0; i < kElements / 8; ++i) {
            unpack_bfloat16(reinterpret_cast<const uint4*>(from)[i], query + 8 * i);
        }
    } else {
        const char* from = static_cast<const char*>(args.queries) + at * 4;
#pragma unroll
        for (int i = 0; i < kElements / 4; ++i) {
            unpack_float32(reinterpret_cast<const uint4*>(from)[i], query + 4 * i);
        }
    }
}

// What this lane has of the columns: of column l / 4 the places of lane l % 4. Whether that lane's key
// is the column's, and whether the column is the one for the second and fourth words.
template <int kLanes>
DEVICE bool is_of_column() {
    const int lane = threadIdx.x % 32;
    return lane % 4 / kLanes == lane / 8 / kLanes;
}

DEVICE bool has_even_words() { return threadIdx.x / 4 % 2 != 0; }

// Where elements that this lane multiplies begin, of a query that begins at `at`.
template <int kElements, int kLanes>
DEVICE int64_t own_elements(int64_t at) {
    return at + threadIdx.x % kLanes * kElements;
}

// With keys in float32; each lane gets what its neighbours get too.
template <int kLanes>
struct Float32Query {
    static constexpr int kElements = 4;
    float query[kElements];  // times log2(e)

    DEVICE Float32Query(const SelectArgs& args, int64_t at) {
        load_query(args, own_elements<kElements, kLanes>(at), query);
#pragma unroll
        for (int e = 0; e < kElements; ++e) query[e] *= kLog2E<float>;
    }

    // q·k of a piece's key, times log2(e).
    DEVICE float multiply_with(uint4 raw) const {
        float key[kElements];
        unpack_float32(raw, key);
        float dot = 0.0f;
#pragma unroll
        for (int e = 0; e < kElements; ++e) dot = fmaf(key[e], query[e], dot);
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
        return dot;
    }
};

// With keys in bfloat16, as the query is.
template <int kLanes>
struct Bfloat16Query {
    uint32_t low, high;  // for the first two words of a piece, and for the others

    DEVICE Bfloat16Query(const SelectArgs& args, int64_t at) {
        const char* from = static_cast<const char*>(args.queries) + at * 2;
        const uint4 own = reinterpret_cast<const uint4*>(from)[threadIdx.x % kLanes];
        low = !is_of_column<kLanes>() ? 0 : has_even_words() ? own.y : own.x;
        high = !is_of_column<kLanes>() ? 0 : has_even_words() ? own.w : own.z;
    }

    DEVICE float multiply_with(uint4 raw) const {
        float c[4] = {};
        multiply_add_16x8x16(c, {raw.x, raw.y, raw.z, raw.w}, low, high);
        return multiply(c[0] + c[3], kLog2E<float>);
    }
};

// With keys of 8 bits. The query is rounded to whole multiples of 2^-22 of a power of two above its
// largest element, in three digits of 8 bits: products and their sums are exact, and rounded where they
// become a float. Elements in bfloat16 lose nothing down to 2^-15 of the largest.
template <int kLanes, int kWords>
struct Int8Query {
    static constexpr int kElements = 4 * kWords, kDigits = 3;
    uint32_t low[kDigits], high[kDigits];  // the lowest digit first
    float unit;                            // times log2(e); NaN if the query is not finite

    DEVICE Int8Query(const SelectArgs& args, int64_t at) {
        float query[kElements];
        load_query(args, own_elements<kElements, kLanes>(at), query);
        uint32_t largest = 0;  // as bits, without signs
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
            largest = max(largest, float_to_bits(query[e]) & 0x7fffffffu);
        }
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
            largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
        }
        // All elements are below 2^(exponent - 126). Below 2^-94 they may lose more.
        const uint32_t exponent = max(largest >> 23, 32u);
        const bool is_finite = exponent < 255;
        const float in_units = is_finite ? bits_to_float((275 - exponent) << 23) : 0.0f;
        unit = is_finite ? multiply(bits_to_float((exponent - 21) << 23), kLog2E<float>) : NAN;
        in_digits(query, in_units, low);
        if (kWords == 4) {
            in_digits(query + 8, in_units, high);
        } else {
            high[0] = high[1] = high[2] = 0;
        }
    }

    // The digits of four elements: the first four, or the others in a column for even words.
    static DEVICE void in_digits(const float* query, float in_units, uint32_t (&digits)[kDigits]) {
        digits[0] = digits[1] = digits[2] = 0;
        if (!is_of_column<kLanes>() || in_units == 0.0f) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float element = has_even_words() ? query[4 + i] : query[i];
            const int32_t whole = static_cast<int32_t>(rintf(element * in_units));
            // A signed digit in each byte.
            const uint32_t bytes = (static_cast<uint32_t>(whole) + 0x8080u) ^ 0x8080u;
#pragma unroll
            for (int d = 0; d < kDigits; ++d) digits[d] |= (bytes >> 8 * d & 0xffu) << 8 * i;
        }
    }

    DEVICE float multiply_with(uint4 raw) const { return multiply_words({raw.x, raw.y, raw.z, raw.w}); }
    DEVICE float multiply_with(uint2 raw) const { return multiply_words({raw.x, raw.y, 0, 0}); }

    DEVICE float multiply_words(const uint32_t (&words)[4]) const {
        int32_t sums[kDigits];
#pragma unroll
        for (int d = 0; d < kDigits; ++d) {
            int32_t c[4] = {};
            multiply_add_16x8x32(c, words, low[d], high[d]);
            sums[d] = c[0] + c[3];
        }
        const float high_digits = static_cast<float>(sums[2] * 256 + sums[1]);
        return multiply(fmaf(high_digits, 256.0f, static_cast<float>(sums[0])), unit);
    }
};

}  // namespace rtpurbo
