#include "mek_check.h"

#include <initializer_list>
#include <stdarg.h>
#include <stdio.h>

namespace mek {

static thread_local char last_error[512];

int32_t fail(int32_t status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

Check &Check::pointer(const char *name, const void *pointer, size_t alignment) {
    if (failed()) return *this;
    if (!pointer)
        status_ = fail(MEK_INVALID_ARGUMENT, "%s: %s is a null pointer", function_, name);
    else if (reinterpret_cast<uintptr_t>(pointer) % alignment)
        status_ = fail(MEK_INVALID_ARGUMENT, "%s: %s is at %p, it must be aligned to %zu bytes", function_, name,
                       pointer, alignment);
    return *this;
}

Check &Check::size(const char *name, int64_t value, int64_t most) {
    if (!failed() && (value < 1 || value > most))
        status_ = fail(MEK_INVALID_ARGUMENT, "%s: %s is %lld, it must be from 1 to %lld", function_, name,
                       (long long)value, (long long)most);
    return *this;
}

Check &Check::elements(const char *name, int64_t a, int64_t b, int64_t c, int64_t d) {
    if (failed()) return *this;
    const int64_t most = int64_t(1) << 46;
    int64_t product = 1;
    for (int64_t factor : {a, b, c, d}) {
        if (factor > most / product) {
            status_ = fail(MEK_INVALID_ARGUMENT, "%s: %s would have over %lld elements", function_, name,
                           (long long)most);
            return *this;
        }
        product *= factor;
    }
    return *this;
}

Check &Check::that(bool condition, const char *name, const char *must) {
    if (!failed() && !condition)
        status_ = fail(MEK_INVALID_ARGUMENT, "%s: %s must %s", function_, name, must);
    return *this;
}

int32_t check_motion_sizes(const char *function, int64_t heads, int64_t frames, int64_t positions) {
    return Check(function)
        .size("heads", heads, kMostSize)
        .size("frames", frames, kMostFrames)
        .size("positions", positions, kMostSize)
        .elements("diagonal", heads, frames, frames, positions)
        .status();
}

int32_t check_motion_scores(const char *function, const float *diagonal, const float *mean_attention,
                            const float *square_sum, int64_t heads, int64_t frames, int64_t positions,
                            const float *dfc, const float *tcs, const float *dsr) {
    const int32_t status = check_motion_sizes(function, heads, frames, positions);
    if (status != MEK_OK) return status;
    return Check(function)
        .pointer("diagonal", diagonal, alignof(float))
        .pointer("mean_attention", mean_attention, alignof(float))
        .pointer("square_sum", square_sum, alignof(float))
        .pointer("dfc", dfc, alignof(float))
        .pointer("tcs", tcs, alignof(float))
        .pointer("dsr", dsr, alignof(float))
        .status();
}

}  // namespace mek

extern "C" {

int32_t mek_abi_version(void) { return MEK_ABI_VERSION; }

const char *mek_last_error(void) { return mek::last_error; }

const char *mek_status_name(int32_t status) {
    switch (status) {
        case MEK_OK: return "MEK_OK";
        case MEK_INVALID_ARGUMENT: return "MEK_INVALID_ARGUMENT";
        case MEK_UNSUPPORTED: return "MEK_UNSUPPORTED";
        case MEK_OUT_OF_MEMORY: return "MEK_OUT_OF_MEMORY";
        case MEK_DEVICE_ERROR: return "MEK_DEVICE_ERROR";
        case MEK_INTERNAL: return "MEK_INTERNAL";
        default: return "unknown status";
    }
}

const char *mek_compiler(void) {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}
}
