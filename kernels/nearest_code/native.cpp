// Nearest code on the CPU, without the (N, V) scores: the index is that of the float32 definition in op.py, bit for
// bit, at every level.
//
// The definition. score_v = b_v, then score_v = fma(x_d, c_vd, score_v) for d ascending, b_v = -|c_v|^2 / 2 (0 on
// normalised rows); the answer is the lowest v of the largest score. `exact_*` compute that for all codes. The other
// levels filter first: they compute all scores in a cheaper arithmetic, bound its error (Cauchy-Schwarz on the rounding
// errors that were really made), and compute the float32 scores of the codes that the bound leaves. The bounds hold
// per block of codes of similar norm, and of what is left when the mean code is subtracted from both sides, so that
// neither an outlier nor a shift spoils them; a row with too many codes left is searched exactly.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "simd.h"

namespace {

using mars::Level;

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int LANES = 16;             // codes in a group of the exact kernels
constexpr int GROUP = 32;             // codes in a group of the filters: what one candidate costs
constexpr int BLOCK = LANES * GROUP;  // codes that share a bound and a scale; a block also stays in L1
constexpr int64_t FILTERED = 1024;    // codes from which on a filter pays
constexpr int64_t LONGEST = 1 << 16;  // dim up to which the integers of a filter cannot overflow

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory at multiples of 64 bytes, filled with zeros.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = (std::max<size_t>(count * sizeof(T), 1) + 63) / 64 * 64;
    data_ = static_cast<T*>(::operator new(bytes, std::align_val_t(64)));
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
};

struct Codebook {
  int64_t codes = 0, dim = 0;
  bool normalized = false;
  Level filter = mars::PORTABLE;  // BF16, VNNI or AMX; anything else: none
  // All levels, codes in their own order, in groups of LANES: (groups, dim, LANES).
  int64_t groups = 0;
  Buffer<float> rows, bias, reach;  // reach: per group, the largest |c|
  // Filters, codes sorted by |c - mean|, in blocks: (groups of GROUP, dim, GROUP).
  int64_t blocks = 0, steps = 0;  // steps: of the filter's dot product, in units of 4 bytes
  Buffer<float> mean, sorted, sorted_bias, scale;
  Buffer<float> low, high;              // per group, the smallest and largest -|c - mean|^2 / 2
  Buffer<float> norm, error, original;  // per block, the largest |c - mean|, |what the filter misses of it| and |c|
  Buffer<int32_t> index, offset;        // offset: what unsigned rows add to an integer score, negated
  Buffer<uint32_t> coded;               // (tiles of LANES, steps, LANES), see `place`
};

float round_up(double x) { return static_cast<float>(x * 1.000001); }

