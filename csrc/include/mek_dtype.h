// Reading half precision without the compiler's help: the baseline of some machines has none.
#ifndef MEK_DTYPE_H
#define MEK_DTYPE_H

#include "mek.h"
#include "mek_hd.h"

namespace mek {

MEK_HD float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

MEK_HD float float_of_bfloat16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

MEK_HD float float_of_float16(uint16_t half) {
    const uint32_t magnitude = half & 0x7fffu, sign = (uint32_t)(half & 0x8000u) << 16;
    // Scaling by 2^112 puts the exponent right and makes subnormals normal; infinity and NaN need all ones.
    const float scaled = float_of_bits(magnitude << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : 0u;
    uint32_t bits;
#if defined(__CUDA_ARCH__)
    bits = __float_as_uint(scaled);
#else
    __builtin_memcpy(&bits, &scaled, sizeof bits);
#endif
    return float_of_bits((special ? special : bits) | sign);
}

MEK_HD float load_as_float(const void *data, int32_t dtype, int64_t index) {
    if (dtype == MEK_FLOAT16) return float_of_float16(((const uint16_t *)data)[index]);
    if (dtype == MEK_BFLOAT16) return float_of_bfloat16(((const uint16_t *)data)[index]);
    return ((const float *)data)[index];
}

MEK_HD int64_t dtype_size(int32_t dtype) { return dtype == MEK_FLOAT32 ? 4 : 2; }

}  // namespace mek
#endif
