// Argument checks of the C interface, shared by both libraries.  Host only.
#ifndef MEK_CHECK_H
#define MEK_CHECK_H

#include <stddef.h>
#include <stdint.h>

#include "mek.h"
#include "mek_resample.h"

namespace mek {

// Stores the message for mek_last_error() and returns the status.
int32_t fail(int32_t status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Remembers the first failure; later checks are skipped.
class Check {
  public:
    explicit Check(const char *function) : function_(function) {}

    Check &pointer(const char *name, const void *pointer, size_t alignment);
    Check &optional(const char *name, const void *pointer, size_t alignment);
    Check &data(const char *name, const void *pointer, int32_t dtype);  // aligned to its elements
    Check &floats(const char *name, const float *pointer) { return this->pointer(name, pointer, alignof(float)); }
    Check &size(const char *name, int64_t value, int64_t most = kMostSize);
    // The product of the sizes must be addressable; call after the sizes themselves were checked.
    Check &elements(const char *name, int64_t a, int64_t b, int64_t c = 1, int64_t d = 1);
    Check &dtype(const char *name, int32_t value);
    Check &motion(int64_t heads, int64_t frames, int64_t positions);
    Check &tokens(int64_t tokens, int64_t frames, int64_t positions);
    Check &rows(int64_t rows, int64_t columns);
    Check &volumes(int64_t rows, const Volumes &volumes);
    int32_t status() const { return status_; }
    bool failed() const { return status_ != MEK_OK; }

    static constexpr int64_t kMostFrames = 1 << 15;  // keeps the run counters of a position inside 32 bits
    static constexpr int64_t kMostSize = int64_t(1) << 31;
    static constexpr int64_t kMostAxis = 1 << 24;  // a coordinate is exact in any float

  private:
    const char *function_;
    int32_t status_ = MEK_OK;
};

}  // namespace mek
#endif
