// The multi-scale residual quantiser of VAR (Tian et al. 2024, Algorithm 1) on the CPU.
//
// Bicubic up-sampling R z C^T and the 3x3 convolution after it are both linear. So the convolution's nine matrices are
// applied to the h w codes instead of the H W up-sampled cells, and its shifts go into the up-sampling:
//
//   h[y, x] = bias + sum_{dy, i} R[y + dy, i] sum_{dx, j} C[x + dx, j] W[dy, dx] z[i, j],
//
// where rows of R and C outside of the grid are zero, as the convolution pads. W holds the mix of the convolution with
// its input as well. All that is left is one matrix product per scale and sums of a few weighted vectors.
// Maps are (H, W, D) inside, so that vectors run over channels. Whatever the instruction set, an element's sums run in
// the same order wherever it stands: results depend neither on the threads nor on the rest of the batch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "simd.h"

namespace {

constexpr int ROWS = 8;      // codes in a tile of the matrix product
constexpr int COLUMNS = 48;  // and what it computes of each

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// sum_e weight_e * base[offset_e ...], one sum per output.
struct Term {
  int64_t offset;
  float weight;
};
struct Sums {
  std::vector<Term> terms;
  std::vector<int64_t> ends;  // of each output's terms
};

// Adaptive average pooling of one axis: output i is the mean of the cells that [i, i + 1) size / out touches.
Sums area(int64_t size, int64_t out, int64_t stride) {
  Sums sums;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t first = i * size / out, last = ((i + 1) * size + out - 1) / out;
    for (int64_t j = first; j < last; ++j) sums.terms.push_back({j * stride, 1.f / static_cast<float>(last - first)});
    sums.ends.push_back(static_cast<int64_t>(sums.terms.size()));
  }
  return sums;
}

// Up-sampling of one axis and the convolution's taps along it, matrix (out, 3, size): source j of tap t lies at
// j * stride + t * step.
Sums shifted(const float *matrix, int64_t size, int64_t out, int64_t stride, int64_t step) {
  Sums sums;
  for (int64_t i = 0; i < out; ++i) {
    for (int64_t t = 0; t < 3; ++t)
      for (int64_t j = 0; j < size; ++j, ++matrix)
        if (*matrix != 0) sums.terms.push_back({j * stride + t * step, *matrix});
    sums.ends.push_back(static_cast<int64_t>(sums.terms.size()));
  }
  return sums;
}

// out (length) = sum_e weight_e * base[offset_e + ...].
void add_portable(const Term *first, const Term *last, const float *base, int64_t length, float *out) {
  std::fill_n(out, length, 0.f);
  for (; first < last; ++first)
    for (int64_t l = 0; l < length; ++l) out[l] += first->weight * base[first->offset + l];
}

// y (ROWS, COLUMNS) = x (ROWS rows of dim) @ w (dim, COLUMNS).
void multiply_portable(const float *const *x, const float *w, int64_t dim, float *y, int64_t stride) {
  for (int r = 0; r < ROWS; ++r, y += stride) {
    float sum[COLUMNS] = {};
    for (int64_t k = 0; k < dim; ++k)
      for (int c = 0; c < COLUMNS; ++c) sum[c] += x[r][k] * w[k * COLUMNS + c];
    std::memcpy(y, sum, sizeof sum);
  }
}

#if defined(MARS_X86)

MARS_AVX512 void add_avx512(const Term *first, const Term *last, const float *base, int64_t length, float *out) {
  int64_t l = 0;
  for (; l + 64 <= length; l += 64) {
    __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
    for (const Term *term = first; term < last; ++term) {
      const float *x = base + term->offset + l;
      const __m512 weight = _mm512_set1_ps(term->weight);
      a = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x), a), b = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + 16), b);
      c = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + 32), c), d = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + 48), d);
    }
    _mm512_storeu_ps(out + l, a), _mm512_storeu_ps(out + l + 16, b);
    _mm512_storeu_ps(out + l + 32, c), _mm512_storeu_ps(out + l + 48, d);
  }
  for (; l < length; l += 32) {
    const int64_t left = length - l;
    const auto low = static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : 0xffff);
    const auto high = static_cast<__mmask16>(left < 16 ? 0 : left < 32 ? (1 << (left - 16)) - 1 : 0xffff);
    __m512 a = _mm512_setzero_ps(), b = a;
    for (const Term *term = first; term < last; ++term) {
      const float *x = base + term->offset + l;
      const __m512 weight = _mm512_set1_ps(term->weight);
      a = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(low, x), a);
      b = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(high, x + 16), b);
    }
    _mm512_mask_storeu_ps(out + l, low, a), _mm512_mask_storeu_ps(out + l + 16, high, b);
  }
}

