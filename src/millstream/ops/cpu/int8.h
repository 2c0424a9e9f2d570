// Products of 8-bit activations with 4- or 8-bit weights, both with a scale for every RUN of 32 inputs.
//
//   y[r][o] = sum over runs g of  sx[r][g] * (d[o][g] * dot(u[o], q[r]) + m[o][g] * sum(q[r]))
//
// u are unsigned codes (w = d * u + m), q are signed. A dot product over one run is exact in integers; what follows it is
// three fused multiply-adds in one order, run after run. How rows and outputs are cut into tiles only decides when that
// is done, never how: a row's result has the same bits in any company.
//
// Weights lie as they are read, in one stream for each WIDE panels of PANEL outputs: run after run the codes of both as
// (WIDE, 8, 16 outputs, 4 inputs), where a code has 4 bits two of these eight in one (low nibbles, high nibbles), and
// then d and m of both in half precision as (WIDE, 2, 16).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "tiles.h"

namespace int8 {

constexpr int RUN = 32, PANEL = 16, STEPS = RUN / 4;
constexpr int WIDE = 2;            // panels that are multiplied together
// Rows likewise: TILE * WIDE sums stay in registers.
#if defined(__AVX512F__)
constexpr int TILE = 12;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int TILE = 4;
#else
constexpr int TILE = 2;
#endif
constexpr int64_t SLAB = 8;        // runs that are expanded at a time, so that they are in the first-level cache
constexpr int64_t ROWS = 96;       // rows that pass an expanded slab, so that their sums are too
constexpr int64_t AHEAD = 8192;    // bytes of a stream that are asked for before their use, into the second cache

typedef float Vec __attribute__((vector_size(64)));
typedef float VecAny __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int32_t IntsAny __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint32_t WordsAny __attribute__((vector_size(64), aligned(4), may_alias));

inline Vec load(const float *p) { return *reinterpret_cast<const VecAny *>(p); }
inline void store(float *p, Vec v) { *reinterpret_cast<VecAny *>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }

// a * b + c, with one rounding where the machine can: whether it is contracted must not depend on the place.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
  for (int h = 0; h < 2; h++) z[h] = _mm256_fmadd_ps(x[h], y[h], z[h]);
  std::memcpy(&c, z, 64);
  return c;
#elif defined(__aarch64__)
  for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// Adds to each of 16 sums the products of four unsigned bytes of `u` with the four signed bytes of `q` beside them.
inline Ints dot(Ints sum, Ints u, Ints q) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)q);
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi16(0x00FF);
  __m256i us[2], qs[2], sums[2];
  std::memcpy(us, &u, 64), std::memcpy(qs, &q, 64), std::memcpy(sums, &sum, 64);
  for (int h = 0; h < 2; h++) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(us[h], low), _mm256_srai_epi16(_mm256_slli_epi16(qs[h], 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(us[h], 8), _mm256_srai_epi16(qs[h], 8));
    sums[h] = _mm256_add_epi32(sums[h], _mm256_add_epi32(even, odd));
  }
  std::memcpy(&sum, sums, 64);
  return sum;
#else
  for (int i = 0; i < 4; i++) sum += ((u >> (8 * i)) & 255) * ((q << (24 - 8 * i)) >> 24);
  return sum;
#endif
}

inline Ints same(int32_t x) { return x - Ints{}; }

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
#endif
}

inline Vec halves(const uint16_t *p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#else
  Vec out;
  for (int i = 0; i < PANEL; i++) out[i] = half_to_float(p[i]);
  return out;
#endif
}

} // namespace int8

extern "C" {

// One matrix; `outputs` and `inputs` are those of the layer, the stream covers multiples of 32 of both. `kind` is how it
// lies there: BLOCKS as this file reads it, CHANNEL as `channel.h` does, in so many `groups` (0: none).
struct MillstreamMatrix {
  const uint8_t *stream;
  const float *bias; // (outputs), or null
  int64_t inputs, outputs, bits, kind, groups;
};

}

