// The whole C ABI of the native CPU kernels: raw pointers, sizes in elements, no torch and no Python.
//
// Every function returns 0, or -1 where memory ran out. `threads`, 1 or more, is how many may work on it, the caller's
// included; they are OpenMP's, which torch uses too. Results do not depend on the number of threads.
// A change of any signature changes MARS_ABI, here and in kernels/_native.py.
#pragma once
#include <cstdint>

#define MARS_ABI 2

#if defined(_WIN32)
#define MARS_EXPORT extern "C" __declspec(dllexport)
#else
#define MARS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

MARS_EXPORT int mars_abi();
MARS_EXPORT int mars_threaded();  // 1 where it was built with OpenMP; otherwise one thread does all

// Instruction sets, see Level in simd.h.
MARS_EXPORT int mars_level();                     // the one in use
MARS_EXPORT int mars_level_supported(int level);  // 1 where this processor and this build have it
MARS_EXPORT int mars_set_level(int level);        // -1 where it is not supported

// Nearest code (kernels/nearest_code). A codebook (codes, dim) is packed once, for the level in use, and searched by
// any number of threads and calls. normalized: rows of length 1, whose norms do not enter (cosine).
MARS_EXPORT void* mars_codebook_pack(const float* codebook, int64_t codes, int64_t dim,
                                     int normalized);  // null: no memory
MARS_EXPORT void mars_codebook_free(void* packed);
MARS_EXPORT int mars_nearest_code(const void* packed, const float* x, int64_t rows, int64_t* ids,
                                  int threads);  // x (rows, dim)

// Multi-scale residual quantiser (kernels/multiscale_quantize). f (batch, dim, height, width); codebook (codes, dim),
// and packed, what mars_codebook_pack made of it; taps (phis, 3, 3, dim, dim), of which the last but one is summed
// over, and bias (phis, dim); grids (scales, 2), the last the map's; phi_index (scales); bicubic: per scale the
// matrices of the up-sampling and its shifts by -1, 0, 1, (height, 3, h) and (width, 3, w); keep (batch) or null; ids
// (batch, tokens); totals (scales, batch, dim, height, width).
MARS_EXPORT int mars_multiscale_quantize(const float* f, int64_t batch, int64_t dim, int64_t height, int64_t width,
                                         const float* codebook, const void* packed, const float* taps,
                                         const float* bias, int64_t scales, const int64_t* grids,
                                         const int64_t* phi_index, const float* bicubic, const int64_t* keep,
                                         int64_t* ids, float* totals, int threads);

// Channel multiplexing of (batch, bins, frames) by factors r_f and r_t, which divide bins and frames, to and from
// (batch, r_f r_t, bins / r_f, frames / r_t), all contiguous. element_size is in bytes: 1, 2, 4, 8 or 16.
MARS_EXPORT int mars_cmx(int64_t batch, int64_t bins, int64_t frames, int64_t r_f, int64_t r_t, int64_t element_size,
                         const void* x, void* y, int threads);
MARS_EXPORT int mars_inverse_cmx(int64_t batch, int64_t bins, int64_t frames, int64_t r_f, int64_t r_t,
                                 int64_t element_size, const void* x, void* y, int threads);

// CMX tensor of min(scale log1p(|z| / epsilon) - 1, 1). z is complex, interleaved, with strides in complex numbers of
// which the bins' or the frames' is 1; grad_z too, with the same one.
MARS_EXPORT int mars_spectrogram_cmx(int64_t batch, int64_t bins, int64_t frames, int64_t r_f, int64_t r_t,
                                     double epsilon, double scale, const float* z, int64_t z_sample, int64_t z_bin,
                                     int64_t z_frame, float* x, int threads);
MARS_EXPORT int mars_spectrogram_cmx_backward(int64_t batch, int64_t bins, int64_t frames, int64_t r_f, int64_t r_t,
                                              double epsilon, double scale, const float* grad, const float* z,
                                              int64_t z_sample, int64_t z_bin, int64_t z_frame, float* grad_z,
                                              int64_t grad_z_sample, int64_t grad_z_bin, int64_t grad_z_frame,
                                              int threads);
// Magnitudes (batch, below + bins + above, frames) of a CMX tensor, epsilon expm1((clamp(x, -1, 1) + 1) / scale);
// the bins below and above become 0.
MARS_EXPORT int mars_inverse_spectrogram_cmx(int64_t batch, int64_t bins, int64_t frames, int64_t r_f, int64_t r_t,
                                             int64_t below, int64_t above, double epsilon, double scale, const float* x,
                                             float* m, int threads);