// The accumulators have names, since GCC 12 keeps an array of them on the stack.
struct Row512 {
  __m512 a, b, c;
};

MARS_AVX512 MARS_INLINE void step(Row512 &y, float x, __m512 a, __m512 b, __m512 c) {
  const __m512 all = _mm512_set1_ps(x);
  y.a = _mm512_fmadd_ps(all, a, y.a), y.b = _mm512_fmadd_ps(all, b, y.b), y.c = _mm512_fmadd_ps(all, c, y.c);
}

MARS_AVX512 MARS_INLINE void store(const Row512 &y, float *out) {
  _mm512_storeu_ps(out, y.a), _mm512_storeu_ps(out + 16, y.b), _mm512_storeu_ps(out + 32, y.c);
}

MARS_AVX512 void multiply_avx512(const float *const *x, const float *w, int64_t dim, float *y, int64_t stride) {
  const __m512 zero = _mm512_setzero_ps();
  Row512 y0{zero, zero, zero}, y1 = y0, y2 = y0, y3 = y0, y4 = y0, y5 = y0, y6 = y0, y7 = y0;
  const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *x4 = x[4], *x5 = x[5], *x6 = x[6], *x7 = x[7];
  for (int64_t k = 0; k < dim; ++k, w += COLUMNS) {
    const __m512 a = _mm512_loadu_ps(w), b = _mm512_loadu_ps(w + 16), c = _mm512_loadu_ps(w + 32);
    step(y0, x0[k], a, b, c), step(y1, x1[k], a, b, c), step(y2, x2[k], a, b, c), step(y3, x3[k], a, b, c);
    step(y4, x4[k], a, b, c), step(y5, x5[k], a, b, c), step(y6, x6[k], a, b, c), step(y7, x7[k], a, b, c);
  }
  store(y0, y), store(y1, y + stride), store(y2, y + 2 * stride), store(y3, y + 3 * stride);
  store(y4, y + 4 * stride), store(y5, y + 5 * stride), store(y6, y + 6 * stride), store(y7, y + 7 * stride);
}

MARS_AVX2 void add_avx2(const Term *first, const Term *last, const float *base, int64_t length, float *out) {
  int64_t l = 0;
  for (; l + 32 <= length; l += 32) {
    __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
    for (const Term *term = first; term < last; ++term) {
      const float *x = base + term->offset + l;
      const __m256 weight = _mm256_set1_ps(term->weight);
      a = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x), a), b = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + 8), b);
      c = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + 16), c), d = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + 24), d);
    }
    _mm256_storeu_ps(out + l, a), _mm256_storeu_ps(out + l + 8, b);
    _mm256_storeu_ps(out + l + 16, c), _mm256_storeu_ps(out + l + 24, d);
  }
  for (; l < length; ++l) {
    float sum = 0;
    for (const Term *term = first; term < last; ++term) sum = std::fma(term->weight, base[term->offset + l], sum);
    out[l] = sum;
  }
}

struct Row256 {
  __m256 a, b, c;
};

MARS_AVX2 MARS_INLINE void step(Row256 &y, float x, __m256 a, __m256 b, __m256 c) {
  const __m256 all = _mm256_set1_ps(x);
  y.a = _mm256_fmadd_ps(all, a, y.a), y.b = _mm256_fmadd_ps(all, b, y.b), y.c = _mm256_fmadd_ps(all, c, y.c);
}

MARS_AVX2 MARS_INLINE void store(const Row256 &y, float *out) {
  _mm256_storeu_ps(out, y.a), _mm256_storeu_ps(out + 8, y.b), _mm256_storeu_ps(out + 16, y.c);
}

