// Vectors of the width that the including file is compiled for.  Built on the compilers' vector types,
// so one source serves SSE2, AVX2, AVX-512 and NEON.  Include only from variant files: everything has
// internal linkage, and nothing from the standard library may come in with it.
#ifndef MEK_VECTOR_H
#define MEK_VECTOR_H

#include <stdint.h>

#include "mek_hd.h"

#if defined(__AVX512F__)
#define MEK_LANES 16
#elif defined(__AVX2__)
#define MEK_LANES 8
#else
#define MEK_LANES 4
#endif

namespace mek {

constexpr int kLanes = MEK_LANES;
typedef float vfloat __attribute__((vector_size(4 * MEK_LANES)));
typedef int32_t vint __attribute__((vector_size(4 * MEK_LANES)));
typedef float vhalf __attribute__((vector_size(2 * MEK_LANES)));
typedef double vdouble __attribute__((vector_size(4 * MEK_LANES)));

// Same types without the alignment, and allowed to alias, for reads and writes anywhere.
typedef vfloat vfloat_u __attribute__((aligned(4), may_alias));
typedef vint vint_u __attribute__((aligned(4), may_alias));
typedef vdouble vdouble_u __attribute__((aligned(8), may_alias));
typedef vhalf vhalf_u __attribute__((aligned(4), may_alias));

#define MEK_LOAD(type, p) (*(const type##_u *)(p))
#define MEK_STORE(type, p, v) (*(type##_u *)(p) = (v))
#define MEK_WIDEN(p) __builtin_convertvector(MEK_LOAD(vhalf, p), vdouble)

}  // namespace mek
#endif
