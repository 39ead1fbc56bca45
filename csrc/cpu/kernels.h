// The kernels that exist once per instruction set, as a table that is chosen at run time.
#pragma once

#include "fastem/chain.h"
#include "fastem/network.h"
#include "fastem/philox.h"
#include "fastem/psf.h"
#include "fastem/spectral.h"
#include "fastem/step.h"

namespace fastem {

struct Kernels {
  const char* name;
  decltype(&fastem::spectral_sums_cpu) spectral_sums;
  decltype(&fastem::wiener_guidance_cpu) wiener_guidance;
  decltype(&fastem::psf_to_otf_rows_cpu) psf_to_otf_rows;
  decltype(&fastem::psf_to_otf_columns_cpu) psf_to_otf_columns;
  decltype(&fastem::convolve_support_scratch) convolve_support_scratch;
  decltype(&fastem::convolve_support_cpu) convolve_support;
  decltype(&fastem::project_kernel_cpu) project_kernel;
  decltype(&fastem::project_simplex_cpu) project_simplex;
  decltype(&fastem::simplex_least_squares_scratch) simplex_least_squares_scratch;
  decltype(&fastem::simplex_least_squares_cpu) simplex_least_squares;
  decltype(&fastem::chain_packed_size) chain_packed_size;
  decltype(&fastem::chain_pack_cpu) chain_pack;
  decltype(&fastem::chain_scratch_size) chain_scratch_size;
  decltype(&fastem::denoise_chain_cpu) denoise_chain;
  decltype(&fastem::hqs_scratch_size) hqs_scratch_size;
  decltype(&fastem::hqs_chain_cpu) hqs_chain;
  decltype(&fastem::predict_x0_cpu) predict_x0;
  decltype(&fastem::step_update_cpu) step_update;
  decltype(&fastem::step_update_philox_cpu) step_update_philox;
  decltype(&fastem::philox_normal_cpu) philox_normal;
  decltype(&fastem::group_norm_parts) group_norm_parts;
  decltype(&fastem::group_norm_partials) group_norm_partials;
  decltype(&fastem::group_norm_moments_cpu) group_norm_moments;
  decltype(&fastem::group_norm_finish_cpu) group_norm_finish;
  decltype(&fastem::group_norm_silu_cpu) group_norm_silu;
  decltype(&fastem::group_norm_sums_cpu) group_norm_sums;
  decltype(&fastem::group_norm_means_cpu) group_norm_means;
  decltype(&fastem::group_norm_silu_backward_cpu) group_norm_silu_backward;
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTEM_X86_DISPATCH
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

// The fastest table this machine can run, or the one that the environment variable FASTEM_ISA names
// (generic, avx2, avx512) where the machine can run it.
const Kernels& kernels();

}  // namespace fastem