uint16_t to_bfloat16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7f800000) == 0) return 0;  // what the processor reads as zero
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t x) {
  const uint32_t u = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// A filter multiplies a block tile by tile, LANES codes at a time, and keeps the largest product per lane: a group of
// the filter is the codes of one lane. They are neighbours in `sorted`, so that their norms are close and enter once a
// group, as an interval, instead of once a code.
int64_t place(int64_t s) { return s / BLOCK * BLOCK + s % GROUP * LANES + s % BLOCK / GROUP; }

void pack_rows(Codebook& b, const float* codebook, std::vector<char>& usable) {
  b.groups = ceil_div(b.codes, LANES);
  b.rows = Buffer<float>(b.groups * b.dim * LANES);
  b.bias = Buffer<float>(b.groups * LANES);
  b.reach = Buffer<float>(b.groups);
  std::fill_n(static_cast<float*>(b.bias), b.groups * LANES, -INF);
  for (int64_t v = 0; v < b.codes; ++v) {
    const float* c = codebook + v * b.dim;
    double square = 0;
    for (int64_t d = 0; d < b.dim; ++d) square += static_cast<double>(c[d]) * c[d];
    const float bias = static_cast<float>(-0.5 * square);
    usable[v] = std::isfinite(bias);
    if (!usable[v]) continue;  // its row stays zero and its bias -inf: never the largest
    b.bias[v] = b.normalized ? 0.f : bias;
    b.reach[v / LANES] = std::max(b.reach[v / LANES], round_up(std::sqrt(square)));
    float* row = b.rows + v / LANES * b.dim * LANES + v % LANES;
    for (int64_t d = 0; d < b.dim; ++d) row[d * LANES] = c[d];
  }
}

void pack_filter(Codebook& b, const float* codebook, const std::vector<char>& usable) {
  const int64_t dim = b.dim;
  b.mean = Buffer<float>(dim);
  std::vector<int32_t> order;
  std::vector<double> total(dim);
  for (int64_t v = 0; v < b.codes; ++v) {
    if (!usable[v]) continue;
    order.push_back(static_cast<int32_t>(v));
    for (int64_t d = 0; d < dim; ++d) total[d] += codebook[v * dim + d];
  }
  const auto count = static_cast<int64_t>(order.size());
  for (int64_t d = 0; d < dim; ++d) b.mean[d] = static_cast<float>(total[d] / std::max<int64_t>(count, 1));

  std::vector<float> norms(b.codes);
  for (const int32_t v : order) {
    double square = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double c = static_cast<double>(codebook[v * dim + d]) - b.mean[d];
      square += c * c;
    }
    norms[v] = round_up(std::sqrt(square));
  }
  std::sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return norms[i] < norms[j]; });

  b.blocks = ceil_div(count, BLOCK);
  b.steps = b.filter == mars::VNNI  ? ceil_div(dim, 4)
            : b.filter == mars::AMX ? ceil_div(dim, 32) * 16
                                    : ceil_div(dim, 2);
  const int64_t padded = b.blocks * BLOCK;
  b.sorted = Buffer<float>(padded * dim);
  b.sorted_bias = Buffer<float>(padded);
  b.low = Buffer<float>(padded / GROUP);
  b.high = Buffer<float>(padded / GROUP);
  b.index = Buffer<int32_t>(padded);
  b.offset = Buffer<int32_t>(padded);
  b.coded = Buffer<uint32_t>(padded * b.steps);
  for (Buffer<float>* each : {&b.norm, &b.error, &b.original, &b.scale})
    *each = Buffer<float>(ceil_div(b.blocks, LANES) * LANES);
  std::fill_n(static_cast<float*>(b.sorted_bias), padded, -INF);
  std::fill_n(static_cast<float*>(b.low), padded / GROUP, -INF);
  std::fill_n(static_cast<float*>(b.high), padded / GROUP, -INF);
  auto* halves = reinterpret_cast<uint16_t*>(static_cast<uint32_t*>(b.coded));
  auto* bytes = reinterpret_cast<int8_t*>(static_cast<uint32_t*>(b.coded));
  // The last group is filled up with its last code: a filter must not see a product that no code has.
  const int64_t filled = ceil_div(count, GROUP) * GROUP;
  for (int64_t s = 0; s < filled; ++s) {
    const int64_t v = order[std::min(s, count - 1)], block = s / BLOCK;
    const int64_t at = place(s), unit = at / LANES * LANES * b.steps + at % LANES;
    const float* c = codebook + v * dim;
    if (s % BLOCK == 0) {
      float largest = 0;
      for (int64_t t = s; b.filter == mars::VNNI && t < std::min(s + BLOCK, count); ++t)
        for (int64_t d = 0; d < dim; ++d)
          largest = std::max(largest, std::abs(codebook[order[t] * dim + d] - b.mean[d]));
      b.scale[block] = std::max(largest / 127, 1e-30f);
    }
    double original = 0, square = 0, error = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double centred = static_cast<double>(c[d]) - b.mean[d];
      double held;
      if (b.filter == mars::VNNI) {
        const float q = std::min(std::max(std::nearbyint(static_cast<float>(centred) / b.scale[block]), -127.f), 127.f);
        bytes[(unit + d / 4 * LANES) * 4 + d % 4] = static_cast<int8_t>(q);
        b.offset[at] -= 128 * static_cast<int32_t>(q);
        held = static_cast<double>(q) * b.scale[block];
      } else {
        const uint16_t q = to_bfloat16(static_cast<float>(centred));
        halves[(unit + d / 2 * LANES) * 2 + d % 2] = q;
        held = from_bfloat16(q);
      }
      original += static_cast<double>(c[d]) * c[d];
      square += centred * centred;
      error += (centred - held) * (centred - held);
    }
    b.norm[block] = std::max(b.norm[block], round_up(std::sqrt(square)));
    b.error[block] = std::max(b.error[block], round_up(std::sqrt(error)));
    b.original[block] = std::max(b.original[block], round_up(std::sqrt(original)));
    if (s >= count) continue;
    const float bias = b.normalized ? 0.f : static_cast<float>(-0.5 * square);
    float &low = b.low[s / GROUP], &high = b.high[s / GROUP];
    low = s % GROUP ? std::min(low, bias) : bias, high = std::max(high, bias);
    b.index[s] = static_cast<int32_t>(v);
    b.sorted_bias[s] = b.bias[v];
    float* row = b.sorted + s / GROUP * dim * GROUP + s % GROUP;
    for (int64_t d = 0; d < dim; ++d) row[d * GROUP] = c[d];
  }
}

// What float32 rounding can make of a score of dim products: of the definition, or of a filter in float32.
float rounding(int64_t dim) { return static_cast<float>(dim + 4) * 0x1p-23f; }

