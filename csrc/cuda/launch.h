// What every CUDA entry point does around its kernels: device, pointers, launch, errors.
#ifndef MEK_LAUNCH_H
#define MEK_LAUNCH_H

#include <cuda_runtime.h>

#include <initializer_list>

#include "mek_check.h"

namespace mek {

struct DevicePointer {
    const char *name;
    const void *pointer;
};

// Makes `device` current for a scope.
class OnDevice {
  public:
    explicit OnDevice(int32_t device) {
        if (cudaGetDevice(&previous_) == cudaSuccess && previous_ != device) restore_ = cudaSetDevice(device) == cudaSuccess;
    }
    ~OnDevice() {
        if (restore_) cudaSetDevice(previous_);
    }
    OnDevice(const OnDevice &) = delete;
    OnDevice &operator=(const OnDevice &) = delete;

  private:
    int previous_ = 0;
    bool restore_ = false;
};

int32_t cuda_status(const char *function, const char *what, cudaError_t error);

// The device exists, every pointer is memory of it, and the workspace is large enough and aligned.
int32_t check_device(const char *function, int32_t device, std::initializer_list<DevicePointer> pointers);
int32_t check_workspace(const char *function, const void *workspace, int64_t bytes, int64_t needed,
                        int32_t device);
// Blocks of a launch must fit the grid.
int32_t check_grid(const char *function, int64_t blocks);

constexpr int64_t kWorkspaceAlignment = 256;

}  // namespace mek

#if defined(__CUDACC__)
#define MEK_LAUNCH(kernel, grid, block, stream, ...) \
    kernel<<<dim3(grid), dim3(block), 0, (cudaStream_t)(stream)>>>(__VA_ARGS__)
#endif

// Launches and returns from the calling entry point on failure.
#define MEK_LAUNCH_OR_RETURN(function, kernel, grid, block, stream, ...)                    \
    do {                                                                                    \
        MEK_LAUNCH(kernel, grid, block, stream, __VA_ARGS__);                               \
        const int32_t launch_status = mek::cuda_status(function, #kernel, cudaGetLastError()); \
        if (launch_status != MEK_OK) return launch_status;                                  \
    } while (0)

#endif
