// The convolutions for any machine.
#define FASTEM_ISA generic
#define FASTEM_LANES 4
#include "conv.inc"

namespace fastem {
const ConvKernels kGenericConv = FASTEM_CONV_KERNELS;
}  // namespace fastem
