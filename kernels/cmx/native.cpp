// Channel multiplexing (a permutation) and, in the same pass, the normalised log magnitude of an STFT and its inverse.
//
// The arithmetic is scalar C++ that the compiler vectorises, once for each instruction set. Every operation is rounded
// as written and fused only where `fma` says so: an element has the same bits wherever in a vector or its tail it is.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "simd.h"

#if defined(__GNUC__)
#define MARS_RESTRICT __restrict__
#else
#define MARS_RESTRICT
#endif

namespace mars {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float TINY = 0x1p-120f;           // added to squares that are compared to 1: subnormal ones would be slow
constexpr int64_t RUN = 1024;               // frames of a row at a time; a multiple of the factors that `split` unrolls
constexpr int64_t BINS = 64, FRAMES = 128;  // of a tile whose bins are contiguous
constexpr int64_t AHEAD = 12;               // frames of a tile to prefetch
constexpr int64_t ALONG_BINS = BINS + 16, ALONG_FRAMES = FRAMES + 16;  // pitches, not powers of two: cache sets

#if defined(__FP_FAST_FMAF)
constexpr bool PORTABLE_FMA = true;
#else
constexpr bool PORTABLE_FMA = false;
#endif

template <bool FMA>
MARS_INLINE float fma(float a, float b, float c) {
  if constexpr (FMA) return std::fma(a, b, c);
  return a * b + c;
}

// c + c' x + c'' x^2 + ...; recursive, as a loop would have to be unrolled before the caller's can be vectorised.
template <bool FMA>
MARS_INLINE float polynomial(float, float c) {
  return c;
}
template <bool FMA, class... Rest>
MARS_INLINE float polynomial(float x, float c, Rest... rest) {
  return fma<FMA>(polynomial<FMA>(x, rest...), x, c);
}

MARS_INLINE uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

MARS_INLINE float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

MARS_INLINE bool infinite(float re, float im) { return (std::fabs(re) == INF) | (std::fabs(im) == INF); }

// min(scale log1p(|z| / epsilon) - 1, 1)
struct Normalise {
  // Whatever |z| / epsilon squares to more than LARGE is clipped, as scale >= 1 / 20.
  static constexpr float LARGE = 0x1p124f;
  float inverse, slope;

  Normalise(double epsilon, double scale)
      : inverse(static_cast<float>(1 / epsilon)), slope(static_cast<float>(scale * 0.6931471805599453)) {}

  template <bool FMA>
  MARS_INLINE float operator()(float re, float im) const {
    const float a = re * inverse, b = im * inverse;
    float square = fma<FMA>(a, a, fma<FMA>(b, b, TINY));
    square = (square > LARGE) | infinite(a, b) ? LARGE : square;
    const float t = std::sqrt(square);
    // 1 + t = 2^e (1 + f), and f from t itself: 1 + t has lost the low bits of a small t.
    const uint32_t biased = (bits(1.0f + t) + (0x3f800000u - 0x3f3504f3u)) >> 23;
    const float e = static_cast<float>(static_cast<int32_t>(biased) - 127);
    const float power = from_bits((254u - biased) << 23);  // 2^-e
    const float f = fma<FMA>(t, power, power - 1.0f);
    // log2(1 + f) / f for 1 + f in [sqrt(1/2), sqrt(2)], minimax: relative error 3e-8
    const float quotient =
        polynomial<FMA>(f, 1.442695022e+00f, -7.213473916e-01f, 4.809089601e-01f, -3.607005775e-01f, 2.879534960e-01f,
                        -2.390148491e-01f, 2.154807597e-01f, -2.067874670e-01f, 1.258434206e-01f);
    const float x = fma<FMA>(slope, f * quotient, fma<FMA>(slope, e, -1.0f));
    return x > 1.0f ? 1.0f : x;
  }
};

// Gradient of Normalise: scale / (epsilon + |z|) along z / |z|; 0 where z is 0 and where the result is clipped.
struct NormaliseBackward {
  float epsilon, scale, limit;

