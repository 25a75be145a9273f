// The top-p choice of blocks of one row and head from their log masses, by a CTA.
#pragma once

#include <cfloat>

#include "args.h"
#include "block_list.cuh"
#include "cta.cuh"
#include "device.cuh"
#include "partition.cuh"
#include "selection.cuh"

namespace rtpurbo {

constexpr int kMassesToKeep = 32;  // log masses that a thread reads at once in the first pass,
constexpr int kMassesAtOnce = 8;   // and in the others, of those that were not kept
constexpr int kReplicas = 16;      // of the histogram

static_assert(kSelectThreads == kListThreads, "a thread is a bin and a word");

// Of masses, by all threads of a CTA. `kCopies`, so that few lanes meet in one bin.
template <int kCopies>
struct Histogram {
    // Masses in two halves of 16 bits, since shared memory adds 32-bit integers natively.
    uint32_t high[kBins * kCopies];
    uint32_t low[kBins * kCopies];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            high[i * kSelectThreads + threadIdx.x] = 0;
            low[i * kSelectThreads + threadIdx.x] = 0;
        }
    }

    DEVICE void add(int bin, uint64_t mass) {
        const int place = bin * kCopies + threadIdx.x % kCopies;
        atomicAdd(&high[place], static_cast<uint32_t>(mass >> 16));
        atomicAdd(&low[place], static_cast<uint32_t>(mass & 0xffffu));
    }

    // Of the bin that has this thread's number.
    DEVICE uint64_t sum() const {
        const int thread = threadIdx.x;
        uint64_t sum = 0;
#pragma unroll 4  // places of more would be kept in registers while blocks are scored
        for (int i = 0; i < kCopies; ++i) {
            // Each lane begins elsewhere: bins are a multiple of the banks apart.
            const int place = thread * kCopies + (i + thread * kCopies / 32) % kCopies;
            sum += (static_cast<uint64_t>(high[place]) << 16) + low[place];
        }
        return sum;
    }
};

struct SelectScratch {
    union {
        Histogram<kReplicas> histogram;
        ListScratch list;
    };
    uint64_t sums[kSelectWarps];
    float most[kSelectWarps];
    int flag;
};

// The bin up to which blocks are kept, and the log mass that bins are counted from.
struct Threshold {
    int bin;
    float most;
};

// Log masses of a row and head, for three passes over them; thread t has those of blocks t,
// t + kSelectThreads and so on. The first pass reads them in batches and keeps what fits in shared
// memory: this is one CTA's work while the others are done, so latency is all that counts.
struct Masses {
    const float* log_mass;
    int blocks;
    float* kept;
    int most_kept;  // a multiple of kSelectThreads

    // Blocks from `first` on, from memory. Always loads, so that those of a batch are under way
    // together; past the end any will do.
    template <int kAtOnce, typename Use>
    DEVICE void read(int first, Use use) const {
        for (int base = first; base < blocks; base += kSelectThreads * kAtOnce) {
            float masses[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int block = base + i * kSelectThreads + static_cast<int>(threadIdx.x);
                masses[i] = __ldcg(log_mass + min(block, blocks - 1));
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int block = base + i * kSelectThreads + static_cast<int>(threadIdx.x);
                if (base + i * kSelectThreads < blocks) {
                    use(block, block < blocks ? finite_or_none(masses[i]) : -INFINITY);
                }
            }
        }
    }

    // The first pass: the largest of this thread.
    DEVICE float keep() const {
        float most = -FLT_MAX;
        read<kMassesToKeep>(0, [&](int block, float mass) {
            if (block < most_kept) kept[block] = mass;
            most = fmaxf(most, mass);
        });
        return most;
    }

    // Another pass: use(block, log mass) for all blocks; threads stay together, and get no mass
    // past the end. No thread reads what another kept.
    template <typename Use>
    DEVICE void for_each(Use use) const {
        const int in_shared = min(blocks, most_kept);
#pragma unroll 4
        for (int base = 0; base < in_shared; base += kSelectThreads) {
            const int block = base + static_cast<int>(threadIdx.x);
            use(block, kept[block]);
        }
        if (blocks > in_shared) read<kMassesAtOnce>(in_shared, use);
    }
};

// The bin up to which blocks are kept, from the mass of the bin that has this thread's number.
DEVICE int threshold_bin(uint64_t mass, float top_p, uint64_t* sums) {
    uint64_t total = 0;
    const uint64_t cumulative = cta_running_sum(mass, sums, total);
    const double wanted = wanted_mass(top_p, total);
    const int bin = __syncthreads_count(static_cast<double>(cumulative) < wanted);
    return top_p >= 1.0f || bin > kBins - 1 ? kBins - 1 : bin;
}

DEVICE Threshold find_threshold(const Masses& masses, float top_p, SelectScratch& scratch) {
    Histogram<kReplicas>& histogram = scratch.histogram;
    histogram.clear();
    const float most = cta_max(masses.keep(), scratch.most);
    masses.for_each([&](int, float log_mass) {
        const float below = most - log_mass;
        const uint64_t mass = fixed_mass(below);
        if (mass != 0) histogram.add(mass_bin(below), mass);
    });
    __syncthreads();
    return {threshold_bin(histogram.sum(), top_p, scratch.sums), most};
}

// The share of a head's mass that is to be kept.
DEVICE float wanted_share(const SelectArgs& args, int64_t row, int64_t head) {
    const float own = args.own_top_p == nullptr ? NAN : args.own_top_p[row];
    const float common = args.top_p[row * args.top_p_row_stride + head * args.top_p_head_stride];
    return isnan(own) ? common : own;
}

// Tokens in `kept` of a context's blocks: the newest is always kept, and alone may be partial.
DEVICE int64_t tokens_of(int64_t kept, int blocks, int64_t block_tokens, int64_t context) {
    return kept * block_tokens - (blocks * block_tokens - context);
}

// Chooses the blocks of one row and head from its log masses.
DEVICE void choose(const SelectArgs& args, int64_t row, int64_t head, float* kept,
                   SelectScratch& scratch) {
    const int thread = threadIdx.x, lane = thread % 32;
    const int blocks = blocks_of(args, row);
    const int64_t at = row * args.heads + head;
    const Masses masses{args.log_mass + at * args.width, blocks, kept,
                        static_cast<int>(args.most_kept)};
    const Threshold threshold = find_threshold(masses, wanted_share(args, row, head), scratch);

    uint32_t* words = args.words + at * args.words_width;
    uint8_t* mask = args.mask == nullptr ? nullptr : args.mask + at * args.width;
    uint64_t kept_blocks = 0;
    masses.for_each([&](int block, float mass) {
        const bool inside = block < blocks;
        const bool keep = inside && (mass_bin(threshold.most - mass) <= threshold.bin ||
                                     is_forced(block, blocks));
        const uint32_t word = __ballot_sync(kAllLanes, keep);
        if (lane == 0 && inside) words[block / 32] = word;
        if (lane == 0) kept_blocks += __popc(word);
        if (inside && mask != nullptr) mask[block] = keep;
    });
    if (mask != nullptr) {
        for (int64_t block = blocks + thread; block < args.width; block += kSelectThreads) mask[block] = 0;
    }
    uint64_t total = 0;
    cta_running_sum(kept_blocks, scratch.sums, total);
    if (thread == 0 && args.attended != nullptr) {
        args.attended[at] = tokens_of(static_cast<int64_t>(total), blocks, args.block_tokens,
                                      args.context_lens[row]);
    }
}

}  // namespace rtpurbo
