// Argument checks of the C interface, shared by both libraries.  Host only.
#ifndef MEK_CHECK_H
#define MEK_CHECK_H

#include <stddef.h>
#include <stdint.h>

#include "mek.h"

namespace mek {

// Stores the message for mek_last_error() and returns the status.
int32_t fail(int32_t status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Remembers the first failure; later checks are skipped.
class Check {
  public:
    explicit Check(const char *function) : function_(function) {}

    Check &pointer(const char *name, const void *pointer, size_t alignment);
    Check &size(const char *name, int64_t value, int64_t most);
    // The product of the sizes must be addressable; call after the sizes themselves were checked.
    Check &elements(const char *name, int64_t a, int64_t b, int64_t c = 1, int64_t d = 1);
    Check &that(bool condition, const char *name, const char *must);
    int32_t status() const { return status_; }
    bool failed() const { return status_ != MEK_OK; }

  private:
    const char *function_;
    int32_t status_ = MEK_OK;
};

constexpr int64_t kMostFrames = 1 << 15;  // keeps the run counters of a position inside 32 bits
constexpr int64_t kMostSize = int64_t(1) << 31;

int32_t check_motion_scores(const char *function, const float *diagonal, const float *mean_attention,
                            const float *square_sum, int64_t heads, int64_t frames, int64_t positions,
                            const float *dfc, const float *tcs, const float *dsr);
int32_t check_motion_sizes(const char *function, int64_t heads, int64_t frames, int64_t positions);

}  // namespace mek
#endif
