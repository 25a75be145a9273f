// Arithmetic of the top-p selection (kernels/reference.py, select_blocks), one function a step.
#pragma once

#include <cfloat>
#include <cmath>

#include "device.cuh"

namespace rtpurbo {

constexpr int kBins = 256;
constexpr float kBinsPerNat = 8.0f;
constexpr float kMassUnit = 4294967296.0f;  // masses are whole multiples of 2^-32
constexpr int kSelectThreads = kBins;       // of a CTA
constexpr int kSelectWarps = kSelectThreads / 32;

// What is not finite has no mass.
HOST_DEVICE float finite_or_none(float log_mass) {
    return fabsf(log_mass) <= FLT_MAX ? log_mass : -INFINITY;
}

// Bin of a block whose log mass lies `below` >= 0 nats under the head's largest.
HOST_DEVICE int mass_bin(float below) {
    const float bin = below * kBinsPerNat;
    return bin >= static_cast<float>(kBins - 1) ? kBins - 1 : static_cast<int>(bin);
}

// Its mass relative to the largest, at most 2^32. Scaling by a power of two is exact, so the only
// rounding before the last is that of expf.
HOST_DEVICE uint64_t fixed_mass(float below) {
    return static_cast<uint64_t>(rintf(expf(-below) * kMassUnit));
}

// Mass that must be kept; the histogram's total is below 2^53, so the conversion is exact.
HOST_DEVICE double wanted_mass(float top_p, uint64_t total) {
    return static_cast<double>(top_p) * static_cast<double>(total);
}

// A block that is kept whatever its mass: that of the sinks, the newest, and the one before it.
HOST_DEVICE bool is_forced(int block, int blocks) { return block == 0 || block >= blocks - 2; }

// Those of them among the 32 blocks of a word, as bits.
HOST_DEVICE uint32_t forced_bits(int word, int blocks) {
    const int newest = blocks - 1 - word * 32, before = newest - 1;
    uint32_t bits = word == 0;
    if (newest >= 0 && newest < 32) bits |= 1u << newest;
    if (before >= 0 && before < 32) bits |= 1u << before;
    return bits;
}

}  // namespace rtpurbo
