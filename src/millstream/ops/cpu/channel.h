// Products of 8-bit activations, one scale a row, with 4- or 8-bit weights, one scale an output.
//
//   y[r][o] = float(dot(u[o], q[r]) - zero[o] * sum(q[r])) * scale[o] * sx[r]
//
// The dot product runs over all inputs in integers, so nothing about it depends on order; floats come once an output.
// Weights lie as they are read, in one stream for each WIDE panels of PANEL outputs (`ops/ref/channel.py`): for each
// group of inputs WIDE * PANEL steps and as many offsets, where there are groups; run after run the codes of both panels
// as (8, WIDE, 16 outputs, 4 inputs), where a code has 4 bits two of these eight in one; then scales and, for 4 bits
// without groups, zeros.
#pragma once

#include "int8.h"

namespace int8 {

constexpr int PAIR = WIDE * PANEL;
constexpr int64_t CHANNEL_SLAB = 8;                    // runs that are multiplied at a time, expanded first if need be
constexpr int64_t STEP_BYTES = WIDE * 64;              // codes of 8 bits for 4 inputs
constexpr int64_t SCALE_BYTES = 4 * PAIR, ZERO_BYTES = PAIR, HEADER_BYTES = 2 * PAIR;

typedef uint16_t Shorts __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));

inline int64_t code_bytes(const MillstreamMatrix &w) { return STEPS * STEP_BYTES * w.bits / 8; }

inline int64_t pair_bytes(const MillstreamMatrix &w) {
  return runs_of(w.inputs) * code_bytes(w) + w.groups * HEADER_BYTES + SCALE_BYTES +
         (w.bits == 4 && w.groups == 0 ? ZERO_BYTES : 0);
}

// One row of x to 8 bits by its largest value. What lies beyond `inputs`, up to a whole run, becomes zero. A row that is
// not finite has the scale NaN: its outputs must not look sound.
inline void quantize_whole(const float *x, int64_t inputs, int8_t *q, float *scale, float *sum) {
  // Bits of absolute values are ordered as these are, and a NaN is the largest.
  uint32_t bits = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  __m512i most_bits = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (; i + 16 <= inputs; i += 16)
    most_bits = _mm512_max_epu32(most_bits, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
  bits = _mm512_reduce_max_epu32(most_bits);
#endif
  for (; i < inputs; i++) {
    uint32_t one;
    std::memcpy(&one, x + i, 4);
    bits = std::max(bits, one & 0x7fffffffu);
  }
  const int64_t padded = runs_of(inputs) * RUN;
  if (bits >= 0x7f800000u) {
    std::memset(q, 0, size_t(padded));
    *scale = NAN, *sum = 0.0f;
    return;
  }
  float most;
  std::memcpy(&most, &bits, 4);
  // What is smaller has an inverse without end.
  const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
  int32_t total = 0;
  i = 0;
#if defined(__AVX512F__)
  const __m512 by = _mm512_set1_ps(inverse);
  __m512i totals = _mm512_setzero_si512();
  for (; i + 16 <= inputs; i += 16) {
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), by));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(q + i), _mm512_cvtsepi32_epi8(value));
    totals = _mm512_add_epi32(totals, value);
  }
  total = _mm512_reduce_add_epi32(totals);
#endif
  for (; i < inputs; i++) {
    const int32_t value = int32_t(std::nearbyint(x[i] * inverse));
    q[i] = int8_t(value), total += value;
  }
  std::memset(q + inputs, 0, size_t(padded - inputs));
  *scale = most / 127.0f, *sum = float(total);
}

// One row of x as matrix `w` multiplies it.
inline void quantize_for(const MillstreamMatrix &w, const float *x, int64_t inputs, const Rows &to, int64_t row) {
  int8_t *q = to.q + row * to.runs * RUN;
  float *scale = to.scale + row * to.runs, *sum = to.sum + row * to.runs;
  if (w.kind == CHANNEL) quantize_whole(x, inputs, q, scale, sum);
  else quantize_row(x, inputs, q, scale, sum);
}

// Runs [from, from + count) of a pair as bytes in multiplying order: where they lie, or expanded into `to`.
inline const uint8_t *channel_codes(const MillstreamMatrix &w, const uint8_t *pair, int64_t from, int64_t count,
                                    uint8_t *to) {
  const int64_t bytes = code_bytes(w);
  if (w.bits == 8) {
    const uint8_t *at = pair + from * bytes;
    for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(at + count * bytes + i, 0, 2);
    return at;
  }
  const int64_t each = w.groups ? runs_of(w.inputs) / w.groups : 0; // runs of a group
  const Words low = Words{} + 0x0F0F0F0Fu;
  Words step[WIDE] = {}, offset[WIDE] = {};
  int64_t group = -1;
  for (int64_t g = 0; g < count; g++) {
    const int64_t run = from + g;
    const uint8_t *at = pair + run * bytes;
    if (each) {
      at += (run / each + 1) * HEADER_BYTES;
      if (run / each != group) {
        group = run / each;
        const uint8_t *header = pair + group * (HEADER_BYTES + each * bytes);
        for (int c = 0; c < WIDE; c++) {
          // Two inputs' steps in 32 bits, four inputs' offsets.
          Words a, b;
#if defined(__AVX512F__)
          a = (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(header + c * PANEL)));
          b = (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(header + PAIR + c * PANEL)));
#else
          for (int i = 0; i < PANEL; i++) a[i] = header[c * PANEL + i], b[i] = header[PAIR + c * PANEL + i];
#endif
          step[c] = a | a << 16;
          offset[c] = b | b << 8;
          offset[c] |= offset[c] << 16;
        }
      }
    }
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + AHEAD + i, 0, 2);
    uint8_t *out = to + g * STEPS * STEP_BYTES;