  template <bool FMA>
  MARS_INLINE void operator()(float grad, float re, float im, float* grad_re, float* grad_im) const {
    // Divided by a power of two near it, so that no square overflows.
    const uint32_t most = std::max(bits(std::fabs(re)), bits(std::fabs(im)));
    const uint32_t exponent = std::min(most >> 23, 253u);
    const float power = from_bits((254u - exponent) << 23), inverse = from_bits(exponent << 23);
    const float a = re * power, b = im * power;
    const float scaled = std::sqrt(fma<FMA>(a, a, fma<FMA>(b, b, TINY)));
    const float magnitude = scaled * inverse;
    const float slope = grad * scale / (epsilon + magnitude) / scaled;
    const uint32_t zero = (most == 0) | (magnitude >= limit), kept = zero - 1u;  // all bits or none
    *grad_re = from_bits(bits(slope * a) & kept);
    *grad_im = from_bits(bits(slope * b) & kept);
  }
};

// epsilon expm1((clamp(x, -1, 1) + 1) / scale)
struct Magnitude {
  float epsilon, high, low;  // high + low = log2(e) / scale

  Magnitude(double epsilon, double scale)
      : epsilon(static_cast<float>(epsilon)),
        high(static_cast<float>(1.4426950408889634 / scale)),
        low(static_cast<float>(1.4426950408889634 / scale - high)) {}

  template <bool FMA>
  MARS_INLINE float operator()(float x) const {
    constexpr float ROUND = 0x1.8p23f;  // adding it rounds to a whole number, left in the low bits
    x = x < -1.0f ? -1.0f : x;
    x = (x > 1.0f ? 1.0f : x) + 1.0f;
    const float shifted = fma<FMA>(x, high, ROUND);
    const float r = fma<FMA>(x, low, fma<FMA>(x, high, ROUND - shifted));
    const float power = from_bits((bits(shifted) << 23) + 0x3f800000u);  // 2^k
    // (2^r - 1) / r for r in [-1/2, 1/2], minimax: relative error 2e-8
    const float quotient = polynomial<FMA>(r, 6.931471825e-01f, 2.402264923e-01f, 5.550367385e-02f, 9.618311189e-03f,
                                           1.338738250e-03f, 1.538211363e-04f);
    return epsilon * fma<FMA>(power, r * quotient, power - 1.0f);
  }
};

// Sizes of a spectrogram (batch, bins, frames) and where its rows lie in the CMX tensor (batch, r_f r_t, rows,
// columns).
struct Layout {
  int64_t batch, bins, frames, r_f, r_t;

  int64_t rows() const { return bins / r_f; }
  int64_t columns() const { return frames / r_t; }
  int64_t plane() const { return rows() * columns(); }  // from one channel to the next
  int64_t size() const { return batch * bins * frames; }
  // Of the first frame of a bin; the frames i_t, i_t + r_t, ... are contiguous, i_t planes further on.
  int64_t offset(int64_t sample, int64_t bin) const {
    return sample * bins * frames + bin % r_f * r_t * plane() + bin / r_f * columns();
  }
};

// n frames of a row from `first` on, to their places; `target` is the first frame's channel.
template <int64_t R_T, class T>
MARS_INLINE void split_by(const T* MARS_RESTRICT row, int64_t n, T* MARS_RESTRICT target, int64_t plane) {
  for (int64_t i = 0; i < n / R_T; ++i)
    for (int64_t i_t = 0; i_t < R_T; ++i_t) target[i_t * plane + i] = row[i * R_T + i_t];
}

template <class T>
MARS_INLINE void split(const T* row, int64_t n, int64_t first, T* target, int64_t plane, int64_t r_t) {
  if (r_t == 1) {
    std::copy_n(row, n, target + first);
  } else if (r_t == 2) {
    split_by<2>(row, n, target + first / 2, plane);
  } else if (r_t == 4) {
    split_by<4>(row, n, target + first / 4, plane);
  } else {
    int64_t column = first / r_t, i_t = first % r_t;
    for (int64_t i = 0; i < n; ++i) {
      target[i_t * plane + column] = row[i];
      if (++i_t == r_t) i_t = 0, ++column;
    }
  }
}

// The inverse of `split`.
template <int64_t R_T, class T>
MARS_INLINE void join_by(const T* MARS_RESTRICT source, int64_t plane, int64_t n, T* MARS_RESTRICT row) {
  for (int64_t i = 0; i < n / R_T; ++i)
    for (int64_t i_t = 0; i_t < R_T; ++i_t) row[i * R_T + i_t] = source[i_t * plane + i];
}

template <class T>
MARS_INLINE void join(const T* source, int64_t plane, int64_t r_t, int64_t n, int64_t first, T* row) {
  if (r_t == 1) {
    std::copy_n(source + first, n, row);
  } else if (r_t == 2) {
    join_by<2>(source + first / 2, plane, n, row);
  } else if (r_t == 4) {
    join_by<4>(source + first / 4, plane, n, row);
  } else {
    int64_t column = first / r_t, i_t = first % r_t;
    for (int64_t i = 0; i < n; ++i) {
      row[i] = source[i_t * plane + column];
      if (++i_t == r_t) i_t = 0, ++column;
    }
  }
}

MARS_INLINE void transpose(const float* MARS_RESTRICT a, int64_t pitch_a, int64_t rows, int64_t columns,
                           float* MARS_RESTRICT b, int64_t pitch_b) {
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) b[j * pitch_b + i] = a[i * pitch_a + j];
}

