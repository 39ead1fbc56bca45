// The kernels for AVX512. Standard headers come before the target: their inline functions are shared with other files.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#define FASTEM_ISA avx512
#define FASTEM_FMA
#define FASTEM_LANES 16
#include "kernels.inc"

namespace fastem {
const Kernels kAvx512Kernels = FASTEM_KERNELS("avx512");
}  // namespace fastem
#pragma GCC pop_options
#endif
