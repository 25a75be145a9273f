// The functions of clusters.cuh on the CPU; see machine.h.
//
// What is delivered arrives some time later. A write to a CTA that may not have started, or has ended,
// ends the launch with an error.
#pragma once

#include "machine.h"

namespace rtpurbo {

inline int cluster_rank() { return static_cast<int>(emulation::current_rank()); }
inline int cluster_size() { return static_cast<int>(emulation::machine.ctas.size()); }

template <typename Value>
Value* in_cluster(Value* own, int rank) {
    if (rank != cluster_rank()) {
        const bool has_ended = emulation::machine.ctas[static_cast<size_t>(rank)].left == 0;
        if (has_ended) emulation::fail("shared memory of a CTA that has ended");
        if (emulation::machine.threads[emulation::machine.current].cluster_waits == 0) {
            emulation::fail("shared memory of a CTA that may not have started");
        }
    }
    const auto offset = reinterpret_cast<unsigned char*>(own) - emulation::shared_memory();
    return reinterpret_cast<Value*>(emulation::shared_memory(static_cast<size_t>(rank)) + offset);
}

inline void cluster_arrive() {
    auto& machine = emulation::machine;
    auto& thread = machine.threads[machine.current];
    if (thread.cluster_arrivals++ != thread.cluster_waits) {
        emulation::fail("arrives again without having waited");
    }
    if (++machine.cluster.arrived < machine.cluster.expected) return;
    machine.cluster.arrived = 0;
    ++machine.cluster.generation;
}

inline void cluster_start() { cluster_arrive(); }

inline void cluster_wait() {
    auto& machine = emulation::machine;
    auto& thread = machine.threads[machine.current];
    if (++thread.cluster_waits != thread.cluster_arrivals) {
        emulation::fail("waits without having arrived");
    }
    if (machine.cluster.generation >= thread.cluster_waits) return;
    emulation::wait_for(machine.cluster, thread.cluster_waits);
}

inline void deliveries_init(uint64_t* barrier) {
    emulation::machine.others[barrier] = emulation::Barrier{1};
}

// `count` holds the bytes that are still to come.
inline void settle_deliveries(emulation::Barrier& barrier) {
    if (barrier.arrived < barrier.expected || barrier.count != 0) return;
    barrier.arrived = 0;
    ++barrier.generation;
}

inline void deliveries_expect(uint64_t* barrier, int bytes) {
    auto& found = emulation::machine.others.at(barrier);
    if (++found.arrived > found.expected) emulation::fail("a round is expected twice");
    found.count += bytes;
    settle_deliveries(found);
}

inline void deliveries_wait(uint64_t* barrier, int round) {
    auto& found = emulation::machine.others.at(barrier);
    while ((found.generation & 1) == (static_cast<unsigned>(round) & 1)) emulation::wait_for(found);
}

template <typename Value>
void deliver(Value* own, int rank, Value value, uint64_t* barrier) {
    Value* there = in_cluster(own, rank);
    auto& found = emulation::machine.others.at(in_cluster(barrier, rank));
    emulation::machine.deferred.push_back([there, value, &found] {
        *there = value;
        found.count -= static_cast<int>(sizeof(Value));
        settle_deliveries(found);
    });
}

}  // namespace rtpurbo