MARS_INLINE bool finite(const float* x, int64_t dim) {
  int32_t bad = 0;
  for (int64_t d = 0; d < dim; ++d) {
    uint32_t u;
    std::memcpy(&u, x + d, 4);
    bad |= (u & 0x7f800000) == 0x7f800000;
  }
  return !bad;
}

// ---- The definition over one group, and the search in plain C++.

// Best code of a group of LANES, by the definition; `best` and `id` change only for a larger score.
MARS_INLINE void exact_group(const Codebook& b, const float* x, int64_t group, float& best, int64_t& id) {
  float score[LANES];
  const float* row = b.rows + group * b.dim * LANES;
  std::memcpy(score, b.bias + group * LANES, sizeof score);
  for (int64_t d = 0; d < b.dim; ++d, row += LANES)
    for (int r = 0; r < LANES; ++r) score[r] = std::fma(x[d], row[r], score[r]);
  float largest = score[0];
  for (int r = 1; r < LANES; ++r) largest = score[r] > largest ? score[r] : largest;
  if (!(largest > best)) return;
  best = largest;
  id = group * LANES + (std::find(score, score + LANES, largest) - score);
}

// Filter and definition in one: products and sums that any compiler vectorises, then `exact_group` where it matters.
void search_portable(const Codebook& b, const float* x, int64_t rows, int64_t* ids) {
  std::vector<float> upper(b.groups);
  const float per_dim = rounding(b.dim);
  for (int64_t n = 0; n < rows; ++n, x += b.dim) {
    float square = 0;
    for (int64_t d = 0; d < b.dim; ++d) square += x[d] * x[d];
    const float norm = std::sqrt(square) * 1.0001f;
    float lower = -INF;
    for (int64_t g = 0; g < b.groups; ++g) {
      const float *row = b.rows + g * b.dim * LANES, *bias = b.bias + g * LANES;
      float score[LANES];
      for (int r = 0; r < LANES; ++r) score[r] = bias[r];
      for (int64_t d = 0; d < b.dim; ++d)
        for (int r = 0; r < LANES; ++r) score[r] += x[d] * row[d * LANES + r];
      float largest = score[0];
      for (int r = 1; r < LANES; ++r) largest = score[r] > largest ? score[r] : largest;
      const float reach = b.reach[g];
      const float slack = 2.002f * per_dim * (norm * reach + 0.5f * reach * reach) + 1e-36f;
      upper[g] = largest + slack;
      if (largest - slack > lower) lower = largest - slack;
    }
    float best = -INF;
    ids[n] = 0;
    if (!finite(x, b.dim)) continue;
    for (int64_t g = 0; g < b.groups; ++g)
      if (!(upper[g] < lower)) exact_group(b, x, g, best, ids[n]);
  }
}

#if defined(MARS_X86)

constexpr int64_t RUN = 8;      // groups that the exact kernels read again and again from L1
constexpr int CANDIDATES = 48;  // groups left for a row; with more, the exact search is faster
constexpr int64_t CHUNK = 128;  // rows whose group maxima are kept at a time

// Rows of x transposed, (dim, width), zeros after the last: what the lanes of a register hold are rows.
MARS_INLINE void transpose(const float* x, int64_t rows, int64_t dim, int width, float* panel) {
  if (rows < width) std::fill_n(panel, dim * width, 0.f);
  for (int64_t n = 0; n < std::min<int64_t>(rows, width); ++n)
    for (int64_t d = 0; d < dim; ++d) panel[d * width + n] = x[n * dim + d];
}

// The best code of a group, by the definition.
MARS_AVX2 int64_t resolve_avx2(const Codebook& b, const float* x, int64_t group) {
  float best = -INF;
  int64_t id = 0;
  if (finite(x, b.dim)) exact_group(b, x, group, best, id);
  return id;
}

MARS_AVX512 int64_t resolve_avx512(const Codebook& b, const float* x, int64_t group) {
  const float* row = b.rows + group * b.dim * LANES;
  __m512 score = _mm512_load_ps(b.bias + group * LANES);
  for (int64_t d = 0; d < b.dim; ++d, row += LANES)
    score = _mm512_fmadd_ps(_mm512_set1_ps(x[d]), _mm512_load_ps(row), score);
  const float largest = _mm512_reduce_max_ps(score);
  if (largest == -INF || !finite(x, b.dim)) return 0;
  return group * LANES + __builtin_ctz(_mm512_cmp_ps_mask(score, _mm512_set1_ps(largest), _CMP_EQ_OQ) | 0x10000);
}

