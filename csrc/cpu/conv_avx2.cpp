// The convolutions for AVX2. Standard headers come before the target: other files share their inline functions.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FASTEM_ISA avx2
#define FASTEM_LANES 8
#include "conv.inc"

namespace fastem {
const ConvKernels kAvx2Conv = FASTEM_CONV_KERNELS;
}  // namespace fastem
#pragma GCC pop_options
#endif