MARS_AVX2 void multiply_avx2(const float *const *x, const float *w, int64_t dim, float *y, int64_t stride) {
  const __m256 zero = _mm256_setzero_ps();
  for (int quarter = 0; quarter < 4; ++quarter) {
    const float *const *rows = x + quarter / 2 * 4, *from = w + quarter % 2 * 24;
    float *out = y + quarter / 2 * 4 * stride + quarter % 2 * 24;
    Row256 y0{zero, zero, zero}, y1 = y0, y2 = y0, y3 = y0;
    const float *x0 = rows[0], *x1 = rows[1], *x2 = rows[2], *x3 = rows[3];
    for (int64_t k = 0; k < dim; ++k, from += COLUMNS) {
      const __m256 a = _mm256_loadu_ps(from), b = _mm256_loadu_ps(from + 8), c = _mm256_loadu_ps(from + 16);
      step(y0, x0[k], a, b, c), step(y1, x1[k], a, b, c), step(y2, x2[k], a, b, c), step(y3, x3[k], a, b, c);
    }
    store(y0, out), store(y1, out + stride), store(y2, out + 2 * stride), store(y3, out + 3 * stride);
  }
}

#endif  // MARS_X86

struct Arithmetic {
  decltype(&add_portable) add = add_portable;
  decltype(&multiply_portable) multiply = multiply_portable;

  void operator()(const Sums &sums, int64_t output, const float *base, int64_t length, float *out) const {
    const Term *terms = sums.terms.data();
    add(terms + (output ? sums.ends[output - 1] : 0), terms + sums.ends[output], base, length, out);
  }
};

Arithmetic arithmetic() {
#if defined(MARS_X86)
  if (mars::vectors() == mars::AVX512) return {add_avx512, multiply_avx512};
  if (mars::vectors() == mars::AVX2) return {add_avx2, multiply_avx2};
#endif
  return {};
}

struct Map {
  int64_t dim, height, width;
  int64_t cells() const { return height * width; }
  int64_t size() const { return height * width * dim; }
  int64_t columns() const { return round_up(9 * dim, COLUMNS); }
};

// A scale's grid and how maps get there and back.
struct Scale {
  int64_t height, width;
  bool full;                // the map's own grid
  Sums down_y, down_x;      // of (y, x, d); of (x, d)
  Sums up_y, up_x;          // of (i, dy, x, d); of (j, dx, dy, d)
  const float *bias;        // (dim)
  std::vector<float> taps;  // (columns / COLUMNS, dim, COLUMNS), columns ordered (dx, dy, d)
  int64_t cells() const { return height * width; }
};

// taps (dy, dx, dim, dim): [.., from, to].
std::vector<float> pack(const float *taps, const Map &map) {
  const int64_t dim = map.dim;
  std::vector<float> packed(map.columns() * dim);
  for (int64_t column = 0; column < 9 * dim; ++column) {
    const int64_t dx = column / dim / 3, dy = column / dim % 3, to = column % dim;
    float *out = packed.data() + column / COLUMNS * dim * COLUMNS + column % COLUMNS;
    for (int64_t from = 0; from < dim; ++from) out[from * COLUMNS] = taps[((dy * 3 + dx) * dim + from) * dim + to];
  }
  return packed;
}

// Search rows of one sample: (cells, dim) of its residual.
void downsample(const Arithmetic &sum, const Map &map, const Scale &scale, const float *residual, float *work,
                float *rows) {
  for (int64_t i = 0; i < scale.height; ++i) {
    sum(scale.down_y, i, residual, map.width * map.dim, work);
    for (int64_t j = 0; j < scale.width; ++j, rows += map.dim) sum(scale.down_x, j, work, map.dim, rows);
  }
}

int64_t workspace(const Map &map) {
  return round_up(map.cells(), ROWS) * map.columns() + 3 * map.size() + 3 * map.dim + map.width * map.dim;
}