// Both exact kernels: `width` rows against RUN groups at a time, which stay in L1 while the rows of a chunk go by; per
// row the largest score and the first group that has it, in which `resolve` finds the code.
template <class Kernel, class Resolve>
void search_exact(const Codebook& b, const float* x, int64_t rows, int64_t* ids, int width, Kernel kernel,
                  Resolve resolve) {
  constexpr int64_t chunk = 768;  // a multiple of both widths
  Buffer<float> panels(std::min(chunk, ceil_div(rows, width) * width) * b.dim), best(chunk);
  Buffer<int32_t> groups(chunk);
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = std::min(chunk, rows - first);
    for (int64_t n = 0; n < count; n += width)
      transpose(x + (first + n) * b.dim, count - n, b.dim, width, panels + n * b.dim);
    std::fill_n(static_cast<float*>(best), chunk, -INF);
    std::fill_n(static_cast<int32_t*>(groups), chunk, 0);
    for (int64_t g = 0; g < b.groups; g += RUN)
      for (int64_t n = 0; n < count; n += width)
        kernel(b, panels + n * b.dim, g, std::min(g + RUN, b.groups), best + n, groups + n);
    for (int64_t n = 0; n < count; ++n) ids[first + n] = resolve(b, x + (first + n) * b.dim, groups[n]);
  }
}

// 24 accumulators have names, since GCC 12 keeps an array of them on the stack.
#define MARS_EACH8(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define MARS_EACH4(M) M(0) M(1) M(2) M(3)
#define MARS_MAX8(max, p) max(max(max(p##0, p##1), max(p##2, p##3)), max(max(p##4, p##5), max(p##6, p##7)))
#define MARS_MAX4(max, p) max(max(p##0, p##1), max(p##2, p##3))

// 48 rows x 8 codes.
MARS_AVX512 void exact_avx512(const Codebook& b, const float* panel, int64_t g0, int64_t g1, float* best,
                              int32_t* groups) {
  for (int64_t h = 2 * g0; h < 2 * g1; ++h) {
    const float *c = b.rows + h / 2 * b.dim * LANES + h % 2 * 8, *bias = b.bias + h * 8, *x = panel;
#define START(r) __m512 s##r = _mm512_set1_ps(bias[r]), t##r = s##r, u##r = s##r;
    MARS_EACH8(START)
#undef START
    for (int64_t d = 0; d < b.dim; ++d, x += 48, c += LANES) {
      const __m512 x0 = _mm512_load_ps(x), x1 = _mm512_load_ps(x + 16), x2 = _mm512_load_ps(x + 32);
#define STEP(r)                               \
  {                                           \
    const __m512 code = _mm512_set1_ps(c[r]); \
    s##r = _mm512_fmadd_ps(x0, code, s##r);   \
    t##r = _mm512_fmadd_ps(x1, code, t##r);   \
    u##r = _mm512_fmadd_ps(x2, code, u##r);   \
  }
      MARS_EACH8(STEP)
#undef STEP
    }
#define KEEP(p, at)                                                                              \
  {                                                                                              \
    const __m512 largest = MARS_MAX8(_mm512_max_ps, p);                                          \
    const __mmask16 larger = _mm512_cmp_ps_mask(largest, _mm512_load_ps(best + at), _CMP_GT_OQ); \
    _mm512_mask_store_ps(best + at, larger, largest);                                            \
    _mm512_mask_store_epi32(groups + at, larger, _mm512_set1_epi32(static_cast<int>(h / 2)));    \
  }
    KEEP(s, 0) KEEP(t, 16) KEEP(u, 32)
#undef KEEP
  }
}

// 24 rows x 4 codes.
MARS_AVX2 void exact_avx2(const Codebook& b, const float* panel, int64_t g0, int64_t g1, float* best, int32_t* groups) {
  for (int64_t h = 4 * g0; h < 4 * g1; ++h) {
    const float *c = b.rows + h / 4 * b.dim * LANES + h % 4 * 4, *bias = b.bias + h * 4, *x = panel;
#define START(r) __m256 s##r = _mm256_set1_ps(bias[r]), t##r = s##r, u##r = s##r;
    MARS_EACH4(START)
#undef START
    for (int64_t d = 0; d < b.dim; ++d, x += 24, c += LANES) {
      const __m256 x0 = _mm256_load_ps(x), x1 = _mm256_load_ps(x + 8), x2 = _mm256_load_ps(x + 16);
#define STEP(r)                               \
  {                                           \
    const __m256 code = _mm256_set1_ps(c[r]); \
    s##r = _mm256_fmadd_ps(x0, code, s##r);   \
    t##r = _mm256_fmadd_ps(x1, code, t##r);   \
    u##r = _mm256_fmadd_ps(x2, code, u##r);   \
  }
      MARS_EACH4(STEP)
#undef STEP
    }
#define KEEP(p, at)                                                                                               \
  {                                                                                                               \
    const __m256 largest = MARS_MAX4(_mm256_max_ps, p);                                                           \
    const __m256 larger = _mm256_cmp_ps(largest, _mm256_load_ps(best + at), _CMP_GT_OQ);                          \
    _mm256_maskstore_ps(best + at, _mm256_castps_si256(larger), largest);                                         \
    _mm256_maskstore_epi32(groups + at, _mm256_castps_si256(larger), _mm256_set1_epi32(static_cast<int>(h / 4))); \
  }
    KEEP(s, 0) KEEP(t, 8) KEEP(u, 16)
#undef KEEP
  }
}

