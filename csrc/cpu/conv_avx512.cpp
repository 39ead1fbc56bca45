// The convolutions for AVX512. Standard headers come before the target: other files share their inline functions.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#define FASTEM_ISA avx512
#define FASTEM_LANES 16
#include "conv.inc"

namespace fastem {
const ConvKernels kAvx512Conv = FASTEM_CONV_KERNELS;
}  // namespace fastem
#pragma GCC pop_options
#endif
