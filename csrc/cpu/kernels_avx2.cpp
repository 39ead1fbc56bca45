// The kernels for AVX2. Standard headers come before the target: their inline functions are shared with other files.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FASTEM_ISA avx2
#define FASTEM_FMA
#define FASTEM_LANES 8
#include "kernels.inc"

namespace fastem {
const Kernels kAvx2Kernels = FASTEM_KERNELS("avx2");
}  // namespace fastem
#pragma GCC pop_options
#endif
