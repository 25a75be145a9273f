// The functions of launch.cuh on the CPU: clusters run one after the other, in a random order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cluster_run.h"
#include "emulated_cuda.h"
#include "machine.h"

namespace rtpurbo {

// Few at once, so that small layers have clusters of both sizes and larger ones none.
template <typename Args>
int clusters_at_once(void (*)(Args), int, int, int cluster) {
    return cluster == 16 ? 2 : 4;
}

// Runs a kernel to its end. `stream` is the seed of the order of CTAs and threads.
template <typename Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, void* stream, Args args,
           bool = false, int cluster = 1, int = 0) {
    static void (*current)(Args);
    current = kernel;
    auto& machine = emulation::machine;
    machine.random.seed(static_cast<unsigned>(reinterpret_cast<uintptr_t>(stream)) + 1);
    machine.error.clear();
    machine.shared_bytes = static_cast<size_t>(shared_bytes);
    machine.arguments = &args;
    machine.body = [](const void* given) { current(*static_cast<const Args*>(given)); };
    gridDim = grid;
    blockDim = dim3(static_cast<unsigned>(threads));
    const unsigned size = static_cast<unsigned>(cluster);
    if (grid.x % size != 0) return cudaErrorInvalidValue;
    std::vector<unsigned> order(grid.x * grid.y / size);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i) * size;
    std::shuffle(order.begin(), order.end(), machine.random);
    for (unsigned first : order) {
        std::vector<dim3> blocks;
        for (unsigned cta = first; cta < first + size; ++cta) {
            blocks.emplace_back(cta % grid.x, cta / grid.x);
        }
        emulation::run_ctas(threads, blocks);
        if (!machine.error.empty()) return 719;  // cudaErrorLaunchFailure
    }
    return 0;
}

}  // namespace rtpurbo