namespace int8 {

constexpr int64_t BLOCKS = 0, CHANNEL = 1;

inline int64_t runs_of(int64_t inputs) { return (inputs + RUN - 1) / RUN; }

// Rows of quantized activations: q (rows, runs * 32), scale and sum (rows, runs).
struct Rows {
  int8_t *q;
  float *scale;
  float *sum;
  int64_t runs;
};

// One row of x to 8 bits: each run by its largest value. What lies beyond `inputs` becomes zero. A run that holds a NaN has
// the scale NaN: what it is multiplied into must not look sound.
inline void quantize_row(const float *x, int64_t inputs, int8_t *q, float *scale, float *sum) {
  int64_t g = 0;
#if defined(__AVX512F__)
  for (; (g + 1) * RUN <= inputs; g++) {
    const __m512 a = _mm512_loadu_ps(x + g * RUN), b = _mm512_loadu_ps(x + g * RUN + 16);
    const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    const __m512 by = _mm512_set1_ps(inverse);
    const __m512i i = _mm512_cvtps_epi32(_mm512_mul_ps(a, by)), j = _mm512_cvtps_epi32(_mm512_mul_ps(b, by));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(q + g * RUN), _mm512_cvtsepi32_epi8(i));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(q + g * RUN + 16), _mm512_cvtsepi32_epi8(j));
    scale[g] = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) ? NAN : most / 127.0f;
    sum[g] = float(_mm512_reduce_add_epi32(_mm512_add_epi32(i, j)));
  }
#endif
  for (; g * RUN < inputs; g++) {
    const int64_t n = std::min<int64_t>(RUN, inputs - g * RUN);
    const float *at = x + g * RUN;
    float most = 0.0f;
    bool sound = true;
    for (int64_t i = 0; i < n; i++) most = std::max(most, std::fabs(at[i])), sound &= at[i] == at[i];
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    int32_t total = 0;
    for (int64_t i = 0; i < RUN; i++) {
      const int32_t value = i < n && sound ? int32_t(std::nearbyint(at[i] * inverse)) : 0;
      q[g * RUN + i] = int8_t(value);
      total += value;
    }
    scale[g] = sound ? most / 127.0f : NAN;
    sum[g] = float(total);
  }
}

// A slab of WIDE panels, ready to be multiplied.
struct Slab {
  alignas(64) uint8_t codes[SLAB][WIDE][STEPS][64];
  alignas(64) float d[SLAB][WIDE][PANEL], zero[SLAB][WIDE][PANEL], m[SLAB][WIDE][PANEL];
};

// Added to an integer of fewer than 23 bits it makes one that, read as a float, is 1.5 * 2^23 more: no conversion needed.
constexpr int32_t MAGIC = 0x4B400000;

// A dot product times d. Where sums are fused with products, sums begin at START and `zero` takes that away again, exactly:
// d has few digits, and so has 1.5 * 2^23.
#if defined(__AVX512F__) || defined(__FMA__) || defined(__aarch64__)
constexpr int32_t START = MAGIC;
inline Vec scaled(Ints sum, Vec d, Vec zero) { return fma((Vec)sum, d, zero); }
#else
constexpr int32_t START = 0;
inline Vec scaled(Ints sum, Vec d, Vec) { return __builtin_convertvector(sum, Vec) * d; }
#endif

inline int64_t run_bytes(int64_t bits) { return WIDE * (STEPS * 64 * bits / 8 + 2 * PANEL * 2); }

inline void expand(const MillstreamMatrix &w, int64_t pair, int64_t from, int64_t count, Slab &slab) {
  const int64_t bytes = run_bytes(w.bits);
  const uint8_t *at = w.stream + (pair * runs_of(w.inputs) + from) * bytes;
  for (int64_t g = 0; g < count; g++, at += bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + AHEAD + i, 0, 2);
    uint8_t *to = slab.codes[g][0][0];
    if (w.bits == 4) {
      const Words low = Words{} + 0x0F0F0F0Fu;
#pragma GCC unroll 8
      for (int j = 0; j < WIDE * STEPS / 2; j++) {
        Words v;
        std::memcpy(&v, at + j * 64, 64);
        const Words a = v & low, b = (v >> 4) & low;
        std::memcpy(to + j * 128, &a, 64), std::memcpy(to + j * 128 + 64, &b, 64);
      }
    } else {
      std::memcpy(to, at, WIDE * STEPS * 64);
    }
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(at + bytes - WIDE * 2 * PANEL * 2);
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++, scales += 2 * PANEL) {
      const Vec d = halves(scales);
      store(slab.d[g][c], d);
      store(slab.zero[g][c], d * -12582912.0f);
      store(slab.m[g][c], halves(scales + PANEL));
    }
  }
}

