// A cluster's run on the machine, from the start of its threads to the end of the last; a CTA without a
// cluster is one by itself.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "emulated_cuda.h"
#include "machine.h"

namespace rtpurbo::emulation {

// A fiber's life.
inline void run_bodies() {
    while (true) {
        machine.body(machine.arguments);
        machine.waits[machine.current].done = true;
        yield();
    }
}

inline void start(Fiber& fiber) {
    static ucontext_t context;
    getcontext(&context);
    // Frames of different fibers begin at different lines of the cache, which has few of each.
    const size_t index = static_cast<size_t>(&fiber - machine.fibers.data());
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes - index % 61 * 64;
    context.uc_link = nullptr;
    makecontext(&context, run_bodies, 0);
    fiber.started = true;
    setcontext(&context);
}

// Up to where its thread waits next.
inline void resume(Fiber& fiber) {
    if (_setjmp(machine.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    start(fiber);
}

// Before its CTAs start.
inline void prepare(int threads, const std::vector<dim3>& blocks) {
    machine.ctas.resize(blocks.size());
    for (size_t rank = 0; rank < blocks.size(); ++rank) {
        Cta& cta = machine.ctas[rank];
        cta.left = threads;
        cta.barrier = Barrier{threads};
        const size_t bytes = machine.shared_bytes + 128 + kGuardBytes + 128;
        cta.memory.assign(bytes, kPoison);
    }
    const int all = threads * static_cast<int>(blocks.size());
    machine.cluster = Barrier{all};
    machine.others.clear();
    machine.deferred.clear();
    machine.warps.assign(all / kLanes, Barrier{kLanes});
    for (auto& set : machine.lanes) set.resize(all / kLanes);
    machine.threads.assign(all, {});
    machine.waits.assign(all, {});
    machine.waits_of_all.assign(all / kLanes, {});
    if (machine.fibers.size() < machine.threads.size()) machine.fibers.resize(all);
}

// After the last thread has ended.
inline void check_end() {
    if (!machine.deferred.empty()) fail("a load was still under way at the end");
    for (const Thread& thread : machine.threads) {
        bool pending = !thread.open.empty();
        for (const auto& group : thread.committed) pending = pending || !group.empty();
        if (pending) fail("a copy was still under way at the end");
        if (!thread.products.empty() || !thread.committed_products.empty()) {
            fail("a product was still under way at the end");
        }
    }
    for (size_t rank = 0; rank < machine.ctas.size(); ++rank) {
        const unsigned char* end = shared_memory(rank) + machine.shared_bytes;
        for (const unsigned char* byte = end; byte < end + kGuardBytes; ++byte) {
            if (*byte != kPoison) fail("wrote past the end of shared memory");
        }
    }
}

// What all threads of a warp wait for, if that is the same.
inline Wait wait_of_all(int warp) {
    const Wait* waits = &machine.waits[warp * kLanes];
    const bool same = std::all_of(waits, waits + kLanes, [&](const Wait& wait) {
        return wait.at == waits->at && wait.generation == waits->generation && !wait.done;
    });
    return same ? *waits : Wait{};
}

// The threads of a warp that wait for nothing, up to where each waits next; whether there were any.
inline bool run_warp(int warp, int threads, const std::vector<dim3>& blocks, int& left) {
    const int turn = static_cast<int>(machine.random() % kLanes);
    if (holds(machine.waits_of_all[warp])) return false;
    bool progress = false;
    for (int i = 0; i < kLanes; ++i) {
        const int index = warp * kLanes + (i + turn) % kLanes;
        Wait& wait = machine.waits[index];
        if (wait.done || holds(wait)) continue;
        wait.at = nullptr;
        progress = true;
        machine.current = index;
        const auto rank = static_cast<size_t>(index / threads);
        threadIdx = dim3(static_cast<unsigned>(index % threads));
        blockIdx = blocks[rank];
        resume(machine.fibers[index]);
        left -= wait.done;
        machine.ctas[rank].left -= wait.done;
    }
    if (!progress) machine.waits_of_all[warp] = wait_of_all(warp);
    return progress;
}

// A cluster, or a single CTA.
inline void run_ctas(int threads, const std::vector<dim3>& blocks) {
    prepare(threads, blocks);
    int left = static_cast<int>(machine.threads.size());
    std::vector<int> order(machine.warps.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    while (left > 0 && machine.error.empty()) {
        bool progress = false;
        std::shuffle(order.begin(), order.end(), machine.random);
        for (int warp : order) {
            // Some run ahead, to where they need the others.
            const bool hurries = machine.random() % 4 == 0;
            while (run_warp(warp, threads, blocks, left)) {
                progress = true;
                if (!hurries || !machine.error.empty()) break;
            }
        }
        if (!machine.deferred.empty() && (!progress || machine.random() % 8 == 0)) {
            machine.deferred.front()();
            machine.deferred.pop_front();
            progress = true;
        }
        if (!progress) fail("threads wait for others that never come");
    }
    check_end();
    // Some are in the middle of a thread that went wrong, for good.
    if (left > 0) machine.fibers.clear();
}

}  // namespace rtpurbo::emulation
