// The functions of hopper.cuh on the CPU; see machine.h.
//
// TMA loads leave NaN at their destination and come some time later. Products are computed at random
// either when they are issued, or when they are waited for and scores are NaN until then. Registers of
// an operand are read when a product is issued, and the warps of a warpgroup are not held to issue it
// together.
#pragma once

#include <array>

#include "emulated_collectives.h"
#include "emulated_cuda.h"
#include "emulated_device.h"
#include "machine.h"

#define RTPURBO_HAS_HOPPER

struct CUtensorMap {
    const unsigned char* data;
    int rank;
    uint64_t sizes[3], strides[3];  // strides in bytes, of dimensions as sizes
    uint32_t box[3];
};

namespace rtpurbo::hopper {

using emulation::Barrier;
using emulation::machine;

constexpr uint32_t kFirstAddress = 0x480;  // of shared memory: aligned as little as it may be

inline uint32_t shared_address(const void* pointer) {
    const auto* byte = static_cast<const unsigned char*>(pointer);
    return static_cast<uint32_t>(byte - emulation::shared_memory()) + kFirstAddress;
}

// Place of an address in tiles that are swizzled by 128 bytes.
inline unsigned char* swizzled(uint32_t address) {
    return emulation::shared_memory() + (address ^ (address >> 7 & 7) << 4) - kFirstAddress;
}

// ---- barriers: `count` holds the bytes that are still to come

inline void settle(Barrier& barrier) {
    if (barrier.arrived < barrier.expected || barrier.count != 0) return;
    barrier.arrived = 0;
    ++barrier.generation;
}

inline void barrier_init(uint64_t* barrier, int arrivals) {
    machine.others[barrier] = Barrier{arrivals};
}

inline void barrier_arrive(uint64_t* barrier) {
    Barrier& found = machine.others.at(barrier);
    if (++found.arrived > found.expected) emulation::fail("more arrivals than expected");
    settle(found);
}

inline void barrier_expect_bytes(uint64_t* barrier, int bytes) {
    machine.others.at(barrier).count += bytes;
    barrier_arrive(barrier);
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    Barrier& found = machine.others.at(barrier);
    while ((found.generation & 1) == parity) emulation::wait_for(found);
}

inline void publish_barriers() {}
inline void publish_shared() {}

inline Barrier& named(int name, int threads) {
    // No address is as low as the names of barriers.
    Barrier& found = machine.others[reinterpret_cast<const void*>(static_cast<uintptr_t>(name))];
    found.expected = threads;
    return found;
}

inline void named_sync(int name, int threads) { emulation::meet(named(name, threads), "named"); }

inline void named_arrive(int name, int threads) {
    Barrier& barrier = named(name, threads);
    barrier.operation = "named";
    ++barrier.arrived;
    settle(barrier);
}

template <int> void give_registers_back() {}
template <int> void take_registers() {}

// ---- loads

inline int encode_map(CUtensorMap* map, const void* data, int rank, const uint64_t* sizes,
                      const uint64_t* strides, const uint32_t* box) {
    *map = {static_cast<const unsigned char*>(data), rank, {1, 1, 1}, {2, 0, 0}, {1, 1, 1}};
    for (int i = 0; i < rank; ++i) {
        map->sizes[i] = sizes[i];
        map->box[i] = box[i];
        if (i > 0) map->strides[i] = strides[i - 1];
        if (i > 0 && strides[i - 1] % 16 != 0) return cudaErrorInvalidValue;
    }
    return box[0] * 2 == 128 ? cudaSuccess : cudaErrorInvalidValue;
}

// Calls use(address, element or null) for the elements of a box.
template <typename Use>
void for_each(const CUtensorMap& map, uint32_t address, const std::array<int, 3>& at, Use use) {
    for (uint32_t z = 0; z < map.box[2]; ++z) {
        for (uint32_t y = 0; y < map.box[1]; ++y) {
            for (uint32_t x = 0; x < map.box[0]; ++x, address += 2) {
                const uint64_t place[] = {at[0] + uint64_t{x}, at[1] + uint64_t{y},
                                          at[2] + uint64_t{z}};
                const unsigned char* from = map.data;
                for (int i = 0; i < 3; ++i) {
                    if (place[i] >= map.sizes[i]) from = nullptr;
                    if (from != nullptr) from += place[i] * map.strides[i];
                }
                use(address, from);
            }
        }
    }
}

inline void load_3d(void* shared, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
    const uint32_t address = shared_address(shared);
    const std::array<int, 3> at = {x, y, z};
    if (address % 1024 != 0) emulation::fail("a tile that is not aligned");
    for_each(*map, address, at, [](uint32_t to, const unsigned char*) {
        std::memset(swizzled(to), emulation::kPoison, 2);
    });
    machine.deferred.push_back([=, copied = *map] {
        int bytes = 0;
        for_each(copied, address, at, [&](uint32_t to, const unsigned char* from) {
            std::memset(swizzled(to), 0, 2);
            if (from != nullptr) std::memcpy(swizzled(to), from, 2);
            bytes += 2;
        });
        machine.others.at(barrier).count -= bytes;
        settle(machine.others.at(barrier));
    });
}

inline void load_2d(void* shared, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
    load_3d(shared, map, barrier, x, y, 0);
}

// ---- products

struct Tile {
    uint32_t address;
    int half_bytes;