// ---- Filters. What they keep of a row: its operand, and the norms of what that holds and misses and of the row
// itself.

struct Rows {
  Buffer<uint32_t> operand;  // (CHUNK, steps)
  Buffer<float> scale;
  float norm[CHUNK], error[CHUNK], original[CHUNK];
};

// What all three filters share: the row less the mean, 16 entries at a time.
MARS_AVX512 MARS_INLINE __mmask16 entries(const Codebook& b, const float* x, int64_t d, __m512& raw, __m512& centred) {
  const __mmask16 mask = static_cast<__mmask16>(b.dim - d >= 16 ? 0xffff : (1 << (b.dim - d)) - 1);
  raw = _mm512_maskz_loadu_ps(mask, x + d);
  centred = b.normalized ? raw : _mm512_sub_ps(raw, _mm512_maskz_loadu_ps(mask, b.mean + d));
  return mask;
}

MARS_AVX512 MARS_INLINE void measure(Rows& r, int64_t n, __m512 held, __m512 missed, __m512 raw) {
  r.norm[n] = std::sqrt(_mm512_reduce_add_ps(held));
  r.error[n] = std::sqrt(_mm512_reduce_add_ps(missed)) + 2e-7f * r.norm[n];  // and the rounding of x - mean
  r.original[n] = std::sqrt(_mm512_reduce_add_ps(raw));
}

MARS_BF16 void halve_rows(const Codebook& b, const float* x, int64_t count, Rows& r) {
  for (int64_t n = 0; n < count; ++n, x += b.dim) {
    auto* operand = reinterpret_cast<uint16_t*>(r.operand + n * b.steps);
    __m512 held = _mm512_setzero_ps(), missed = held, original = held, raw, centred;
    for (int64_t d = 0; d < b.dim; d += 16) {
      const __mmask16 mask = entries(b, x, d, raw, centred);
      const __m256i half = (__m256i)_mm512_cvtneps_pbh(centred);
      const __m512 kept = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      const __m512 miss = _mm512_sub_ps(centred, kept);
      _mm256_mask_storeu_epi16(operand + d, mask, half);
      held = _mm512_fmadd_ps(kept, kept, held), missed = _mm512_fmadd_ps(miss, miss, missed);
      original = _mm512_fmadd_ps(raw, raw, original);
    }
    measure(r, n, held, missed, original);
  }
}

MARS_VNNI void quarter_rows(const Codebook& b, const float* x, int64_t count, Rows& r) {
  for (int64_t n = 0; n < count; ++n, x += b.dim) {
    auto* operand = reinterpret_cast<uint8_t*>(r.operand + n * b.steps);
    __m512 held = _mm512_setzero_ps(), missed = held, original = held, largest = held, raw, centred;
    for (int64_t d = 0; d < b.dim; d += 16) {
      entries(b, x, d, raw, centred);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(centred));
    }
    const float scale = std::max(_mm512_reduce_max_ps(largest) / 127, 1e-30f);
    const __m512 inverse = _mm512_set1_ps(1 / scale), unit = _mm512_set1_ps(scale);
    r.scale[n] = scale;
    for (int64_t d = 0; d < b.dim; d += 16) {
      const __mmask16 mask = entries(b, x, d, raw, centred);
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(centred, inverse));
      const __m512 kept = _mm512_mul_ps(_mm512_cvtepi32_ps(q), unit), miss = _mm512_sub_ps(centred, kept);
      _mm512_mask_cvtusepi32_storeu_epi8(operand + d, mask, _mm512_add_epi32(q, _mm512_set1_epi32(128)));
      held = _mm512_fmadd_ps(kept, kept, held), missed = _mm512_fmadd_ps(miss, miss, missed);
      original = _mm512_fmadd_ps(raw, raw, original);
    }
    measure(r, n, held, missed, original);
  }
}

// The filters proper: largest products per lane of one block, for all rows: maxima (count, groups).

