// Blur kernels on their support. Spec: the namesakes in fastem/ops/reference.py.
// Kernels are (image, h, w) with their origin at (h / 2, w / 2), autocorrelations g (image, 2 h - 1, 2 w - 1).
#pragma once

#include "fastem/math.h"

namespace fastem {

struct OtfParams {
  int64_t n_image, h, w;  // kernel
  int64_t height, width;  // image; kernels are not larger

  // Columns of a half spectrum.
  int64_t n_col() const { return width / 2 + 1; }
};

// Half spectrum of kernels by a pruned DFT, in two passes. The tables of dft_table,
// cos and sin (2 pi i / size) for i < size, are of the width for the rows and of the height for the columns.
// Rows: R (image, h, n_col) from k; rows [begin, end) of n_image * h.
// Columns: K (image, height, n_col) from R; frequency rows u and height - u together, pairs [begin, end) of
// n_image * (height / 2 + 1).
void dft_table(int64_t size, float* cosine, float* sine);
void psf_to_otf_rows_cpu(const float* k, const float* cos_w, const float* sin_w, cfloat* R, const OtfParams& p,
                         int64_t begin, int64_t end);
void psf_to_otf_columns_cpu(const cfloat* R, const float* cos_h, const float* sin_h, cfloat* K, const OtfParams& p,
                            int64_t begin, int64_t end);

struct PsfParams {
  int64_t n_image, h, w;
};

// z = g (*) k on the support. Images [begin, end); `scratch` holds convolve_support_scratch(h, w) floats.
int64_t convolve_support_scratch(int64_t h, int64_t w);
void convolve_support_cpu(const float* g, const float* k, float* z, float* scratch, const PsfParams& p, int64_t begin,
                          int64_t end);

// k = max(z, 0) / sum(max(z, 0)); nan where nothing is positive. Images [begin, end).
void project_kernel_cpu(const float* z, float* k, const PsfParams& p, int64_t begin, int64_t end);

// k = the nearest point of the simplex. Images [begin, end).
void project_simplex_cpu(const float* z, float* k, const PsfParams& p, int64_t begin, int64_t end);

// FISTA from k for argmin 1/2 x^T G x - b^T x on the simplex. Images [begin, end);
// `scratch` holds simplex_least_squares_scratch(h, w) floats.
int64_t simplex_least_squares_scratch(int64_t h, int64_t w);
void simplex_least_squares_cpu(const float* g, const float* b, const float* k, float* out, float* scratch,
                               const PsfParams& p, int64_t num_iters, int64_t begin, int64_t end);

// Cubic-spline shift of the centre of mass to the middle. Images [begin, end);
// `scratch` holds recentre_scratch(h, w) doubles.
int64_t recentre_scratch(int64_t h, int64_t w);
void recentre_cpu(const float* k, float* out, double* scratch, const PsfParams& p, int64_t begin, int64_t end);

#ifdef FASTEM_CUDA
// Everything, asynchronously on `stream`. Allocates nothing; all pointers are on the device; returns the launch status.
// `R` is workspace, (image, h, n_col). The *_cuda_scratch functions say how many floats of workspace (16-byte aligned,
// may be 0) the namesake needs.
cudaError_t psf_to_otf_cuda(const float* k, cfloat* R, cfloat* K, const OtfParams& p, cudaStream_t stream);
cudaError_t convolve_support_cuda(const float* g, const float* k, float* z, const PsfParams& p, cudaStream_t stream);
cudaError_t project_kernel_cuda(const float* z, float* k, const PsfParams& p, cudaStream_t stream);
cudaError_t project_simplex_cuda(const float* z, float* k, const PsfParams& p, cudaStream_t stream);
int64_t simplex_least_squares_cuda_scratch(const PsfParams& p);
cudaError_t simplex_least_squares_cuda(const float* g, const float* b, const float* k, float* out, float* scratch,
                                       const PsfParams& p, int64_t num_iters, cudaStream_t stream);
int64_t recentre_cuda_scratch(const PsfParams& p);
cudaError_t recentre_cuda(const float* k, float* out, float* scratch, const PsfParams& p, cudaStream_t stream);
#endif

}  // namespace fastem