    Tile(const void* tile, int half) : address(shared_address(tile)), half_bytes(half) {}
    Tile operator+(int bytes) const {
        Tile sum = *this;
        sum.address += static_cast<uint32_t>(bytes);
        return sum;
    }
};

inline float element(uint32_t address) {
    uint16_t bits;
    std::memcpy(&bits, swizzled(address), 2);
    return bits_to_float(static_cast<uint32_t>(bits) << 16);
}

// Element of a tile whose columns are the reduced dimension, and of one whose rows are.
inline float by_row(Tile tile, int row, int k) {
    return element(tile.address + static_cast<uint32_t>(row * 128 + k * 2));
}
inline float by_column(Tile tile, int k, int column) {
    const int at = column / 64 * tile.half_bytes + k * 128 + column % 64 * 2;
    return element(tile.address + static_cast<uint32_t>(at));
}

inline emulation::Thread& mine() { return machine.threads[machine.current]; }

inline void products_begin() { mine().multiplies_early = machine.random() % 2 != 0; }
inline void products_commit() {
    mine().committed_products.push_back(std::move(mine().products));
    mine().products.clear();
}

inline void issue(std::function<void()> product) {
    if (mine().multiplies_early) {
        product();
    } else {
        mine().products.push_back(std::move(product));
    }
}

template <int kPending>
void products_wait() {
    auto& groups = mine().committed_products;
    while (groups.size() > kPending) {
        for (const auto& product : groups.front()) product();
        groups.erase(groups.begin());
    }
    emulation::exchange(0, "wgmma wait");  // a warp waits as one
}

inline int of_warp(int value) { return __shfl_sync(0xffffffffu, value, 0); }

template <typename Registers>
void pin(Registers&) {}
inline void after(float) {}

// The rows of d that a thread holds, by the index of an element.
inline int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
inline int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

inline void multiply_64x128(float (&d)[64], Tile a, Tile b, int accumulate) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    if (!accumulate) std::fill(d, d + 64, NAN);
    issue([&d, a, b, accumulate, thread] {
        for (int i = 0; i < 64; ++i) {
            float sum = accumulate ? d[i] : 0.f;
            for (int k = 0; k < 16; ++k) {
                sum += by_row(a, row_of(thread, i), k) * by_row(b, column_of(thread, i), k);
            }
            d[i] = sum;
        }
    });
}

template <int kCount>
void multiply_add_rows(float (&d)[kCount], const uint32_t* a, Tile b) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const auto lanes = emulation::exchange(std::array{a[0], a[1], a[2], a[3]}, "wgmma");
    std::array<float, 32> own;  // of rows lane / 4 and 8 below
    for (int i = 0; i < 32; ++i) {
        const int k = i % 16;
        const auto from = emulation::read_lane<std::array<uint32_t, 4>>(
            lanes, thread % 32 / 4 * 4 + k % 8 / 2);
        const uint32_t pair = from[static_cast<size_t>(i / 16 + k / 8 * 2)];
        own[static_cast<size_t>(i)] = bits_to_float(k % 2 ? pair & 0xffff0000u : pair << 16);
    }
    issue([&d, own, b, thread] {
        for (int i = 0; i < kCount; ++i) {
            for (int k = 0; k < 16; ++k) {
                d[i] += own[static_cast<size_t>(i / 2 % 2 * 16 + k)] *
                        by_column(b, k, column_of(thread, i));
            }
        }
    });
}

}  // namespace rtpurbo::hopper
