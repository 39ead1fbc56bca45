// The convolution kernels of one instruction set. Same scheme as kernels.h.
#pragma once

#include "fastem/conv.h"
#include "kernels.h"

namespace fastem {

struct ConvKernels {
  decltype(&conv_packed_size) packed_size;
  decltype(&conv_pack_cpu) pack;
  decltype(&conv_blocks) blocks;
  decltype(&conv_scratch_size) scratch_size;
  decltype(&conv_cpu) conv;
};

extern const ConvKernels kGenericConv;
#ifdef FASTEM_X86_DISPATCH
extern const ConvKernels kAvx2Conv, kAvx512Conv;
#endif

}  // namespace fastem
