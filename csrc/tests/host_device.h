// The native tests and the fuzz driver run every function twice: on the CPU, and on the CUDA kernels
// compiled for the host, whose memory is marked as a device's here.
#ifndef MEK_HOST_DEVICE_H
#define MEK_HOST_DEVICE_H

#include <stdint.h>

extern "C" {
void cuda_on_host_register(const void *pointer, int64_t bytes, int32_t device);
void cuda_on_host_clear(void);
void cuda_on_host_reverse(int32_t reverse);
}

// xorshift64*: the same numbers on every machine.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}

    uint64_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545f4914f6cdd1dull;
    }
    int64_t below(int64_t limit) { return (int64_t)(next() % (uint64_t)limit); }
    float uniform() { return (float)(next() >> 40) / 16777216.0f; }

  private:
    uint64_t state_;
};

#endif