// One row of the matrix itself, (inputs) floats.
inline void output_row(const MillstreamMatrix &w, int64_t output, float *out) {
  const int64_t runs = runs_of(w.inputs), bytes = run_bytes(w.bits), lane = output % PANEL;
  const int64_t panel = output / PANEL % WIDE;
  const uint8_t *at = w.stream + output / (WIDE * PANEL) * runs * bytes;
  for (int64_t g = 0; g < runs; g++, at += bytes) {
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(at + bytes - WIDE * 2 * PANEL * 2) + panel * 2 * PANEL;
    const float d = half_to_float(scales[lane]), m = half_to_float(scales[PANEL + lane]);
    const uint8_t *codes = at + panel * STEPS * 64 * w.bits / 8;
    for (int64_t i = g * RUN; i < std::min((g + 1) * RUN, w.inputs); i++) {
      const int64_t step = i % RUN / 4, byte = lane * 4 + i % 4;
      const int32_t u = w.bits == 8 ? codes[step * 64 + byte] : codes[step / 2 * 64 + byte] >> (step % 2 * 4) & 15;
      out[i] = d * float(u) + m;
    }
  }
}

// R rows times a slab, added to y (R, WIDE * PANEL).
template <int R>
inline void multiply(const Slab &slab, int64_t count, const int8_t *q, const float *scale, const float *sum, int64_t runs,
                     float *y) {
  for (int64_t g = 0; g < count; g++) {
    Ints acc[R][WIDE];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int c = 0; c < WIDE; c++) acc[r][c] = Ints{} + START;
#pragma GCC unroll 8
    for (int k = 0; k < STEPS; k++) {
      Ints u[WIDE];
#pragma GCC unroll 2
      for (int c = 0; c < WIDE; c++) u[c] = *reinterpret_cast<const IntsAny *>(slab.codes[g][c][k]);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        int32_t four;
        std::memcpy(&four, q + r * runs * RUN + g * RUN + k * 4, 4);
#pragma GCC unroll 2
        for (int c = 0; c < WIDE; c++) acc[r][c] = dot(acc[r][c], u[c], same(four));
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++) {
      const Vec d = load(slab.d[g][c]), zero = load(slab.zero[g][c]), m = load(slab.m[g][c]);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        float *to = y + (r * WIDE + c) * PANEL;
        Vec t = scaled(acc[r][c], d, zero);
        t = fma(m, splat(sum[r * runs + g]), t);
        store(to, fma(t, splat(scale[r * runs + g]), load(to)));
      }
    }
  }
}

