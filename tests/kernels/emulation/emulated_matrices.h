// The functions of matrices.cuh on the CPU: each lane reads what it needs of those that hold it.
#pragma once

#include <cstdint>

#include "emulated_device.h"
#include "machine.h"

namespace rtpurbo {

struct MatrixRow {
    uint16_t values[8];
};

inline void load_matrices(uint32_t (&out)[4], const void* row) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto& all = emulation::exchange(*static_cast<const MatrixRow*>(row), "load matrices");
    for (int matrix = 0; matrix < 4; ++matrix) {
        const auto from = emulation::read_lane<MatrixRow>(all, matrix * 8 + lane / 4);
        const int column = lane % 4 * 2;
        out[matrix] = from.values[column] | static_cast<uint32_t>(from.values[column + 1]) << 16;
    }
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto& all = emulation::exchange(*static_cast<const MatrixRow*>(row), "load transposed");
    for (int matrix = 0; matrix < 4; ++matrix) {
        const int first = matrix * 8 + lane % 4 * 2;
        const uint32_t low = emulation::read_lane<MatrixRow>(all, first).values[lane / 4];
        const uint32_t high = emulation::read_lane<MatrixRow>(all, first + 1).values[lane / 4];
        out[matrix] = low | high << 16;
    }
}

inline uint32_t transpose_matrix(uint32_t own) {
    const int lane = static_cast<int>(threadIdx.x) % 32, column = lane / 4;
    const auto& all = emulation::exchange(own, "transpose");
    uint32_t out = 0;
    for (int i = 0; i < 2; ++i) {
        const int row = lane % 4 * 2 + i;
        const auto pair = emulation::read_lane<uint32_t>(all, row * 4 + column / 2);
        out |= (pair >> column % 2 * 16 & 0xffff) << i * 16;
    }
    return out;
}

struct Fragments {
    uint32_t a[4], b[2];
};

// Element (row, k) of a and (k, column) of b, from the lanes that hold them (PTX ISA, mma.m16n8k16).
inline float element_a(const emulation::Lanes& all, int row, int k) {
    const auto from = emulation::read_lane<Fragments>(all, row % 8 * 4 + k % 8 / 2);
    const uint32_t pair = from.a[row / 8 + k / 8 * 2];
    return bits_to_float(k % 2 ? pair & 0xffff0000u : pair << 16);
}

inline float element_b(const emulation::Lanes& all, int k, int column) {
    const auto from = emulation::read_lane<Fragments>(all, column * 4 + k % 8 / 2);
    const uint32_t pair = from.b[k / 8];
    return bits_to_float(k % 2 ? pair & 0xffff0000u : pair << 16);
}

inline void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto& all =
        emulation::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "multiply");
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            c[i] += element_a(all, row, k) * element_b(all, k, column);
        }
    }
}

// The same of bytes: row l / 4 and 8 further, bytes 4 (l % 4) and up, and 16 further.
inline int32_t byte_of(uint32_t word, int byte) {
    return static_cast<int8_t>(word >> 8 * byte);
}

inline void multiply_add_16x8x32(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                 uint32_t b1) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto& all =
        emulation::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "multiply bytes");
    for (int word = 0; word < 8; ++word) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = lane % 4 * 2 + i % 2;
            const auto left = emulation::read_lane<Fragments>(all, row * 4 + word % 4);
            const auto right = emulation::read_lane<Fragments>(all, column * 4 + word % 4);
            const uint32_t keys = left.a[i / 2 + word / 4 * 2], query = right.b[word / 4];
            for (int byte = 0; byte < 4; ++byte) c[i] += byte_of(keys, byte) * byte_of(query, byte);
        }
    }
}

}  // namespace rtpurbo
