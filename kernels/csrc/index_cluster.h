// The indexer of a single row, a cluster of CTAs for each head (index_cluster.cu).
#pragma once

#include "args.h"

namespace rtpurbo {

// Whether a cluster can do what is asked for: choose blocks of one row, and leave no masks.
inline bool suits_clusters(const SelectArgs& args) {
    return args.rows == 1 && args.words != nullptr && args.mask == nullptr &&
           args.width <= kMaxBlocks;
}

// Both return a cudaError_t. The plan is to be asked for before the first launch on a device; it says
// how many clusters run at once there, 0 of a size that it does not have.
int launch_index_cluster(const SelectArgs& args, void* stream);
int plan_index_cluster(const SelectArgs& args, SelectPlan& plan);

}  // namespace rtpurbo
