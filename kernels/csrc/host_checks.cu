// The kernels' arithmetic on the host, so that tests without a GPU can compare it with Python, and
// the names of CUDA's errors.

#include "args.h"
#include "device.cuh"
#include "partition.cuh"
#include "selection.cuh"

using namespace rtpurbo;

extern "C" int rtpurbo_mass_bin(float below) { return mass_bin(below); }

extern "C" uint64_t rtpurbo_fixed_mass(float below) { return fixed_mass(below); }

extern "C" int rtpurbo_is_forced(int block, int blocks) { return is_forced(block, blocks); }

extern "C" int64_t rtpurbo_share_start(int64_t cta, int64_t total, int64_t ctas) {
    return share_start(cta, total, ctas);
}

extern "C" int rtpurbo_piece_blocks(int total, int items, int workers, int least) {
    return piece_blocks(total, items, workers, least);
}

extern "C" int rtpurbo_piece_start(int piece, int pieces, int blocks) {
    return piece_start(piece, pieces, blocks);
}

extern "C" int rtpurbo_divide(int of, int by) { return divide(of, divisor_of(by)); }

extern "C" int rtpurbo_shares_start(int share, int total, int count) {
    return Shares(total, count).start(share);
}

extern "C" int rtpurbo_shares_owner(int piece, int total, int count) {
    return Shares(total, count).owner(piece);
}

extern "C" int64_t rtpurbo_working_ctas(int64_t total, int64_t ctas, int64_t least) {
    return working_ctas(total, ctas, least);
}

extern "C" int rtpurbo_item_of(const int* starts, int count, int64_t unit) {
    return item_of(starts, count, unit);
}

// Blocks that the window rule reads, ascending; returns how many.
extern "C" int rtpurbo_window_blocks(int64_t context, int64_t block_tokens, int64_t window,
                                     int64_t sinks, int* blocks) {
    const WindowBlocks found = window_blocks(context, block_tokens, window, sinks);
    for (int i = 0; i < found.count(); ++i) blocks[i] = found.at(i);
    return found.count();
}

extern "C" int64_t rtpurbo_struct_bytes(int which) {
    return which == 0   ? sizeof(SelectArgs)
           : which == 1 ? sizeof(DecodeArgs)
           : which == 2 ? sizeof(Group)
           : which == 3 ? sizeof(ListEntry)
                        : sizeof(SelectPlan);
}

extern "C" const char* rtpurbo_error_name(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