// Rows of tiles lie pages apart, where the processor does not prefetch by itself.
MARS_INLINE void prefetch(const float* first, int64_t n) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(first + i);
#endif
}

// Work that falls into `count` independent parts; `run<FMA>(i)` does one.
template <class Work>
void run_portable(const Work& work, int64_t i) {
  work.template run<PORTABLE_FMA>(i);
}
#if defined(MARS_X86)
template <class Work>
MARS_AVX2 void run_avx2(const Work& work, int64_t i) {
  work.template run<true>(i);
}
template <class Work>
MARS_AVX512 void run_avx512(const Work& work, int64_t i) {
  work.template run<true>(i);
}
#endif

template <class Work>
int run(const Work& work, int threads) {
  auto* part = run_portable<Work>;
#if defined(MARS_X86)
  if (vectors() == AVX2) part = run_avx2<Work>;
  if (vectors() == AVX512) part = run_avx512<Work>;
#endif
  constexpr int64_t WORTHWHILE = 1 << 15;  // elements, for waking the other threads
  const int64_t count = work.count();
#pragma omp parallel for num_threads(threads) schedule(static) if (work.layout.size() >= WORTHWHILE)
  for (int64_t i = 0; i < count; ++i) part(work, i);
  return 0;
}

template <class T>
struct Cmx {
  Layout layout;
  const T* x;
  T* y;

  int64_t count() const { return layout.batch * layout.bins; }

  template <bool FMA>
  MARS_INLINE void run(int64_t i) const {
    T* target = y + layout.offset(i / layout.bins, i % layout.bins);
    split(x + i * layout.frames, layout.frames, 0, target, layout.plane(), layout.r_t);
  }
};

template <class T>
struct InverseCmx {
  Layout layout;
  const T* x;
  T* y;

  int64_t count() const { return layout.batch * layout.bins; }

  template <bool FMA>
  MARS_INLINE void run(int64_t i) const {
    const T* source = x + layout.offset(i / layout.bins, i % layout.bins);
    join(source, layout.plane(), layout.r_t, layout.frames, 0, y + i * layout.frames);
  }
};

// Strides of a complex tensor (batch, bins, frames), in complex numbers. Frames are contiguous, or bins are.
struct Strides {
  int64_t sample, bin, frame;

  bool frames_contiguous() const { return frame == 1; }
};

// Parts of a complex tensor: its rows, or its tiles of BINS x FRAMES where the bins are contiguous.
struct Parts {
  Layout layout;
  Strides strides;

  int64_t across() const { return (layout.bins + BINS - 1) / BINS; }
  int64_t along() const { return (layout.frames + FRAMES - 1) / FRAMES; }
  int64_t count() const { return layout.batch * (strides.frames_contiguous() ? layout.bins : across() * along()); }
};

struct SpectrogramCmx : Parts {
  Normalise normalise;
  const float* z;
  float* x;

  template <bool FMA>
  MARS_INLINE void normalised(const float* MARS_RESTRICT from, int64_t n, float* MARS_RESTRICT to) const {
    const Normalise function = normalise;
    for (int64_t i = 0; i < n; ++i) to[i] = function.operator()<FMA>(from[2 * i], from[2 * i + 1]);
  }

  template <bool FMA>
  MARS_INLINE void run(int64_t i) const {
    strides.frames_contiguous() ? row<FMA>(i) : tile<FMA>(i);
  }

  template <bool FMA>
  MARS_INLINE void row(int64_t i) const {
    const int64_t sample = i / layout.bins, bin = i % layout.bins;
    const float* from = z + 2 * (sample * strides.sample + bin * strides.bin);
    float* target = x + layout.offset(sample, bin);
    alignas(64) float run[RUN];
    for (int64_t t = 0; t < layout.frames; t += RUN) {
      const int64_t n = std::min(RUN, layout.frames - t);
      normalised<FMA>(from + 2 * t, n, run);
      split(run, n, t, target, layout.plane(), layout.r_t);
    }
  }

