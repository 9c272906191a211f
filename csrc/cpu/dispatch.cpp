// Chooses the vector code once a process, by what the machine can run.
#include <atomic>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "mek_check.h"

namespace mek {

static bool runs_here(const Kernels *candidate) {
#if defined(MEK_HAVE_AVX512)
    if (candidate == &kernels_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx2") &&
               __builtin_cpu_supports("fma");
#endif
#if defined(MEK_HAVE_AVX2)
    if (candidate == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return candidate == &kernels_baseline;
}

static const Kernels *const candidates[] = {
#if defined(MEK_HAVE_AVX512)
    &kernels_avx512,
#endif
#if defined(MEK_HAVE_AVX2)
    &kernels_avx2,
#endif
    &kernels_baseline,
};

static const Kernels *widest() {
    for (const Kernels *candidate : candidates)
        if (runs_here(candidate)) return candidate;
    return &kernels_baseline;
}

// NULL when no such code is built in or the machine cannot run it.
static const Kernels *find(const char *name) {
    if (!name || !*name || !strcmp(name, "auto")) return widest();
    for (const Kernels *candidate : candidates)
        if (!strcmp(name, candidate->name) && runs_here(candidate)) return candidate;
    return nullptr;
}

static std::atomic<const Kernels *> chosen{nullptr};

const Kernels &kernels() {
    const Kernels *now = chosen.load(std::memory_order_acquire);
    if (!now) {
        now = find(getenv("MEKERNELS_CPU_LEVEL"));
        if (!now) now = widest();
        chosen.store(now, std::memory_order_release);
    }
    return *now;
}

}  // namespace mek

extern "C" {

const char *mek_cpu_level(void) { return mek::kernels().name; }

int32_t mek_cpu_set_level(const char *name) {
    const mek::Kernels *found = mek::find(name);
    if (!found)
        return mek::fail(MEK_UNSUPPORTED,
                         "mek_cpu_set_level: name is \"%.32s\", it must be auto, baseline, avx2 or avx512, be "
                         "built in and run on this machine",
                         name);
    mek::chosen.store(found, std::memory_order_release);
    return MEK_OK;
}
}
