// The kernels for any machine.
#define FASTEM_ISA generic
#define FASTEM_LANES 4
#include "kernels.inc"

namespace fastem {
const Kernels kGenericKernels = FASTEM_KERNELS("generic");
}  // namespace fastem
