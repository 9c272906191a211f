// Enough of the CUDA runtime to run the kernels of csrc/cuda on a machine without a GPU: found before the
// real header, it turns the .cu files into C++.  Every thread of a block is a fiber that runs until its next
// barrier, blocks follow one another, and memory counts as a device's once a test registers it.
#ifndef MEK_CUDA_ON_HOST_H
#define MEK_CUDA_ON_HOST_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <functional>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_on_host {
struct Coordinates {
    dim3 thread, block, block_size, grid_size;
};
extern Coordinates now;
void barrier();
void launch(dim3 grid, dim3 block, void *stream, const std::function<void()> &kernel);
}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::now.thread)
#define blockIdx (cuda_on_host::now.block)
#define blockDim (cuda_on_host::now.block_size)
#define gridDim (cuda_on_host::now.grid_size)
#define __syncthreads() cuda_on_host::barrier()
#define MEK_LAUNCH(kernel, grid, block, stream, ...) \
    cuda_on_host::launch(dim3(grid), dim3(block), stream, [&] { kernel(__VA_ARGS__); })

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719
};
enum cudaMemoryType {
    cudaMemoryTypeUnregistered = 0,
    cudaMemoryTypeHost = 1,
    cudaMemoryTypeDevice = 2,
    cudaMemoryTypeManaged = 3
};
typedef void *cudaStream_t;
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
};

cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetLastError();
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer);
const char *cudaGetErrorString(cudaError_t error);
const char *cudaGetErrorName(cudaError_t error);

#endif
