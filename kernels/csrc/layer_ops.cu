// What a layer does to whole rows: the residual sum with the RMS norm after it, and SiLU times up.
//
// In CUDA C++ and not in Triton: on a host without a compiler the library is there and Triton is not,
// nothing is compiled at the first step, and tests run these sources on the CPU.

#include "cta.cuh"
#include "device.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "layer_args.h"
#include "numbers.cuh"

namespace rtpurbo {
namespace {

constexpr int kNormThreads = 1024;  // at most
constexpr int kKept = 4;            // pieces of a row that a thread keeps between sum and norm
constexpr int kGatedThreads = 256;
constexpr unsigned kMostRows = 65535;  // of a grid

// A CTA a row. Sums are rounded to the data type before they are normed, as they are stored.
template <typename Piece>
__global__ void __launch_bounds__(kNormThreads)
    add_norm_kernel(const __grid_constant__ NormArgs args) {
    constexpr int kElements = Piece::kElements;
    __shared__ float scratch[kNormThreads / 32];
    const int pieces = static_cast<int>(args.size / kElements);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * pieces;
    const Piece* input = static_cast<const Piece*>(args.input) + row;
    const Piece* branch = static_cast<const Piece*>(args.branch) + row;
    Piece* sum = static_cast<Piece*>(args.sum) + row;
    Piece kept[kKept] = {};
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        const int at = static_cast<int>(threadIdx.x + i * blockDim.x);
        if (at >= pieces) continue;
        kept[i] = input[at];
        float values[kElements];
        kept[i].floats(values);
        if (args.branch != nullptr) {
            float added[kElements];
            branch[at].floats(added);
#pragma unroll
            for (int e = 0; e < kElements; ++e) values[e] += added[e];
            kept[i] = Piece::of(values);
            sum[at] = kept[i];
            kept[i].floats(values);
        }
#pragma unroll
        for (int e = 0; e < kElements; ++e) squares = fmaf(values[e], values[e], squares);
    }
    float total = 0.0f;
    cta_running_sum(squares, scratch, total);
    const float scale =
        1.0f / sqrtf(total / static_cast<float>(args.size) + static_cast<float>(args.eps));
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        const int at = static_cast<int>(threadIdx.x + i * blockDim.x);
        if (at >= pieces) continue;
        float values[kElements], weights[kElements];
        kept[i].floats(values);
        static_cast<const Piece*>(args.weight)[at].floats(weights);
#pragma unroll
        for (int e = 0; e < kElements; ++e) values[e] *= scale;
        Piece::of(values).floats(values);
#pragma unroll
        for (int e = 0; e < kElements; ++e) values[e] *= weights[e];
        static_cast<Piece*>(args.out)[row + at] = Piece::of(values);
    }
}

template <typename Piece>
__global__ void __launch_bounds__(kGatedThreads)
    silu_mul_kernel(const __grid_constant__ GatedArgs args) {
    constexpr int kElements = Piece::kElements;
    const int64_t pieces = args.size / kElements;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kGatedThreads + threadIdx.x;
    if (at >= pieces) return;
    for (int64_t row = blockIdx.y; row < args.tokens; row += gridDim.y) {
        const Piece* gate_up = static_cast<const Piece*>(args.gate_up) + 2 * row * pieces;
        float gate[kElements], up[kElements];
        gate_up[at].floats(gate);
        gate_up[pieces + at].floats(up);
#pragma unroll
        for (int e = 0; e < kElements; ++e) gate[e] = silu(gate[e]) * up[e];
        static_cast<Piece*>(args.out)[row * pieces + at] = Piece::of(gate);
    }
}

}  // namespace
}  // namespace rtpurbo

using namespace rtpurbo;

extern "C" int64_t rtpurbo_add_norm_bytes() { return sizeof(NormArgs); }

extern "C" int rtpurbo_add_norm(const NormArgs* args, void* stream) {
    const int64_t elements = piece_elements(args->data_type), pieces = args->size / elements;
    if (args->size % elements != 0 || pieces > kKept * kNormThreads) return cudaErrorInvalidValue;
    const int64_t threads = (pieces + 31) / 32 * 32;
    return launch(args->data_type == kBfloat16 ? add_norm_kernel<Bfloat16Piece>
                                               : add_norm_kernel<Float32Piece>,
                  dim3(static_cast<unsigned>(args->tokens)),
                  static_cast<int>(threads < kNormThreads ? threads : kNormThreads), 0, stream,
                  *args);
}

extern "C" int64_t rtpurbo_silu_mul_bytes() { return sizeof(GatedArgs); }

extern "C" int rtpurbo_silu_mul(const GatedArgs* args, void* stream) {
    const int64_t elements = piece_elements(args->data_type), pieces = args->size / elements;
    if (args->size % elements != 0) return cudaErrorInvalidValue;
    const int64_t ctas = (pieces + kGatedThreads - 1) / kGatedThreads;
    const unsigned rows = static_cast<unsigned>(args->tokens < kMostRows ? args->tokens : kMostRows);
    return launch(args->data_type == kBfloat16 ? silu_mul_kernel<Bfloat16Piece>
                                               : silu_mul_kernel<Float32Piece>,
                  dim3(static_cast<unsigned>(ctas), rows), kGatedThreads, 0, stream, *args);
}
