#include "parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "mek_check.h"

namespace mek {

static int usable_cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned cores = std::thread::hardware_concurrency();
    return cores ? (int)cores : 1;
}

int worker_count(int32_t threads, int64_t items, int64_t elements) {
    const int64_t worth = elements >> 15;  // starting a thread costs as much as some 30,000 elements
    int64_t workers = threads > 0 ? threads : usable_cores();
    if (workers > items) workers = items;
    if (workers > worth) workers = worth;
    if (workers > 1024) workers = 1024;
    return workers < 1 ? 1 : (int)workers;
}

void parallel_for(int64_t items, int workers, const std::function<void(int64_t, int)> &work) {
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_lock;
    auto drain = [&](int worker) {
        try {
            for (int64_t item; (item = next.fetch_add(1)) < items;) work(item, worker);
        } catch (...) {
            std::lock_guard<std::mutex> hold(error_lock);
            if (!error) error = std::current_exception();
        }
    };
    std::vector<std::thread> started;
    started.reserve(workers);
    for (int worker = 1; worker < workers; ++worker) {
        try {
            started.emplace_back(drain, worker);
        } catch (const std::system_error &) {
            break;  // the machine gives no more threads: those that run share the work
        }
    }
    drain(0);
    for (std::thread &thread : started) thread.join();
    if (error) std::rethrow_exception(error);
}

int32_t guarded(const char *function, const std::function<int32_t()> &body) {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return fail(MEK_OUT_OF_MEMORY, "%s: out of memory", function);
    } catch (const std::exception &error) {
        return fail(MEK_INTERNAL, "%s: %s", function, error.what());
    } catch (...) {
        return fail(MEK_INTERNAL, "%s: unknown failure", function);
    }
}

}  // namespace mek
