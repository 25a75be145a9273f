// The machine that kernels run on here: CUDA on the CPU, for tests. The kernels' sources, compiled by a
// host compiler, run on it as they are.
//
// CTAs run one after the other in a random order, or clusters of them. Their threads are fibers that run,
// in a random order too, from one barrier to the next; a warp's collective operations are such barriers,
// and some warps run ahead to the next barrier of the CTA.
// What is wrong on a GPU only at times is wrong here more often: shared memory starts as NaN, a
// copy under way leaves NaN at its destination and is made as late as the program allows, threads
// that disagree about a barrier end the launch with an error, and so does a write past the end of
// the shared memory asked for, or into that of a CTA of the cluster that may not have started or has
// ended. What the chip does beside its threads (`Machine::deferred`) happens at a random time too.
// Interleaving of CTAs that are no cluster and the memory model are not emulated. Variables that are
// `__shared__` are one for all CTAs, so kernels that run in clusters must not have any.
#pragma once

#include <setjmp.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulated_cuda.h"

namespace rtpurbo::emulation {

constexpr int kLanes = 32;
constexpr int kStackBytes = 256 * 1024;
constexpr int kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN in bfloat16 and float32

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

// Threads meet here; the last one to come opens it for all.
struct Barrier {
    int expected = 0, arrived = 0, count = 0, last_count = 0;
    const char* operation = nullptr;
    uint64_t generation = 0;
};

using Group = std::vector<std::function<void()>>;  // done together

// What a thread waits for, apart from the rest: it is looked at far more often.
struct Wait {
    Barrier* at = nullptr;
    uint64_t generation = 0;
    bool done = false;  // the thread has ended
};

inline bool holds(const Wait& wait) {
    return wait.at != nullptr && wait.at->generation < wait.generation;
}

struct Thread {
    uint64_t collectives = 0;
    uint64_t cluster_arrivals = 0, cluster_waits = 0;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> committed;
    Group products;
    bool multiplies_early = false;
    std::vector<Group> committed_products;
};

// Runs a thread after the other, for all launches: to start it takes system calls, a jump none.
struct Fiber {
    std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    jmp_buf place;
    bool started = false;
};

struct Lane {
    alignas(16) unsigned char bytes[64];
};
using Lanes = std::array<Lane, kLanes>;

// A CTA of the cluster that runs.
struct Cta {
    int left = 0;  // threads that have not ended
    Barrier barrier;
    std::vector<unsigned char> memory;
};

struct Machine {
    std::mt19937 random{12345};
    std::vector<Thread> threads;  // of all CTAs of a cluster, one CTA after the other
    std::vector<Wait> waits;         // of these threads
    std::vector<Wait> waits_of_all;  // by warp, where its threads were seen to have the same
    std::vector<Fiber> fibers;       // that run the threads
    std::vector<Barrier> warps;
    std::vector<Lanes> lanes[2];  // deposits of a collective, by parity and warp
    std::vector<Cta> ctas;
    Barrier cluster;
    std::map<const void*, Barrier> others;  // by address or number
    std::deque<std::function<void()>> deferred;
    size_t shared_bytes = 0;
    jmp_buf scheduler;
    int current = 0;
    const void* arguments = nullptr;
    void (*body)(const void*) = nullptr;
    std::string error;
};

inline Machine machine;

inline size_t current_rank() { return static_cast<size_t>(machine.current) / blockDim.x; }

inline unsigned char* shared_memory(size_t rank) {
    auto address = reinterpret_cast<uintptr_t>(machine.ctas[rank].memory.data());
    return reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
}

inline unsigned char* shared_memory() { return shared_memory(current_rank()); }

inline void fail(const std::string& message) {
    if (machine.error.empty()) machine.error = message;
}

inline void yield() {
    if (_setjmp(machine.fibers[machine.current].place) == 0) _longjmp(machine.scheduler, 1);
}

// Until the barrier has opened that often.
inline void wait_for(Barrier& barrier, uint64_t generation) {
    machine.waits[machine.current] = {&barrier, generation};
    yield();
}

// Until the barrier has opened more often than now.
inline void wait_for(Barrier& barrier) { wait_for(barrier, barrier.generation + 1); }

inline void meet(Barrier& barrier, const char* operation, int predicate = 0) {
    if (barrier.arrived == 0) {
        barrier.operation = operation;
        barrier.count = 0;
    } else if (barrier.operation != operation && std::strcmp(barrier.operation, operation) != 0) {
        fail(std::string("threads disagree: ") + barrier.operation + " and " + operation);
    }
    barrier.count += predicate != 0;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        barrier.last_count = barrier.count;
        ++barrier.generation;
        return;
    }
    wait_for(barrier);
}

// Every lane gives a value and reads those of all.
template <typename Value>
Lanes& exchange(const Value& value, const char* operation) {
    static_assert(sizeof(Value) <= sizeof(Lane));
    const int warp = machine.current / kLanes, lane = machine.current % kLanes;
    // A lane is at most one collective ahead of another, so two sets of deposits are enough.
    auto& deposits = machine.lanes[machine.threads[machine.current].collectives++ % 2][warp];
    std::memcpy(deposits[lane].bytes, &value, sizeof(Value));
    meet(machine.warps[warp], operation);
    return deposits;
}

template <typename Value>
Value read_lane(const Lanes& deposits, int lane) {
    Value value;
    std::memcpy(&value, deposits[lane].bytes, sizeof(Value));
    return value;
}

}  // namespace rtpurbo::emulation