// 8 rows x 2 tiles.
MARS_BF16 void score_bf16(const Codebook& b, const Rows& r, int64_t count, int64_t block, float* maxima) {
  for (int64_t n = 0; n < count; n += 8) {
    const uint32_t* x = r.operand + n * b.steps;
#define START(i) __m512 m##i = _mm512_set1_ps(-INF);
    MARS_EACH8(START)
#undef START
    for (int64_t tile = block * GROUP; tile < (block + 1) * GROUP; tile += 2) {
      const uint32_t *c = b.coded + tile * LANES * b.steps, *e = c + LANES * b.steps;
#define START(i) __m512 s##i = _mm512_setzero_ps(), t##i = s##i;
      MARS_EACH8(START)
#undef START
      for (int64_t k = 0; k < b.steps; ++k, c += LANES, e += LANES) {
        const auto c0 = (__m512bh)_mm512_load_si512(c), c1 = (__m512bh)_mm512_load_si512(e);
#define STEP(i)                                                                         \
  {                                                                                     \
    const auto row = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[i * b.steps + k])); \
    s##i = _mm512_dpbf16_ps(s##i, row, c0), t##i = _mm512_dpbf16_ps(t##i, row, c1);     \
  }
        MARS_EACH8(STEP)
#undef STEP
      }
#define KEEP(i) m##i = _mm512_max_ps(m##i, _mm512_max_ps(s##i, t##i));
      MARS_EACH8(KEEP)
#undef KEEP
    }
#define STORE(i) _mm512_store_ps(maxima + ((n + i) * b.blocks + block) * LANES, m##i);
    MARS_EACH8(STORE)
#undef STORE
  }
}