// The same straight from the stream, over all runs: for rows too few to be worth expanding a slab. The order of every
// operation is that of `multiply`, so bits do not depend on which of the two was taken.
template <int R, int BITS>
inline void multiply_stream(const uint8_t *at, int64_t runs, const int8_t *q, const float *scale, const float *sum, float *y) {
  constexpr int64_t BYTES = WIDE * (STEPS * 64 * BITS / 8 + 2 * PANEL * 2);
  constexpr bool HELD = R <= 4; // whether the sums of floats have registers of their own
  Vec total[HELD ? R : 1][WIDE] = {};
  for (int64_t g = 0; g < runs; g++, at += BYTES) {
#pragma GCC unroll 20
    for (int64_t i = 0; i < BYTES; i += 64) __builtin_prefetch(at + AHEAD + i, 0, 2);
    Ints acc[R][WIDE];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int c = 0; c < WIDE; c++) acc[r][c] = Ints{} + START;
    const auto add = [&](const Ints (&u)[WIDE], int k) __attribute__((always_inline)) {
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        int32_t four;
        std::memcpy(&four, q + r * runs * RUN + g * RUN + k * 4, 4);
#pragma GCC unroll 2
        for (int c = 0; c < WIDE; c++) acc[r][c] = dot(acc[r][c], u[c], same(four));
      }
    };
    if constexpr (BITS == 4) {
#pragma GCC unroll 4
      for (int k = 0; k < STEPS; k += 2) {
        Ints low[WIDE], high[WIDE];
#pragma GCC unroll 2
        for (int c = 0; c < WIDE; c++) {
          const Words v = *reinterpret_cast<const WordsAny *>(at + (c * STEPS / 2 + k / 2) * 64);
          low[c] = (Ints)(v & (Words{} + 0x0F0F0F0Fu)), high[c] = (Ints)((v >> 4) & (Words{} + 0x0F0F0F0Fu));
        }
        add(low, k), add(high, k + 1);
      }
    } else {
#pragma GCC unroll 8
      for (int k = 0; k < STEPS; k++) {
        Ints u[WIDE];
#pragma GCC unroll 2
        for (int c = 0; c < WIDE; c++) u[c] = *reinterpret_cast<const IntsAny *>(at + (c * STEPS + k) * 64);
        add(u, k);
      }
    }
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(at + BYTES - WIDE * 2 * PANEL * 2);
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++, scales += 2 * PANEL) {
      const Vec d = halves(scales), zero = d * -12582912.0f, m = halves(scales + PANEL);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        float *to = y + (r * WIDE + c) * PANEL;
        Vec t = scaled(acc[r][c], d, zero);
        t = fma(m, splat(sum[r * runs + g]), t);
        if constexpr (HELD) total[r][c] = fma(t, splat(scale[r * runs + g]), total[r][c]);
        else store(to, fma(t, splat(scale[r * runs + g]), load(to)));
      }
    }
  }
  if constexpr (HELD)
    for (int r = 0; r < R; r++)
      for (int c = 0; c < WIDE; c++) store(y + (r * WIDE + c) * PANEL, total[r][c]);
}

template <int R>
inline void multiply_few(int64_t n, const MillstreamMatrix &w, int64_t pair, const int8_t *q, const float *scale,
                         const float *sum, float *y) {
  if constexpr (R > 1)
    if (n < R) return multiply_few<R - 1>(n, w, pair, q, scale, sum, y);
  const int64_t runs = runs_of(w.inputs);
  const uint8_t *at = w.stream + pair * runs * run_bytes(w.bits);
  if (w.bits == 4) multiply_stream<R, 4>(at, runs, q, scale, sum, y);
  else multiply_stream<R, 8>(at, runs, q, scale, sum, y);
}

template <int R>
inline void multiply_rows(int64_t n, const Slab &slab, int64_t count, const int8_t *q, const float *scale,
                          const float *sum, int64_t runs, float *y) {
  if constexpr (R > 1)
    if (n < R) return multiply_rows<R - 1>(n, slab, count, q, scale, sum, runs, y);
  multiply<R>(slab, count, q, scale, sum, runs, y);
}

#if MILLSTREAM_TILES
// What `multiply` adds, for 16 rows: the dot products of four runs by tiles, then their floats, a panel at a time.
inline void multiply_tile(const Slab &slab, int64_t count, const int8_t *q, const float *scale, const float *sum,
                          int64_t runs, float *y) {
  tiles::take(tiles::NARROW);
  alignas(64) int32_t dots[4][tiles::HEIGHT * PANEL];
  for (int c = 0; c < WIDE; c++) {
    Vec total[tiles::HEIGHT];
#pragma GCC unroll 16
    for (int r = 0; r < tiles::HEIGHT; r++) total[r] = load(y + (r * WIDE + c) * PANEL);
    const auto add = [&](int64_t g, const int32_t *dot) __attribute__((always_inline)) {
      const Vec d = load(slab.d[g][c]), m = load(slab.m[g][c]);
#pragma GCC unroll 16
      for (int r = 0; r < tiles::HEIGHT; r++) {
        // A product of a whole number below 2^24 is rounded once here, as it is in `scaled`.
        Vec t = (Vec)_mm512_cvtepi32_ps(_mm512_load_si512(dot + r * PANEL)) * d;
        t = fma(m, splat(sum[r * runs + g]), t);
        total[r] = fma(t, splat(scale[r * runs + g]), total[r]);
      }
    };
    // The number of a tile is part of its instruction.
#define MILLSTREAM_DOTS(g, A, B, SUMS, to)    \
  _tile_zero(SUMS);                           \
  _tile_loadd(A, q + (g) * RUN, runs * RUN);  \
  _tile_loadd(B, slab.codes[g][c][0], 64);    \
  _tile_dpbsud(SUMS, A, B);                   \
  _tile_stored(SUMS, to, 64);
    int64_t g = 0;
    for (; g + 4 <= count; g += 4) {
      MILLSTREAM_DOTS(g, 0, 1, 4, dots[0])
      MILLSTREAM_DOTS(g + 1, 2, 3, 5, dots[1])
      MILLSTREAM_DOTS(g + 2, 0, 1, 6, dots[2])
      MILLSTREAM_DOTS(g + 3, 2, 3, 7, dots[3])
      for (int i = 0; i < 4; i++) add(g + i, dots[i]);
    }
    for (; g < count; g++) {
      MILLSTREAM_DOTS(g, 0, 1, 4, dots[0])
      add(g, dots[0]);
    }
#undef MILLSTREAM_DOTS
#pragma GCC unroll 16
    for (int r = 0; r < tiles::HEIGHT; r++) store(y + (r * WIDE + c) * PANEL, total[r]);
  }
}
#endif

