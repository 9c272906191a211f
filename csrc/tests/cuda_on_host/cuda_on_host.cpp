#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_host {

Coordinates now;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
};

struct Range {
    const char *begin, *end;
    int device;
};

constexpr size_t kStack = 128 * 1024;
constexpr int kDevices = 2;

static std::vector<Fiber> fibers;
static std::vector<Range> ranges;
static ucontext_t scheduler;
static int current_fiber;
static const std::function<void()> *running;
static int current_device;
static cudaError_t last_error = cudaSuccess;
static bool reversed;
static long launches;

static void enter() {
    (*running)();
    fibers[current_fiber].done = true;
    swapcontext(&fibers[current_fiber].context, &scheduler);
}

void barrier() { swapcontext(&fibers[current_fiber].context, &scheduler); }

static void start(Fiber &fiber) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
}

// Runs every thread up to its next barrier; all of them must then be waiting, or all be done.
static void run_block(int threads) {
    for (int i = 0; i < threads; ++i) start(fibers[i]);
    for (int done = 0; done < threads;) {
        done = 0;
        for (int i = 0; i < threads; ++i) {
            current_fiber = reversed ? threads - 1 - i : i;
            now.thread = dim3(current_fiber % now.block_size.x, current_fiber / now.block_size.x);
            swapcontext(&scheduler, &fibers[current_fiber].context);
            done += fibers[current_fiber].done;
        }
        if (done && done < threads) {
            fprintf(stderr, "cuda_on_host: %d of %d threads left a block while others wait\n", done, threads);
            abort();
        }
    }
}

void launch(dim3 grid, dim3 block, void *, const std::function<void()> &kernel) {
    const int threads = (int)(block.x * block.y * block.z);
    if (!grid.x || !threads || threads > 1024) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    ++launches;
    if ((int)fibers.size() < threads) fibers.resize(threads);
    running = &kernel;
    now.block_size = block;
    now.grid_size = grid;
    for (unsigned i = 0; i < grid.x; ++i) {
        now.block = dim3(reversed ? grid.x - 1 - i : i, 0, 0);
        run_block(threads);
    }
}

}  // namespace cuda_on_host

using namespace cuda_on_host;

extern "C" __attribute__((visibility("default"))) void cuda_on_host_register(const void *pointer, int64_t bytes,
                                                                             int32_t device) {
    const char *begin = static_cast<const char *>(pointer);
    ranges.push_back({begin, begin + bytes, device});
}

extern "C" __attribute__((visibility("default"))) void cuda_on_host_clear() { ranges.clear(); }

// Threads and blocks in rising or falling order: a missing barrier shows as a different result.
extern "C" __attribute__((visibility("default"))) void cuda_on_host_reverse(int32_t reverse) { reversed = reverse; }

extern "C" __attribute__((visibility("default"))) int64_t cuda_on_host_launches() { return launches; }

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = kDevices;
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -1;
    for (const Range &range : ranges)
        if (pointer >= range.begin && pointer < range.end) {
            attributes->type = cudaMemoryTypeDevice;
            attributes->device = range.device;
        }
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t) { return "emulated failure"; }

const char *cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
