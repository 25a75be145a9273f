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
#include <ucontext.h>

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

struct Thread {
    ucontext_t context;  // where it starts; later switches are jumps, which need no system call
    jmp_buf place;
    bool started = false;
    bool done = false;
    Barrier* waits_at = nullptr;
    uint64_t waits_for = 0;
    uint64_t collectives = 0;
    uint64_t cluster_arrivals = 0, cluster_waits = 0;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> committed;
    Group products;
    bool multiplies_early = false;
    std::deque<Group> committed_products;
};

struct Lane {
    alignas(16) unsigned char bytes[64];
};

// A CTA of the cluster that runs.
struct Cta {
    int left = 0;  // threads that have not ended
    Barrier barrier;
    std::vector<unsigned char> memory;
};

struct Machine {
    std::mt19937 random{12345};
    std::vector<Thread> threads;  // of all CTAs of a cluster, one CTA after the other
    std::vector<std::unique_ptr<char[]>> stacks;  // by thread, kept for launches to come
    std::vector<Barrier> warps;
    std::vector<std::vector<Lane>> lanes[2];  // deposits of a collective, by parity and warp
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
    if (_setjmp(machine.threads[machine.current].place) == 0) _longjmp(machine.scheduler, 1);
}

inline void resume(Thread& thread) {
    if (_setjmp(machine.scheduler) != 0) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.context);
}

// Until the barrier has opened more often than now.
inline void wait_for(Barrier& barrier) {
    Thread& thread = machine.threads[machine.current];
    thread.waits_at = &barrier;
    thread.waits_for = barrier.generation + 1;
    yield();
}

inline void meet(Barrier& barrier, const char* operation, int predicate = 0) {
    if (barrier.arrived == 0) {
        barrier.operation = operation;
        barrier.count = 0;
    } else if (std::strcmp(barrier.operation, operation) != 0) {
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
std::vector<Lane>& exchange(const Value& value, const char* operation) {
    static_assert(sizeof(Value) <= sizeof(Lane));
    const int warp = machine.current / kLanes, lane = machine.current % kLanes;
    // A lane is at most one collective ahead of another, so two sets of deposits are enough.
    auto& deposits = machine.lanes[machine.threads[machine.current].collectives++ % 2][warp];
    std::memcpy(deposits[lane].bytes, &value, sizeof(Value));
    meet(machine.warps[warp], operation);
    return deposits;
}

template <typename Value>
Value read_lane(const std::vector<Lane>& deposits, int lane) {
    Value value;
    std::memcpy(&value, deposits[lane].bytes, sizeof(Value));
    return value;
}

}  // namespace rtpurbo::emulation
