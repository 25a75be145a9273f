// A cluster's run on the machine, from the start of its threads to the end of the last; a CTA without a
// cluster is one by itself.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#include "emulated_cuda.h"
#include "machine.h"

namespace rtpurbo::emulation {

inline void run_body() {
    machine.body(machine.arguments);
    machine.threads[machine.current].done = true;
    yield();
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
    for (auto& set : machine.lanes) {
        set.assign(all / kLanes, std::vector<Lane>(kLanes));
    }
    machine.threads.clear();
    machine.threads.resize(all);
    while (machine.stacks.size() < machine.threads.size()) {
        machine.stacks.push_back(std::make_unique_for_overwrite<char[]>(kStackBytes));
    }
    for (size_t index = 0; index < machine.threads.size(); ++index) {
        Thread& thread = machine.threads[index];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = machine.stacks[index].get();
        thread.context.uc_stack.ss_size = kStackBytes;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_body, 0);
    }
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

// The threads of a warp that wait for nothing, up to where each waits next; whether there were any.
inline bool run_warp(int warp, int threads, const std::vector<dim3>& blocks, int& left) {
    bool progress = false;
    const int turn = static_cast<int>(machine.random() % kLanes);
    for (int i = 0; i < kLanes; ++i) {
        const int index = warp * kLanes + (i + turn) % kLanes;
        Thread& thread = machine.threads[index];
        if (thread.done) continue;
        if (thread.waits_at != nullptr) {
            if (thread.waits_at->generation < thread.waits_for) continue;
            thread.waits_at = nullptr;
        }
        progress = true;
        machine.current = index;
        const auto rank = static_cast<size_t>(index / threads);
        threadIdx = dim3(static_cast<unsigned>(index % threads));
        blockIdx = blocks[rank];
        resume(thread);
        left -= thread.done;
        machine.ctas[rank].left -= thread.done;
    }
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
}

}  // namespace rtpurbo::emulation