// What the codes of one sample and scale add: out of its residual, into its total, a copy of which is out (dim, cells).
void update(const Arithmetic &sum, const Map &map, const Scale &scale, const float *codebook, const int64_t *ids,
            bool kept, float *work, float *residual, float *total, float *out) {
  const int64_t dim = map.dim, columns = map.columns(), line = map.width * dim;
  float *product = work, *mixed = product + round_up(map.cells(), ROWS) * columns, *piece = mixed + 3 * map.size();
  float *row = piece + 3 * dim;
  for (int64_t block = 0; block < columns / COLUMNS; ++block)
    for (int64_t n = 0; n < scale.cells(); n += ROWS) {
      const float *codes[ROWS];
      for (int64_t r = 0; r < ROWS; ++r) codes[r] = codebook + ids[std::min(n + r, scale.cells() - 1)] * dim;
      const float *taps = scale.taps.data() + block * dim * COLUMNS;
      sum.multiply(codes, taps, dim, product + n * columns + block * COLUMNS, columns);
    }
  for (int64_t i = 0; i < scale.height; ++i)
    for (int64_t x = 0; x < map.width; ++x) {
      sum(scale.up_x, x, product + i * scale.width * columns, 3 * dim, piece);
      for (int64_t dy = 0; dy < 3; ++dy) std::copy_n(piece + dy * dim, dim, mixed + (i * 3 + dy) * line + x * dim);
    }
  for (int64_t y = 0; y < map.height; ++y, residual += line, total += line, out += map.width) {
    sum(scale.up_y, y, mixed, line, row);
    for (int64_t x = 0; x < line; x += dim)
      for (int64_t d = 0; d < dim; ++d) row[x + d] += scale.bias[d];
    for (int64_t l = 0; l < line; ++l) residual[l] -= row[l];
    if (kept)
      for (int64_t l = 0; l < line; ++l) total[l] += row[l];
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t x = 0; x < map.width; ++x) out[d * map.cells() + x] = total[x * dim + d];
  }
}

}  // namespace

int mars_multiscale_quantize(const float *f, int64_t batch, int64_t dim, int64_t height, int64_t width,
                             const float *codebook, const void *packed, const float *taps, const float *bias,
                             int64_t scales, const int64_t *grids, const int64_t *phi_index, const float *bicubic,
                             const int64_t *keep, int64_t *ids, float *totals, int threads) try {
  const Map map{dim, height, width};
  const Arithmetic sum = arithmetic();
  std::vector<Scale> all(scales);
  int64_t tokens = 0;
  for (int64_t k = 0; k < scales; ++k) {
    Scale &scale = all[k];
    scale.height = grids[2 * k], scale.width = grids[2 * k + 1];
    scale.full = scale.height == height && scale.width == width;
    scale.down_y = area(height, scale.height, width * dim);
    scale.down_x = area(width, scale.width, dim);
    scale.up_y = shifted(bicubic, scale.height, height, 3 * width * dim, width * dim);
    bicubic += 3 * height * scale.height;
    scale.up_x = shifted(bicubic, scale.width, width, map.columns(), 3 * dim);
    bicubic += 3 * width * scale.width;
    scale.bias = bias + phi_index[k] * dim;
    scale.taps = pack(taps + phi_index[k] * 9 * dim * dim, map);
    tokens += scale.cells();
  }
  const int64_t size = map.size(), scratch = workspace(map);
  const int workers = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(batch, 1)));
  const int64_t share = (batch + workers - 1) / workers;
  const std::unique_ptr<float[]> residual(new float[batch * size]), rows(new float[batch * size]);
  const std::unique_ptr<float[]> work(new float[workers * scratch]);
  std::vector<float> total(batch * size);
  std::vector<int64_t> found(batch * map.cells());
  const auto each = [&](auto run) {  // run(sample, the thread's workspace), samples shared out among the threads
#pragma omp parallel for num_threads(workers) schedule(static, 1)
    for (int t = 0; t < workers; ++t)
      for (int64_t b = t * share; b < std::min(batch, (t + 1) * share); ++b) run(b, work.get() + t * scratch);
  };

  each([&](int64_t b, float *) {
    float *out = residual.get() + b * size;
    for (int64_t cell = 0; cell < map.cells(); ++cell)
      for (int64_t d = 0; d < dim; ++d) *out++ = f[b * size + d * map.cells() + cell];
  });
  for (int64_t k = 0, start = 0; k < scales; start += all[k++].cells()) {
    const Scale &scale = all[k];
    const int64_t n = scale.cells();
    if (!scale.full)
      each([&](int64_t b, float *space) {
        downsample(sum, map, scale, residual.get() + b * size, space, rows.get() + b * n * dim);
      });
    const float *searching = scale.full ? residual.get() : rows.get();
    if (mars_nearest_code(packed, searching, batch * n, found.data(), threads)) return -1;
    each([&](int64_t b, float *space) {
      const int64_t *codes_of = found.data() + b * n;
      std::copy_n(codes_of, n, ids + b * tokens + start);
      update(sum, map, scale, codebook, codes_of, !keep || keep[b] > k, space, residual.get() + b * size,
             total.data() + b * size, totals + (k * batch + b) * size);
    });
  }
  return 0;
} catch (const std::bad_alloc &) {
  return -1;
}