// 8 rows x 2 tiles. Inline assembly, because GCC 12 moves the accumulators of the intrinsic through memory.
MARS_VNNI void score_vnni(const Codebook& b, const Rows& r, int64_t count, int64_t block, float* maxima) {
  for (int64_t n = 0; n < count; n += 8) {
    const uint32_t* x = r.operand + n * b.steps;
#define START(i) __m512i m##i = _mm512_set1_epi32(std::numeric_limits<int32_t>::min());
    MARS_EACH8(START)
#undef START
    for (int64_t tile = block * GROUP; tile < (block + 1) * GROUP; tile += 2) {
      const uint32_t *c = b.coded + tile * LANES * b.steps, *e = c + LANES * b.steps;
      const __m512i offset0 = _mm512_load_si512(b.offset + tile * LANES);
      const __m512i offset1 = _mm512_load_si512(b.offset + tile * LANES + LANES);
#define START(i) __m512i s##i = offset0, t##i = offset1;
      MARS_EACH8(START)
#undef START
      for (int64_t k = 0; k < b.steps; ++k, c += LANES, e += LANES) {
        const __m512i c0 = _mm512_load_si512(c), c1 = _mm512_load_si512(e);
#define STEP(i)                                                                  \
  {                                                                              \
    const __m512i row = _mm512_set1_epi32(static_cast<int>(x[i * b.steps + k])); \
    asm("vpdpbusd %2, %1, %0" : "+v"(s##i) : "v"(row), "v"(c0));                 \
    asm("vpdpbusd %2, %1, %0" : "+v"(t##i) : "v"(row), "v"(c1));                 \
  }
        MARS_EACH8(STEP)
#undef STEP
      }
#define KEEP(i) m##i = _mm512_max_epi32(m##i, _mm512_max_epi32(s##i, t##i));
      MARS_EACH8(KEEP)
#undef KEEP
    }
#define STORE(i)                                                 \
  _mm512_store_ps(maxima + ((n + i) * b.blocks + block) * LANES, \
                  _mm512_mul_ps(_mm512_cvtepi32_ps(m##i), _mm512_set1_ps(r.scale[n + i] * b.scale[block])));
    MARS_EACH8(STORE)
#undef STORE
  }
}

// In static storage: GCC 12's intrinsic tells the compiler of its first 8 bytes only.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig TILES;

MARS_AMX void start_tiles() { _tile_loadconfig(&TILES); }
MARS_AMX void stop_tiles() { _tile_release(); }

struct Tiles {
  explicit Tiles(bool wanted) : on(wanted) {
    if (on) start_tiles();
  }
  ~Tiles() {
    if (on) stop_tiles();
  }
  const bool on;
};

// Products of 16 rows with two tiles of codes, in the tile registers p and q.
#define MARS_MULTIPLY(p, q, tile)                           \
  {                                                         \
    const uint32_t* c = b.coded + (tile) * LANES * b.steps; \
    _tile_zero(p);                                          \
    _tile_zero(q);                                          \
    for (int64_t k = 0; k < b.steps; k += 16) {             \
      _tile_loadd(4, x + k, b.steps * 4);                   \
      _tile_loadd(5, c + k * LANES, LANES * 4);             \
      _tile_loadd(6, c + (b.steps + k) * LANES, LANES * 4); \
      _tile_dpbf16ps(p, 4, 5);                              \
      _tile_dpbf16ps(q, 4, 6);                              \
    }                                                       \
  }
#define MARS_STORE(p, q, at)                \
  _tile_stored(p, products[at], LANES * 4); \
  _tile_stored(q, products[at + 1], LANES * 4);

// 16 rows x 4 tiles. A pair of tiles is stored while the next pair is multiplied: done at once, each would wait.
MARS_AMX void score_amx(const Codebook& b, const Rows& r, int64_t count, int64_t block, float* maxima) {
  alignas(64) float products[4][16][LANES];
  for (int64_t n = 0; n < count; n += 16) {
    const uint32_t* x = r.operand + n * b.steps;
    const int64_t first = block * GROUP, last = first + GROUP;
    __m512 m[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) m[i] = _mm512_set1_ps(-INF);
    MARS_MULTIPLY(0, 1, first)
    for (int64_t tile = first; tile < last; tile += 4) {
      MARS_MULTIPLY(2, 3, tile + 2)
      MARS_STORE(0, 1, 0)
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        m[i] = _mm512_max_ps(m[i], _mm512_max_ps(_mm512_load_ps(products[0][i]), _mm512_load_ps(products[1][i])));
      if (tile + 4 < last) MARS_MULTIPLY(0, 1, tile + 4)
      MARS_STORE(2, 3, 2)
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        m[i] = _mm512_max_ps(m[i], _mm512_max_ps(_mm512_load_ps(products[2][i]), _mm512_load_ps(products[3][i])));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_ps(maxima + ((n + i) * b.blocks + block) * LANES, m[i]);
  }
}

// Best code of a group of GROUP by the definition; here codes are not in their own order, so ties look at the index.
MARS_AVX512 MARS_INLINE void exact_candidate(const Codebook& b, const float* x, int64_t group, float& best,
                                             int32_t& id) {
  const float* row = b.sorted + group * b.dim * GROUP;
  __m512 s = _mm512_load_ps(b.sorted_bias + group * GROUP), t = _mm512_load_ps(b.sorted_bias + group * GROUP + 16);
  for (int64_t d = 0; d < b.dim; ++d, row += GROUP) {
    const __m512 entry = _mm512_set1_ps(x[d]);
    s = _mm512_fmadd_ps(entry, _mm512_load_ps(row), s), t = _mm512_fmadd_ps(entry, _mm512_load_ps(row + 16), t);
  }
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(s, t));
  if (largest < best) return;
  const __m512 top = _mm512_set1_ps(largest);
  const __m512i none = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
  const int32_t* index = b.index + group * GROUP;
  const __m512i first = _mm512_min_epi32(
      _mm512_mask_mov_epi32(none, _mm512_cmp_ps_mask(s, top, _CMP_EQ_OQ), _mm512_load_si512(index)),
      _mm512_mask_mov_epi32(none, _mm512_cmp_ps_mask(t, top, _CMP_EQ_OQ), _mm512_load_si512(index + 16)));
  const int32_t lowest = _mm512_reduce_min_epi32(first);
  if (largest > best || lowest < id) best = largest, id = lowest;
}

// The id of a row from its group maxima, or -1 where more groups are left than the exact search would cost.
MARS_AVX512 int64_t resolve(const Codebook& b, const Rows& r, int64_t n, const float* x, const float* maxima,
                            float* slack) {
  if (!(r.original[n] < INF)) return -1;  // no bound holds, and a row that is not finite is the exact search's business
  // How far a filter's score can be from the definition's, less what is the same for all codes: what the operands miss
  // (Cauchy-Schwarz), and float32 rounding in the filter and in the definition.
  const float per_dim = rounding(b.dim);
  const __m512 norm = _mm512_set1_ps(1.001f * (r.norm[n] + r.error[n])), error = _mm512_set1_ps(1.001f * r.error[n]);
  const __m512 original = _mm512_set1_ps(1.001f * r.original[n]), half = _mm512_set1_ps(0.5f);
  const __m512 unit = _mm512_set1_ps(per_dim), least = _mm512_set1_ps(static_cast<float>(b.dim) * 1e-37f);
  for (int64_t block = 0; block < b.blocks; block += LANES) {
    const __m512 c = _mm512_load_ps(b.norm + block), raw = _mm512_load_ps(b.original + block);
    __m512 rounded = _mm512_fmadd_ps(norm, c, _mm512_mul_ps(original, raw));
    rounded = _mm512_fmadd_ps(half, _mm512_fmadd_ps(c, c, _mm512_mul_ps(raw, raw)), rounded);
    const __m512 missed = _mm512_fmadd_ps(error, c, _mm512_mul_ps(norm, _mm512_load_ps(b.error + block)));
    _mm512_store_ps(slack + block, _mm512_add_ps(_mm512_fmadd_ps(unit, rounded, missed), least));
  }
  __m512 lower = _mm512_set1_ps(-INF);
  for (int64_t block = 0; block < b.blocks; ++block) {
    const __m512 least = _mm512_add_ps(_mm512_load_ps(maxima + block * LANES), _mm512_load_ps(b.low + block * LANES));
    lower = _mm512_max_ps(_mm512_sub_ps(least, _mm512_set1_ps(slack[block])), lower);
  }
  const __m512 threshold = _mm512_set1_ps(_mm512_reduce_max_ps(lower));
  int32_t groups[CANDIDATES];
  int count = 0;
  for (int64_t block = 0; block < b.blocks; ++block) {
    const __m512 most = _mm512_add_ps(_mm512_load_ps(maxima + block * LANES), _mm512_load_ps(b.high + block * LANES));
    const __m512 upper = _mm512_add_ps(most, _mm512_set1_ps(slack[block]));
    unsigned left = _mm512_cmp_ps_mask(upper, threshold, _CMP_NLT_UQ);  // and where one of them is NaN
    if (left && count + __builtin_popcount(left) > CANDIDATES) return -1;
    for (; left; left &= left - 1) groups[count++] = static_cast<int32_t>(block * LANES + __builtin_ctz(left));
  }
  float best = -INF;
  int32_t id = std::numeric_limits<int32_t>::max();
  for (int i = 0; i < count; ++i) exact_candidate(b, x, groups[i], best, id);
  return id;
}

void search_filtered(const Codebook& b, const float* x, int64_t rows, int64_t* ids) {
  Rows r;
  r.operand = Buffer<uint32_t>(CHUNK * b.steps);
  r.scale = Buffer<float>(CHUNK);
  const int64_t groups = b.blocks * LANES;
  Buffer<float> maxima(std::min(CHUNK, ceil_div(rows, 16) * 16) * groups), slack(ceil_div(b.blocks, LANES) * LANES);
  std::vector<int64_t> open;  // rows for the exact search
  const Tiles tiles(b.filter == mars::AMX);
  for (int64_t first = 0; first < rows; first += CHUNK) {
    const int64_t count = std::min(CHUNK, rows - first);
    const float* chunk = x + first * b.dim;
    if (b.filter == mars::VNNI)
      quarter_rows(b, chunk, count, r);
    else
      halve_rows(b, chunk, count, r);
    const auto score = b.filter == mars::AMX ? score_amx : b.filter == mars::VNNI ? score_vnni : score_bf16;
    for (int64_t block = 0; block < b.blocks; ++block) score(b, r, count, block, maxima);
    for (int64_t n = 0; n < count; ++n) {
      ids[first + n] = resolve(b, r, n, chunk + n * b.dim, maxima + n * groups, slack);
      if (ids[first + n] < 0) open.push_back(first + n);
    }
  }
  if (open.empty()) return;
  std::vector<float> gathered(open.size() * b.dim);
  std::vector<int64_t> found(open.size());
  for (size_t i = 0; i < open.size(); ++i) std::copy_n(x + open[i] * b.dim, b.dim, gathered.data() + i * b.dim);
  search_exact(b, gathered.data(), static_cast<int64_t>(open.size()), found.data(), 48, exact_avx512, resolve_avx512);
  for (size_t i = 0; i < open.size(); ++i) ids[open[i]] = found[i];
}

#endif  // MARS_X86

void search(const Codebook& b, const float* x, int64_t rows, int64_t* ids) {
#if defined(MARS_X86)
  if (b.blocks) return search_filtered(b, x, rows, ids);
  if (mars::vectors() == mars::AVX512) return search_exact(b, x, rows, ids, 48, exact_avx512, resolve_avx512);
  if (mars::vectors() == mars::AVX2) return search_exact(b, x, rows, ids, 24, exact_avx2, resolve_avx2);
#endif
  search_portable(b, x, rows, ids);
}

}  // namespace

void* mars_codebook_pack(const float* codebook, int64_t codes, int64_t dim, int normalized) {
  try {
    auto b = std::make_unique<Codebook>();
    b->codes = codes, b->dim = dim, b->normalized = normalized;
    std::vector<char> usable(codes);
    pack_rows(*b, codebook, usable);
    if (mars::level() > mars::AVX512 && codes >= FILTERED && dim <= LONGEST) {
      b->filter = mars::level();
      pack_filter(*b, codebook, usable);
    }
    return b.release();
  } catch (const std::exception&) {
    return nullptr;
  }
}

void mars_codebook_free(void* packed) { delete static_cast<Codebook*>(packed); }

int mars_nearest_code(const void* packed, const float* x, int64_t rows, int64_t* ids, int threads) {
  const auto& b = *static_cast<const Codebook*>(packed);
  // Runs of whole panels, so that no thread works on padding while another has rows left.
  const int64_t share = ceil_div(ceil_div(rows, std::max(threads, 1)), 16) * 16;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
  for (int t = 0; t < threads; ++t) {
    const int64_t first = t * share, count = std::min(share, rows - first);
    if (count <= 0) continue;
    try {
      search(b, x + first * b.dim, count, ids + first);
    } catch (const std::exception&) {
      failed = 1;
    }
  }
  return failed ? -1 : 0;
}