  template <bool FMA>
  MARS_INLINE void tile(int64_t i) const {
    const int64_t sample = i / (across() * along()), f = i / along() % across() * BINS, t = i % along() * FRAMES;
    const int64_t bins = std::min(BINS, layout.bins - f), frames = std::min(FRAMES, layout.frames - t);
    alignas(64) float values[FRAMES * ALONG_BINS], turned[BINS * ALONG_FRAMES];
    for (int64_t j = 0; j < frames; ++j) {
      const float* from = z + 2 * (sample * strides.sample + f * strides.bin + (t + j) * strides.frame);
      if (j + AHEAD < frames) prefetch(from + 2 * AHEAD * strides.frame, 2 * bins);
      normalised<FMA>(from, bins, values + j * ALONG_BINS);
    }
    transpose(values, ALONG_BINS, frames, bins, turned, ALONG_FRAMES);
    for (int64_t j = 0; j < bins; ++j) {
      float* target = x + layout.offset(sample, f + j);
      split(turned + j * ALONG_FRAMES, frames, t, target, layout.plane(), layout.r_t);
    }
  }
};

struct SpectrogramCmxBackward : Parts {
  Strides grad_strides;
  NormaliseBackward backward;
  const float *grad, *z;
  float* grad_z;

  template <bool FMA>
  MARS_INLINE void gradient(const float* MARS_RESTRICT g, const float* MARS_RESTRICT from, int64_t n,
                            float* MARS_RESTRICT to) const {
    const NormaliseBackward function = backward;
    for (int64_t i = 0; i < n; ++i)
      function.operator()<FMA>(g[i], from[2 * i], from[2 * i + 1], to + 2 * i, to + 2 * i + 1);
  }

  static int64_t at(const Strides& s, int64_t sample, int64_t bin, int64_t frame) {
    return 2 * (sample * s.sample + bin * s.bin + frame * s.frame);
  }

  template <bool FMA>
  MARS_INLINE void run(int64_t i) const {
    strides.frames_contiguous() ? row<FMA>(i) : tile<FMA>(i);
  }

  template <bool FMA>
  MARS_INLINE void row(int64_t i) const {
    const int64_t sample = i / layout.bins, bin = i % layout.bins;
    const float* source = grad + layout.offset(sample, bin);
    alignas(64) float run[RUN];
    for (int64_t t = 0; t < layout.frames; t += RUN) {
      const int64_t n = std::min(RUN, layout.frames - t);
      join(source, layout.plane(), layout.r_t, n, t, run);
      gradient<FMA>(run, z + at(strides, sample, bin, t), n, grad_z + at(grad_strides, sample, bin, t));
    }
  }

  template <bool FMA>
  MARS_INLINE void tile(int64_t i) const {
    const int64_t sample = i / (across() * along()), f = i / along() % across() * BINS, t = i % along() * FRAMES;
    const int64_t bins = std::min(BINS, layout.bins - f), frames = std::min(FRAMES, layout.frames - t);
    alignas(64) float values[FRAMES * ALONG_BINS], turned[BINS * ALONG_FRAMES];
    for (int64_t j = 0; j < bins; ++j) {
      const float* source = grad + layout.offset(sample, f + j);
      join(source, layout.plane(), layout.r_t, frames, t, turned + j * ALONG_FRAMES);
    }
    transpose(turned, ALONG_FRAMES, bins, frames, values, ALONG_BINS);
    for (int64_t j = 0; j < frames; ++j) {
      const float* from = z + at(strides, sample, f, t + j);
      float* to = grad_z + at(grad_strides, sample, f, t + j);
      if (j + AHEAD < frames) prefetch(from + 2 * AHEAD * strides.frame, 2 * bins);
      if (j + AHEAD < frames) prefetch(to + 2 * AHEAD * grad_strides.frame, 2 * bins);
      gradient<FMA>(values + j * ALONG_BINS, from, bins, to);
    }
  }
};

struct InverseSpectrogramCmx {
  Layout layout;
  int64_t below, above;  // bins of zeros
  Magnitude magnitude;
  const float* x;
  float* m;

  int64_t count() const { return layout.batch * (below + layout.bins + above); }

