#include <cstring>

#include "conv_kernels.h"

namespace fastem {
namespace {

const ConvKernels& conv_kernels() {
#ifdef FASTEM_X86_DISPATCH
  static const ConvKernels& chosen = std::strcmp(kernels().name, "avx512") == 0 ? kAvx512Conv
                                     : std::strcmp(kernels().name, "avx2") == 0 ? kAvx2Conv
                                                                                : kGenericConv;
  return chosen;
#else
  return kGenericConv;
#endif
}

}  // namespace

int64_t conv_packed_size(const ConvParams& p) { return conv_kernels().packed_size(p); }

void conv_pack_cpu(const float* weight, float* packed, const ConvParams& p) { conv_kernels().pack(weight, packed, p); }

int64_t conv_blocks(const ConvParams& p) { return conv_kernels().blocks(p); }

int64_t conv_scratch_size(const ConvParams& p) { return conv_kernels().scratch_size(p); }

void conv_cpu(const float* x, const float* packed, const ConvEpilogue& e, float* scratch, const ConvParams& p,
              int64_t begin, int64_t end) {
  conv_kernels().conv(x, packed, e, scratch, p, begin, end);
}

}  // namespace fastem