#pragma GCC unroll 4
    for (int j = 0; j < STEPS / 2; j++) {
#pragma GCC unroll 2
      for (int c = 0; c < WIDE; c++) {
        Words v;
        std::memcpy(&v, at + (j * WIDE + c) * 64, 64);
        Words a = v & low, b = (v >> 4) & low;
        if (each) {
          // A code times its step is at most 15 * 17: no byte carries into the next, so two at a time.
          a = (Words)((Bytes)((Shorts)a * (Shorts)step[c]) + (Bytes)offset[c]);
          b = (Words)((Bytes)((Shorts)b * (Shorts)step[c]) + (Bytes)offset[c]);
        }
        std::memcpy(out + 2 * j * STEP_BYTES + c * 64, &a, 64);
        std::memcpy(out + (2 * j + 1) * STEP_BYTES + c * 64, &b, 64);
      }
    }
  }
  return to;
}

// R rows times some runs, added to sums (R, WIDE * PANEL).
template <int R>
inline void channel_multiply(const uint8_t *codes, int64_t count, const int8_t *q, int64_t stride, int32_t *sums) {
  Ints acc[R][WIDE];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++) acc[r][c] = *reinterpret_cast<const IntsAny *>(sums + (r * WIDE + c) * PANEL);
  for (int64_t k = 0; k < count * STEPS; k++) {
    Ints u[WIDE];
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++) u[c] = *reinterpret_cast<const IntsAny *>(codes + k * STEP_BYTES + c * 64);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      int32_t four;
      std::memcpy(&four, q + r * stride + k * 4, 4);
#pragma GCC unroll 2
      for (int c = 0; c < WIDE; c++) acc[r][c] = dot(acc[r][c], u[c], same(four));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++) *reinterpret_cast<IntsAny *>(sums + (r * WIDE + c) * PANEL) = acc[r][c];
}

template <int R>
inline void channel_rows(int64_t n, const uint8_t *codes, int64_t count, const int8_t *q, int64_t stride, int32_t *sums) {
  if constexpr (R > 1)
    if (n < R) return channel_rows<R - 1>(n, codes, count, q, stride, sums);
  channel_multiply<R>(codes, count, q, stride, sums);
}

#if MILLSTREAM_TILES
// Tiles of rows times some runs, an even number of them, added to sums (rows, WIDE * PANEL): both panels at once, for two
// tiles of rows or for one.
inline void channel_tiles(int64_t rows, const uint8_t *codes, int64_t count, const int8_t *q, int64_t stride, int32_t *sums) {
  constexpr int64_t TALL = tiles::HEIGHT, NEXT = TALL * PAIR;
  tiles::take(tiles::WHOLE);
  int64_t r = 0;
  for (; r + 2 * TALL <= rows; r += 2 * TALL) {
    int32_t *const to = sums + r * PAIR;
    _tile_loadd(4, to, PAIR * 4);
    _tile_loadd(5, to + PANEL, PAIR * 4);
    _tile_loadd(6, to + NEXT, PAIR * 4);
    _tile_loadd(7, to + NEXT + PANEL, PAIR * 4);
    for (int64_t g = 0; g < count; g += 2) {
      const uint8_t *code = codes + g * STEPS * STEP_BYTES;
      _tile_loadd(0, q + r * stride + g * RUN, stride);
      _tile_loadd(2, code, STEP_BYTES);
      _tile_dpbsud(4, 0, 2);
      _tile_loadd(3, code + 64, STEP_BYTES);
      _tile_dpbsud(5, 0, 3);
      _tile_loadd(1, q + (r + TALL) * stride + g * RUN, stride);
      _tile_dpbsud(6, 1, 2);
      _tile_dpbsud(7, 1, 3);
    }
    _tile_stored(4, to, PAIR * 4);
    _tile_stored(5, to + PANEL, PAIR * 4);
    _tile_stored(6, to + NEXT, PAIR * 4);
    _tile_stored(7, to + NEXT + PANEL, PAIR * 4);
  }
  for (; r < rows; r += TALL) {
    int32_t *const to = sums + r * PAIR;
    _tile_loadd(4, to, PAIR * 4);
    _tile_loadd(5, to + PANEL, PAIR * 4);
    for (int64_t g = 0; g < count; g += 2) {
      const uint8_t *code = codes + g * STEPS * STEP_BYTES;
      _tile_loadd(0, q + r * stride + g * RUN, stride);
      _tile_loadd(2, code, STEP_BYTES);
      _tile_dpbsud(4, 0, 2);
      _tile_loadd(3, code + 64, STEP_BYTES);
      _tile_dpbsud(5, 0, 3);
    }
    _tile_stored(4, to, PAIR * 4);
    _tile_stored(5, to + PANEL, PAIR * 4);
  }
}
#endif

