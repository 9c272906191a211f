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

Check &Check::optional(const char *name, const void *pointer, size_t alignment) {
    return pointer ? this->pointer(name, pointer, alignment) : *this;
}

Check &Check::dtype(const char *name, int32_t value) {
    if (!failed() && value != MEK_FLOAT32 && value != MEK_FLOAT16 && value != MEK_BFLOAT16)
        status_ = fail(MEK_INVALID_ARGUMENT, "%s: %s is %d, it must be MEK_FLOAT32, MEK_FLOAT16 or MEK_BFLOAT16",
                       function_, name, (int)value);
    return *this;
}

Check &Check::data(const char *name, const void *pointer, int32_t dtype) {
    return this->pointer(name, pointer, dtype == MEK_FLOAT32 ? 4 : 2);
}

Check &Check::motion(int64_t heads, int64_t frames, int64_t positions) {
    return size("heads", heads)
        .size("frames", frames, kMostFrames)
        .size("positions", positions)
        .elements("diagonal", heads, frames, frames, positions);
}

Check &Check::tokens(int64_t tokens, int64_t frames, int64_t positions) {
    return size("tokens", tokens)
        .size("frames", frames)
        .size("positions", positions)
        .elements("text_attention", tokens, frames, positions);
}

Check &Check::rows(int64_t rows, int64_t columns) {
    return size("rows", rows).size("columns", columns).elements("rows", rows, columns);
}

Check &Check::volumes(int64_t rows, const Volumes &v) {
    return size("rows", rows)
        .size("frames_in", v.frames_in, kMostAxis)
        .size("height_in", v.height_in, kMostAxis)
        .size("width_in", v.width_in, kMostAxis)
        .size("frames_out", v.frames_out, kMostAxis)
        .size("height_out", v.height_out, kMostAxis)
        .size("width_out", v.width_out, kMostAxis)
        .elements("maps", rows, v.frames_in, v.height_in, v.width_in)
        .elements("the resampled maps", rows, v.frames_out, v.height_out, v.width_out)
        .elements("a frame between the two sizes", v.height_in, v.width_out);
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