// How many of some rows are multiplied by tiles: those that fill them.
inline int64_t tiled([[maybe_unused]] int64_t rows) {
#if MILLSTREAM_TILES
  if (tiles::Scope::on()) return rows / tiles::HEIGHT * tiles::HEIGHT;
#endif
  return 0;
}

// A product shared out over threads: unit after unit of WIDE panels for some rows. `put(row, output, count, sums)` takes
// each row's finished sums, bias added.
template <class Put> struct Product {
  const MillstreamMatrix &w;
  const Rows &x;
  int64_t rows;
  const Put &put;

  int64_t pairs() const { return (w.outputs + WIDE * PANEL - 1) / (WIDE * PANEL); }
  int64_t blocks() const { return (rows + ROWS - 1) / ROWS; }
  int64_t units() const { return pairs() * blocks(); }

  void unit(int64_t number) const {
    const int64_t width = WIDE * PANEL, pair = number % pairs(), block = number / pairs();
    const int64_t first = block * rows / blocks(), n = (block + 1) * rows / blocks() - first;
    // Whole tiles first, where there are any.
    const int64_t by_tiles = tiled(n), rest = n - by_tiles, parts = (rest + TILE - 1) / TILE;
    alignas(64) static thread_local float y[(ROWS + 1) * WIDE * PANEL];
    static thread_local Slab slab;
    std::memset(y, 0, size_t(n * width) * sizeof(float));
    const bool few = by_tiles == 0 && parts == 1;
    if (few) multiply_few<TILE>(n, w, pair, x.q + first * x.runs * RUN, x.scale + first * x.runs, x.sum + first * x.runs, y);
    for (int64_t from = 0; from < x.runs && !few; from += SLAB) {
      const int64_t count = std::min(SLAB, x.runs - from);
      expand(w, pair, from, count, slab);
#if MILLSTREAM_TILES
      for (int64_t row = 0; row < by_tiles; row += tiles::HEIGHT) {
        const int64_t at = first + row;
        multiply_tile(slab, count, x.q + (at * x.runs + from) * RUN, x.scale + at * x.runs + from,
                      x.sum + at * x.runs + from, x.runs, y + row * width);
      }
#endif
      for (int64_t t = 0; t < parts; t++) {
        const int64_t row = by_tiles + t * rest / parts, height = by_tiles + (t + 1) * rest / parts - row;
        const int64_t at = first + row;
        multiply_rows<TILE>(height, slab, count, x.q + (at * x.runs + from) * RUN, x.scale + at * x.runs + from,
                      x.sum + at * x.runs + from, x.runs, y + row * width);
      }
    }
    const int64_t output = pair * width, count = std::min(width, w.outputs - output);
    for (int64_t r = 0; r < n; r++) {
      float *sums = y + r * width;
      if (w.bias)
        for (int64_t o = 0; o < count; o++) sums[o] += w.bias[output + o];
      put(first + r, output, count, sums);
    }
  }
};

} // namespace int8