// A product of either kind shared out over threads, in the units of `Product`.
template <class Put> struct AnyProduct {
  const MillstreamMatrix &w;
  const Rows &x;
  int64_t rows;
  const Put &put;

  Product<Put> blocked() const { return {w, x, rows, put}; }
  int64_t pairs() const { return blocked().pairs(); }
  int64_t blocks() const { return blocked().blocks(); }
  int64_t units() const { return blocked().units(); }

  void unit(int64_t number) const {
    if (w.kind != CHANNEL) return blocked().unit(number);
    const int64_t pair = number % pairs(), block = number / pairs();
    const int64_t first = block * rows / blocks(), n = (block + 1) * rows / blocks() - first;
    alignas(64) static thread_local int32_t sums[ROWS * PAIR];
    alignas(64) static thread_local uint8_t slab[CHANNEL_SLAB * STEPS * STEP_BYTES];
    std::memset(sums, 0, size_t(n * PAIR) * sizeof(int32_t));
    const uint8_t *stream = w.stream + pair * pair_bytes(w);
    for (int64_t from = 0; from < x.runs; from += CHANNEL_SLAB) {
      const int64_t count = std::min(CHANNEL_SLAB, x.runs - from);
      const uint8_t *codes = channel_codes(w, stream, from, count, slab);
      // A tile takes two runs at once.
      const int64_t by_tiles = count % 2 ? 0 : tiled(n), rest = n - by_tiles, parts = (rest + TILE - 1) / TILE;
#if MILLSTREAM_TILES
      channel_tiles(by_tiles, codes, count, x.q + (first * x.runs + from) * RUN, x.runs * RUN, sums);
#endif
      for (int64_t t = 0; t < parts; t++) {
        const int64_t row = by_tiles + t * rest / parts, height = by_tiles + (t + 1) * rest / parts - row;
        const int64_t at = first + row;
        channel_rows<TILE>(height, codes, count, x.q + (at * x.runs + from) * RUN, x.runs * RUN, sums + row * PAIR);
      }
    }
    const uint8_t *tail = stream + runs_of(w.inputs) * code_bytes(w) + w.groups * HEADER_BYTES;
    const float *scales = reinterpret_cast<const float *>(tail);
    Ints zero[WIDE];
    for (int c = 0; c < WIDE; c++)
      for (int i = 0; i < PANEL; i++)
        zero[c][i] = w.bits == 4 && w.groups == 0 ? tail[SCALE_BYTES + c * PANEL + i] : 128;
    const int64_t output = pair * PAIR, count = std::min<int64_t>(PAIR, w.outputs - output);
    for (int64_t r = 0; r < n; r++) {
      const int64_t at = (first + r) * x.runs;
      alignas(64) float y[PAIR];
#pragma GCC unroll 2
      for (int c = 0; c < WIDE; c++) {
        const Ints dots = *reinterpret_cast<const IntsAny *>(sums + r * PAIR + c * PANEL);
        const Vec whole = __builtin_convertvector(dots - zero[c] * int32_t(x.sum[at]), Vec);
        store(y + c * PANEL, whole * load(scales + c * PANEL) * splat(x.scale[at]));
      }
      // The bias is added to the rounded product, on every machine: no fused multiply-add across this line.
      asm volatile("" : : "r"(y) : "memory");
      if (w.bias)
        for (int64_t o = 0; o < count; o++) y[o] += w.bias[output + o];
      put(first + r, output, count, y);
    }
  }
};

// One row of the matrix itself, of either kind, (inputs) floats.
inline void any_output_row(const MillstreamMatrix &w, int64_t output, float *out) {
  if (w.kind != CHANNEL) return output_row(w, output, out);
  const int64_t lane = output % PAIR, panel = lane / PANEL, runs = runs_of(w.inputs);
  const uint8_t *stream = w.stream + output / PAIR * pair_bytes(w);
  const uint8_t *tail = stream + runs * code_bytes(w) + w.groups * HEADER_BYTES;
  float scale;
  std::memcpy(&scale, tail + lane * 4, 4);
  const int32_t zero = w.bits == 4 && w.groups == 0 ? tail[SCALE_BYTES + lane] : 128;
  alignas(64) static thread_local uint8_t slab[CHANNEL_SLAB * STEPS * STEP_BYTES];
  for (int64_t from = 0; from < runs; from += CHANNEL_SLAB) {
    const uint8_t *codes = channel_codes(w, stream, from, std::min(CHANNEL_SLAB, runs - from), slab);
    for (int64_t i = from * RUN; i < std::min((from + CHANNEL_SLAB) * RUN, w.inputs); i++) {
      const int64_t step = (i - from * RUN) / 4;
      out[i] = float(codes[step * STEP_BYTES + panel * 64 + lane % PANEL * 4 + i % 4] - zero) * scale;
    }
  }
}

} // namespace int8
