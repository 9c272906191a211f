#include "launch.h"

namespace mek {

int32_t cuda_status(const char *function, const char *what, cudaError_t error) {
    if (error == cudaSuccess) return MEK_OK;
    return fail(MEK_DEVICE_ERROR, "%s: %s: %s (%s)", function, what, cudaGetErrorString(error),
                cudaGetErrorName(error));
}

static int32_t check_device_pointer(const char *function, int32_t device, const DevicePointer &argument) {
    cudaPointerAttributes attributes;
    const cudaError_t error = cudaPointerGetAttributes(&attributes, argument.pointer);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return cuda_status(function, argument.name, error);
    }
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
        return fail(MEK_INVALID_ARGUMENT, "%s: %s is host memory, it must be memory of device %d", function,
                    argument.name, (int)device);
    if (attributes.type == cudaMemoryTypeDevice && attributes.device != device)
        return fail(MEK_INVALID_ARGUMENT, "%s: %s is memory of device %d, it must be of device %d", function,
                    argument.name, attributes.device, (int)device);
    return MEK_OK;
}

int32_t check_device(const char *function, int32_t device, std::initializer_list<DevicePointer> pointers) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return cuda_status(function, "no usable CUDA device", error);
    }
    if (device < 0 || device >= count)
        return fail(MEK_INVALID_ARGUMENT, "%s: device is %d, it must be from 0 to %d", function, (int)device,
                    count - 1);
    for (const DevicePointer &argument : pointers) {
        const int32_t status = check_device_pointer(function, device, argument);
        if (status != MEK_OK) return status;
    }
    return MEK_OK;
}

int32_t check_workspace(const char *function, const void *workspace, int64_t bytes, int64_t needed,
                        int32_t device) {
    const int32_t status = Check(function).pointer("workspace", workspace, kWorkspaceAlignment).status();
    if (status != MEK_OK) return status;
    if (bytes < needed)
        return fail(MEK_INVALID_ARGUMENT, "%s: workspace_bytes is %lld, it must be at least %lld", function,
                    (long long)bytes, (long long)needed);
    return check_device_pointer(function, device, {"workspace", workspace});
}

int32_t check_grid(const char *function, int64_t blocks) {
    if (blocks <= 0x7fffffff) return MEK_OK;
    return fail(MEK_UNSUPPORTED, "%s: needs %lld thread blocks, a grid has at most 2147483647", function,
                (long long)blocks);
}

}  // namespace mek

int32_t mek_cuda_device_count(int32_t *count) {
    const char *function = "mek_cuda_device_count";
    const int32_t status = mek::Check(function).pointer("count", count, alignof(int32_t)).status();
    if (status != MEK_OK) return status;
    int found = 0;
    const cudaError_t error = cudaGetDeviceCount(&found);
    *count = error == cudaSuccess ? found : 0;
    if (error != cudaSuccess) cudaGetLastError();
    return mek::cuda_status(function, "no usable CUDA device", error);
}
