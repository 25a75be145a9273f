// CUDA on the CPU, for tests: the kernels' sources compiled by a host compiler run here as they are.
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

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define HOST_DEVICE inline
#define DEVICE inline
#define __global__ static
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = rtpurbo::emulation::shared_memory()

struct int2 { int32_t x, y; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::isnan;
using std::max;
using std::min;

using cudaError_t = int;
enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoKernelImageForDevice = 209
};

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

// Collective operations.
namespace rtpurbo::emulation {
inline Barrier& cta_barrier() { return machine.ctas[current_rank()].barrier; }
}  // namespace rtpurbo::emulation

inline void __syncthreads() { rtpurbo::emulation::meet(rtpurbo::emulation::cta_barrier(), "cta"); }

inline int __syncthreads_count(int predicate) {
    auto& barrier = rtpurbo::emulation::cta_barrier();
    rtpurbo::emulation::meet(barrier, "count", predicate);
    return barrier.last_count;
}

inline void __syncwarp() { rtpurbo::emulation::exchange(0, "syncwarp"); }

template <typename Value>
Value __shfl_xor_sync(uint32_t, Value value, int step) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto& all = rtpurbo::emulation::exchange(value, "shuffle xor");
    return rtpurbo::emulation::read_lane<Value>(all, lane ^ step);
}

template <typename Value>
Value __shfl_sync(uint32_t, Value value, int from) {
    const auto& all = rtpurbo::emulation::exchange(value, "shuffle");
    return rtpurbo::emulation::read_lane<Value>(all, from);
}

template <typename Value>
Value __shfl_up_sync(uint32_t, Value value, int step) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto& all = rtpurbo::emulation::exchange(value, "shuffle up");
    return rtpurbo::emulation::read_lane<Value>(all, lane < step ? lane : lane - step);
}

inline uint32_t __ballot_sync(uint32_t, bool predicate) {
    const auto& all = rtpurbo::emulation::exchange(predicate, "ballot");
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
        bits |= static_cast<uint32_t>(rtpurbo::emulation::read_lane<bool>(all, lane)) << lane;
    }
    return bits;
}

inline int __reduce_add_sync(uint32_t, int value) {
    const auto& all = rtpurbo::emulation::exchange(value, "reduce add");
    int sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += rtpurbo::emulation::read_lane<int>(all, lane);
    return sum;
}

inline bool __any_sync(uint32_t lanes, bool predicate) {
    return __ballot_sync(lanes, predicate) != 0;
}

// Operations of one thread.
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline void __threadfence() {}
template <typename Value>
Value __ldcg(const Value* address) { return *address; }
inline uint32_t atomicAdd(uint32_t* address, uint32_t amount) {
    const uint32_t old = *address;
    *address += amount;
    return old;
}

namespace rtpurbo {

inline int log2_of(uint32_t power) { return 31 - std::countl_zero(power); }

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline uint32_t add_in_order(uint32_t* counter, uint32_t amount) {
    return atomicAdd(counter, amount);
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }

inline int32_t largest_of_warp(int32_t value) {
    const auto& all = emulation::exchange(value, "largest");
    for (int lane = 0; lane < 32; ++lane) {
        value = std::max(value, emulation::read_lane<int32_t>(all, lane));
    }
    return value;
}

inline float multiply(float a, float b) { return a * b; }
inline int from_here(int value) { return value; }
inline uint32_t zero_after(uint32_t) { return 0; }
template <typename Value>
Value load_streaming(const Value* address) { return *address; }

inline uint32_t pack_bfloat16(float low, float high) {
    const auto round = [](float value) -> uint32_t {
        const uint32_t bits = float_to_bits(value);
        if (std::isnan(value)) return 0x7fff;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

inline void copy_async_16(void* shared, const void* global, int bytes) {
    std::memset(shared, emulation::kPoison, 16);
    emulation::machine.threads[emulation::machine.current].open.push_back({shared, global, bytes});
}

inline void copy_async_commit() {
    auto& thread = emulation::machine.threads[emulation::machine.current];
    thread.committed.push_back(std::move(thread.open));
    thread.open.clear();
}

template <int kPending>
void copy_async_wait() {
    auto& groups = emulation::machine.threads[emulation::machine.current].committed;
    while (groups.size() > kPending) {
        for (const auto& copy : groups.front()) {
            std::memset(copy.to, 0, 16);
            std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        }
        groups.pop_front();
    }
}

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
inline float element_a(const std::vector<emulation::Lane>& all, int row, int k) {
    const auto from = emulation::read_lane<Fragments>(all, row % 8 * 4 + k % 8 / 2);
    const uint32_t pair = from.a[row / 8 + k / 8 * 2];
    return bits_to_float(k % 2 ? pair & 0xffff0000u : pair << 16);
}

inline float element_b(const std::vector<emulation::Lane>& all, int k, int column) {
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

// Kernels run one after the other.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

inline uint32_t bytes_up_to(uint32_t four, uint32_t bound) {
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) found |= uint32_t{(four >> 8 * i & 0xff) <= bound} << i;
    return found;
}

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

// The device: few multiprocessors, so that small inputs still give each several items.
enum {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributePreferredSharedMemoryCarveout,
    cudaFuncAttributeNonPortableClusterSizeAllowed,
    cudaSharedmemCarveoutMaxShared = 100
};
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount      ? 3
             : attribute == cudaDevAttrComputeCapabilityMajor ? 9
             : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                              : 232448;
    return 0;
}
template <typename Kernel>
int cudaFuncSetAttribute(Kernel, int, int) { return 0; }
template <typename Kernel>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* ctas, Kernel, int, size_t) {
    *ctas = 2;
    return 0;
}
inline const char* cudaGetErrorString(cudaError_t) {
    return rtpurbo::emulation::machine.error.c_str();
}