  template <bool FMA>
  MARS_INLINE void magnitudes(const float* MARS_RESTRICT from, int64_t n, float* MARS_RESTRICT to) const {
    const Magnitude function = magnitude;
    for (int64_t i = 0; i < n; ++i) to[i] = function.operator()<FMA>(from[i]);
  }

  template <bool FMA>
  MARS_INLINE void run(int64_t i) const {
    const int64_t bins = below + layout.bins + above;
    const int64_t sample = i / bins, bin = i % bins - below;
    float* row = m + i * layout.frames;
    if (bin < 0 || bin >= layout.bins) {
      std::fill_n(row, layout.frames, 0.0f);
      return;
    }
    const float* source = x + layout.offset(sample, bin);
    alignas(64) float run[RUN];
    for (int64_t t = 0; t < layout.frames; t += RUN) {
      const int64_t n = std::min(RUN, layout.frames - t);
      join(source, layout.plane(), layout.r_t, n, t, run);
      magnitudes<FMA>(run, n, row + t);
    }
  }
};

struct Pair {
  uint64_t first, second;
};

template <template <class> class Copy>
int copy(const Layout& layout, int64_t element_size, const void* x, void* y, int threads) {
  switch (element_size) {
    case 1:
      return run(Copy<uint8_t>{layout, static_cast<const uint8_t*>(x), static_cast<uint8_t*>(y)}, threads);
    case 2:
      return run(Copy<uint16_t>{layout, static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y)}, threads);
    case 4:
      return run(Copy<uint32_t>{layout, static_cast<const uint32_t*>(x), static_cast<uint32_t*>(y)}, threads);
    case 8:
      return run(Copy<uint64_t>{layout, static_cast<const uint64_t*>(x), static_cast<uint64_t*>(y)}, threads);
    default:
      return run(Copy<Pair>{layout, static_cast<const Pair*>(x), static_cast<Pair*>(y)}, threads);
  }
}

}  // namespace
}  // namespace mars

int mars_cmx(int64_t batch, int64_t bins, int64_t frames, int64_t r_f, int64_t r_t, int64_t element_size, const void* x,
             void* y, int threads) {
  return mars::copy<mars::Cmx>({batch, bins, frames, r_f, r_t}, element_size, x, y, threads);
}

int mars_inverse_cmx(int64_t batch, int64_t bins, int64_t frames, int64_t r_f, int64_t r_t, int64_t element_size,
                     const void* x, void* y, int threads) {
  return mars::copy<mars::InverseCmx>({batch, bins, frames, r_f, r_t}, element_size, x, y, threads);
}

int mars_spectrogram_cmx(int64_t batch, int64_t bins, int64_t frames, int64_t r_f, int64_t r_t, double epsilon,
                         double scale, const float* z, int64_t z_sample, int64_t z_bin, int64_t z_frame, float* x,
                         int threads) {
  const mars::Parts parts{{batch, bins, frames, r_f, r_t}, {z_sample, z_bin, z_frame}};
  return mars::run(mars::SpectrogramCmx{parts, {epsilon, scale}, z, x}, threads);
}

int mars_spectrogram_cmx_backward(int64_t batch, int64_t bins, int64_t frames, int64_t r_f, int64_t r_t, double epsilon,
                                  double scale, const float* grad, const float* z, int64_t z_sample, int64_t z_bin,
                                  int64_t z_frame, float* grad_z, int64_t grad_z_sample, int64_t grad_z_bin,
                                  int64_t grad_z_frame, int threads) {
  const mars::Parts parts{{batch, bins, frames, r_f, r_t}, {z_sample, z_bin, z_frame}};
  const mars::NormaliseBackward backward{static_cast<float>(epsilon), static_cast<float>(scale),
                                         static_cast<float>(epsilon * std::expm1(2 / scale))};
  const mars::Strides grad_strides{grad_z_sample, grad_z_bin, grad_z_frame};
  return mars::run(mars::SpectrogramCmxBackward{parts, grad_strides, backward, grad, z, grad_z}, threads);
}

int mars_inverse_spectrogram_cmx(int64_t batch, int64_t bins, int64_t frames, int64_t r_f, int64_t r_t, int64_t below,
                                 int64_t above, double epsilon, double scale, const float* x, float* m, int threads) {
  return mars::run(mars::InverseSpectrogramCmx{{batch, bins, frames, r_f, r_t}, below, above, {epsilon, scale}, x, m},
                   threads);
}
