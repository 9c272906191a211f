// Collective sums and loops of a thread block of kThreadsX x kThreadsY threads.
#ifndef MEK_BLOCK_CUH
#define MEK_BLOCK_CUH

#include "launch.h"

namespace mek {

constexpr int kThreadsX = 32, kThreadsY = 8, kThreads = kThreadsX * kThreadsY;

__device__ __forceinline__ int thread_index() { return (int)(threadIdx.y * kThreadsX + threadIdx.x); }

// Every thread gets the sum, added in an order that the block size alone fixes.
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double parts[kThreads];
    const int thread = thread_index();
    parts[thread] = value;
    __syncthreads();
    for (int step = kThreads / 2; step > 0; step /= 2) {
        if (thread < step) parts[thread] += parts[thread + step];
        __syncthreads();
    }
    const double total = parts[0];
    __syncthreads();
    return total;
}

// Each thread visits its share of a height x width plane; the share is the same in every such loop.
#define MEK_FOR_PLANE(y, x, height, width)                       \
    for (int y = (int)threadIdx.y; y < (height); y += kThreadsY) \
        for (int x = (int)threadIdx.x; x < (width); x += kThreadsX)

}  // namespace mek
#endif
