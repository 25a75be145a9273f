// What several kernels know of numbers: which are finite, and what a softmax in powers of two needs.
#pragma once

#include <cfloat>
#include <cmath>

#include "device.cuh"

namespace rtpurbo {

// Scores times this are the logarithms of weights to the base of 2.
template <typename Number>
constexpr Number kLog2E = static_cast<Number>(1.4426950408889634);

HOST_DEVICE bool is_finite(float value) { return fabsf(value) <= FLT_MAX; }

// Weights are relative to the largest score; where nothing was seen yet, to 0.
DEVICE float reference_of(float most) { return most == -INFINITY ? 0.0f : most; }

DEVICE float silu(float value) { return value / (1.0f + expf(-value)); }

}  // namespace rtpurbo
