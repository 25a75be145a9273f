// The one way to launch a kernel, and what is asked of the device before: in clusters or not, early or
// not. Emulated on the CPU as device.cuh is.
#pragma once

#include "device.cuh"

#ifdef __CUDACC__

namespace rtpurbo {

// How to launch in clusters of so many CTAs, 1 for none; `overlap`: may start early; `policy` says how
// the CTAs of a cluster are laid on multiprocessors, a cudaClusterSchedulingPolicy.
struct LaunchAttributes {
    cudaLaunchAttribute values[3] = {};
    unsigned count = 0;

    LaunchAttributes(bool overlap, int cluster, int policy) {
        if (overlap) {
            values[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            values[count++].val.programmaticStreamSerializationAllowed = 1;
        }
        if (cluster > 1) {
            values[count].id = cudaLaunchAttributeClusterDimension;
            values[count].val.clusterDim.x = static_cast<unsigned>(cluster);
            values[count].val.clusterDim.y = 1;
            values[count++].val.clusterDim.z = 1;
        }
        if (cluster > 1 && policy != cudaClusterSchedulingPolicyDefault) {
            values[count].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
            values[count++].val.clusterSchedulingPolicyPreference =
                static_cast<cudaClusterSchedulingPolicy>(policy);
        }
    }
};

// All kernels take one struct by value. Returns a cudaError_t.
template <typename Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, void* stream, Args args,
           bool overlap = false, int cluster = 1, int policy = 0) {
    void* parameters[] = {&args};
    LaunchAttributes attributes(overlap, cluster, policy);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes.values;
    config.numAttrs = attributes.count;
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters);
}

// Clusters of so many CTAs that run at the same time; 0 where the device cannot have any.
template <typename Args>
int clusters_at_once(void (*kernel)(Args), int threads, int shared_bytes, int cluster) {
    LaunchAttributes attributes(false, cluster, 0);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(cluster));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.attrs = attributes.values;
    config.numAttrs = attributes.count;
    int found = 0;
    const void* function = reinterpret_cast<const void*>(kernel);
    if (cudaOccupancyMaxActiveClusters(&found, function, &config) == cudaSuccess) return found;
    cudaGetLastError();  // has been answered
    return 0;
}

}  // namespace rtpurbo

#else
#include "emulated_launch.h"
#endif

namespace rtpurbo {

// Both return a cudaError_t.

// All of a multiprocessor's memory that can be: a busy one does not divide it anew.
template <typename Args>
int allow_shared(void (*kernel)(Args), int bytes) {
    if (int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         bytes)) {
        return error;
    }
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
}

// How many clusters of either size run at once; allows them their shared memory, and the larger ones.
template <typename Args, typename Plan>
int plan_clusters(void (*kernel)(Args), int threads, int shared_bytes, Plan& plan) {
    if (int error = allow_shared(kernel, shared_bytes)) return error;
    plan.clusters_of_8 = clusters_at_once(kernel, threads, shared_bytes, 8);
    if (int error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) {
        return error;
    }
    plan.clusters_of_16 = clusters_at_once(kernel, threads, shared_bytes, 16);
    return cudaSuccess;
}

}  // namespace rtpurbo
