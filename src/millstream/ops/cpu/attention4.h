// Paged attention over pages of 4 bits: what attention8.h does, with codes that are unpacked in registers.
//
// A value is scale * code + zero, with both of each token and kv head, for its key and for its value apart. A block holds
// for each kv head: the codes of keys, (dim / 8, block_size, 4) bytes, of eight dimensions the first four in the low
// halves of four bytes; the codes of values, (block_size / 4, dim / 32, 16, 4) bytes, of 32 dimensions the first 16 in the
// low halves; and in half precision the scales of keys, their zeros, and the same of values, (4, block_size). dim is
// rounded up to 32. No two tokens share a byte, so that threads may write neighbours at once.
//
// With scale and zero outside of the sums, q . k = scale * dot(q, code) + zero * sum(q), and in the same way the sum over
// keys of p * v = dot(p * scale, code) + sum(p * zero), which is the same in every dimension.
#pragma once

#include "attention8.h"

namespace attention {

inline int64_t padded4(int64_t dim) { return (dim + 31) / 32 * 32; }
inline int64_t head_bytes4(int64_t dim, int64_t block_size) { return block_size * (padded4(dim) + 8); }

// Rounds to nearest, ties to even. What half precision cannot hold becomes the largest that it can.
inline uint16_t to_half(float x) {
  x = std::min(std::max(x, -65504.0f), 65504.0f);
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, 0));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits < 0x38800000) { // below 2^-14: a multiple of 2^-24
    float size;
    std::memcpy(&size, &bits, 4);
    return uint16_t(sign | uint32_t(std::nearbyint(size * 0x1p24f)));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return uint16_t(sign | (bits - 0x38000000) >> 13);
#endif
}

// One token's key or value of one head becomes codes 0 to 15, a byte each; what is beyond `dim` becomes 0.
inline void quantize4(const float *x, int64_t dim, uint8_t *to, uint16_t *scale, uint16_t *zero) {
  float low = x[0], high = x[0];
  int64_t d = 0;
  if (dim >= LANES) {
    Vec least = Width16::load(x), most = least;
    for (; d + LANES <= dim; d += LANES) {
      const Vec v = Width16::load(x + d);
      least = v < least ? v : least, most = v > most ? v : most;
    }
    low = fold(least, [](Vec a, Vec b) { return a < b ? a : b; }), high = fold_max(most);
  }
  for (; d < dim; d++) low = std::min(low, x[d]), high = std::max(high, x[d]);
  *zero = to_half(low);
  const float from = int8::half_to_float(*zero);
  // What is stored is what codes are chosen for: a zero and a scale that were rounded cost half a step, no more.
  *scale = to_half(std::max(high - from, 0.0f) / 15.0f);
  const float step = int8::half_to_float(*scale), inverse = step > 0.0f ? 1.0f / step : 0.0f;
  for (d = 0; d < padded4(dim); d += LANES) {
    Vec v = splat(from);
    if (d + LANES <= dim) v = Width16::load(x + d);
    else if (d < dim) std::memcpy(&v, x + d, size_t(dim - d) * sizeof(float));
    v = (v - from) * inverse;
    v = v > 0.0f ? v : Vec{};
    v = v < 15.0f ? v : splat(15.0f);
    put_bytes(to + d, (int8::Ints)(v + 12582912.0f) - int8::MAGIC);
  }
}

// `head` is where the block's part of one kv head begins.
inline void write4(uint8_t *head, int64_t dim, int64_t block_size, int64_t offset, const float *k, const float *v) {
  const int64_t width = padded4(dim);
  uint8_t codes[1024];
  uint16_t *scales = reinterpret_cast<uint16_t *>(head + block_size * width) + offset;
  quantize4(k, dim, codes, scales, scales + block_size);
  for (int64_t d = 0; d < width; d += 8)
    for (int64_t i = 0; i < 4; i++)
      head[(d / 8 * block_size + offset) * 4 + i] = uint8_t(codes[d + i] | codes[d + 4 + i] << 4);
  quantize4(v, dim, codes, scales + 2 * block_size, scales + 3 * block_size);
  uint8_t *values = head + block_size * width / 2 + offset / 4 * width * 2 + offset % 4;
  for (int64_t d = 0; d < width; d += 32)
    for (int64_t i = 0; i < 16; i++) values[(d / 2 + i) * 4] = uint8_t(codes[d + i] | codes[d + 16 + i] << 4);
}

struct Int4 : Shared<Int4> {
  using Shared<Int4>::Shared;
  static constexpr int64_t NEAR = Int8::NEAR, FAR = Int8::FAR, ASIDE = Int8::ASIDE; // not measured apart

  // Queries of an item as they lie in its scratch: high bytes, low bytes, then the scale of each and its sum.
  struct Queries {
    int8_t *high, *low;
    float *scale, *sum;
  };

  Queries queries(float *q) const {
    int8_t *bytes = reinterpret_cast<int8_t *>(q);
    float *scale = reinterpret_cast<float *>(bytes + 2 * TOKENS_MAX * width);
    return {bytes, bytes + TOKENS_MAX * width, scale, scale + TOKENS_MAX};
  }

  using Ahead = Int8::Ahead;

  // A group of LANES keys that follow each other in one block: where their codes, scales and zeros are.
  struct Keys {
    const uint8_t *k, *v;
    const uint16_t *k_scale, *v_scale; // the zeros lie a block's length behind
  };

  const uint8_t *head_of(int32_t block, int64_t kv_head) const {
    return static_cast<const uint8_t *>(a.k) +
           (int64_t(block) * a.kv_heads + kv_head) * head_bytes4(a.dim, a.block_size);
  }

  // The tile that begins at `key`, where it is one run of memory.
  Ahead tile(const int32_t *blocks, int64_t kv_head, int64_t key) const {
    const int32_t block = blocks[key / a.block_size];
    if (block < 0 || a.block_size != TILE) return {};
    return {reinterpret_cast<const char *>(head_of(block, kv_head)), head_bytes4(a.dim, a.block_size) / 64};
  }

  // The first tile of an item.
  Ahead first_tile(const Item &item) const { return tile(blocks_of(item.sequence), item.kv_head, item.first / TILE * TILE); }

  void pack(const Item &item, float *q) const {
    const Queries to = queries(q);
    for (int64_t r = 0; r < item.rows; r++) {
      const float *from = query(item, r);
      const float most = largest(from, a.dim);
      // 127 * 256 + 127 is the most that two signed bytes hold.
      const float inverse = most > 0.0f ? 32639.0f / most : 0.0f;
      int8::Ints sum = {};
      for (int64_t d = 0; d < width; d += LANES) {
        const int8::Ints x = whole(from, d, a.dim, inverse), high = (x + 128) >> 8;
        put_bytes(reinterpret_cast<uint8_t *>(to.high + r * width + d), high);
        put_bytes(reinterpret_cast<uint8_t *>(to.low + r * width + d), x - high * 256);
        sum += x;
      }
      int32_t all = 0;
      for (int i = 0; i < LANES; i++) all += sum[i];
      to.scale[r] = most / 32639.0f * a.scale;
      to.sum[r] = float(all);
    }
  }

  static inline int8::Ints low_half(int8::Ints bytes) { return bytes & 0x0F0F0F0F; }
  static inline int8::Ints high_half(int8::Ints bytes) { return (bytes >> 4) & 0x0F0F0F0F; }

  static inline int8::Ints four(const void *bytes) {
    int32_t word;
    std::memcpy(&word, bytes, 4);
    return int8::same(word);
  }

  // Scores of R rows over G groups of LANES keys that follow each other in one block.
  template <int G, int R>
  inline void scores(const Queries &q, int64_t row, const Keys &at, float *s, Ahead &ahead) const {
    int8::Ints high[R][G] = {}, low[R][G] = {};
    const int8_t *q_high = q.high + row * width, *q_low = q.low + row * width;
    const uint8_t *codes = at.k;
    for (int64_t d = 0; d < width; d += 8, codes += a.block_size * 4) {
      ahead.some(G);
      int8::Ints both[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) both[g] = *reinterpret_cast<const int8::IntsAny *>(codes + g * 64);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        int8::Ints k[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) k[g] = half ? high_half(both[g]) : low_half(both[g]);
#pragma GCC unroll 3
        for (int r = 0; r < R; r++) {
          const int8::Ints h = four(q_high + r * width + d + half * 4), l = four(q_low + r * width + d + half * 4);
#pragma GCC unroll 4
          for (int g = 0; g < G; g++) {
            high[r][g] = int8::dot(high[r][g], k[g], h);
            low[r][g] = int8::dot(low[r][g], k[g], l);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const int8::Vec scale = int8::halves(at.k_scale + g * LANES);
      const int8::Vec zero = int8::halves(at.k_scale + a.block_size + g * LANES);
#pragma GCC unroll 3
      for (int r = 0; r < R; r++) {
        const int8::Vec total = __builtin_convertvector(high[r][g] * 256 + low[r][g], int8::Vec);
        const int8::Vec x = int8::fma(total, scale, int8::splat(q.sum[row + r]) * zero);
        int8::store(s + r * TILE + g * LANES, x * q.scale[row + r]);
      }
    }
  }

  // Weights of one row over a tile, times the scales of the values, to 16 bits: high bytes and low bytes. Returns what
  // their unit stands for; `all` becomes what the zeros add.
  inline float weigh(const float *s, const Keys *keys, int first, int last, uint8_t *high, uint8_t *low,
                     float &all) const {
    float w[TILE];
    Vec most = {};
    int8::Vec sum = {};
    for (int g = first; g < last; g++) {
      const int8::Vec p = int8::load(s + g * LANES);
      // What nobody sees may have any scale.
      const int8::Vec x = p > 0.0f ? p * int8::halves(keys[g].v_scale) : int8::Vec{};
      sum = int8::fma(p, p > 0.0f ? int8::halves(keys[g].v_scale + a.block_size) : int8::Vec{}, sum);
      int8::store(w + g * LANES, x);
      most = (Vec)x > most ? (Vec)x : most;
    }
    all = fold_sum((Vec)sum);
    const float top = fold_max(most);
    const float inverse = top > 0.0f ? 65535.0f / top : 0.0f;
    for (int g = first; g < last; g++) {
      const int8::Ints x = __builtin_convertvector(Width16::load(w + g * LANES) * inverse + 0.5f, int8::Ints);
      put_bytes(high + g * LANES, x >> 8);
      put_bytes(low + g * LANES, x);
    }
    return top / 65535.0f;
  }

  // acc[r] = acc[r] * fade[r] + what the values of a tile add, over G pairs of 16 dimensions; HALVES 1: the first of each
  // pair alone.
  template <int G, int HALVES, int R>
  inline void values(const Keys *keys, int first, int last, const uint8_t (*high)[TILE], const uint8_t (*low)[TILE],
                     const float *by, const float *fade, const float *all, int64_t d, float *acc, Ahead &ahead) const {
    const int64_t quad_bytes = padded4(a.dim) * 2;
    int8::Ints h[R][G * HALVES] = {}, l[R][G * HALVES] = {};
    for (int g = first; g < last; g++) {
      const uint8_t *at = keys[g].v + d * 2;
      for (int quad = 0; quad < LANES / 4; quad++, at += quad_bytes) {
        ahead.some(G * HALVES);
        int8::Ints x[G * HALVES];
#pragma GCC unroll 2
        for (int i = 0; i < G; i++) {
          const int8::Ints both = *reinterpret_cast<const int8::IntsAny *>(at + i * 64);
          x[i * HALVES] = low_half(both);
          if (HALVES == 2) x[i * HALVES + HALVES - 1] = high_half(both);
        }
#pragma GCC unroll 3
        for (int r = 0; r < R; r++) {
          const int8::Ints p_high = four(high[r] + g * LANES + quad * 4), p_low = four(low[r] + g * LANES + quad * 4);
#pragma GCC unroll 4
          for (int i = 0; i < G * HALVES; i++) {
            h[r][i] = int8::dot(h[r][i], p_high, x[i]);
            l[r][i] = int8::dot(l[r][i], p_low, x[i]);
          }
        }
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < G * HALVES; i++) {
        float *to = acc + r * width + d + i * 16;
        const int8::Vec total = __builtin_convertvector(h[r][i] * 256 + l[r][i], int8::Vec);
        const int8::Vec kept = int8::fma(int8::load(to), int8::splat(fade[r]), int8::splat(all[r]));
        int8::store(to, int8::fma(total, int8::splat(by[r]), kept));
      }
  }

  template <int R>
  void batch(const Queries &q, int64_t row, const Keys *keys, int64_t key, const int64_t *low_key,
             const int64_t *high_key, float *s, const State &state, Ahead &ahead) const {
    int64_t least = low_key[0], most = high_key[0];
    for (int r = 1; r < R; r++) least = std::min(least, low_key[r]), most = std::max(most, high_key[r]);
    const int64_t from = std::max(least, key) - key, to = std::min<int64_t>(most, key + TILE) - key;
    if (from >= to) return;
    const int first = int(from / LANES), last = int((to + LANES - 1) / LANES);
    if (WIDE == 4 && first == 0 && last == GROUPS && a.block_size % TILE == 0) scores<4, R>(q, row, keys[0], s, ahead);
    else
      for (int g = first; g < last; g++) scores<1, R>(q, row, keys[g], s + g * LANES, ahead);
    float fade[R], by[R], all[R];
    uint8_t high[R][TILE], low[R][TILE];
    for (int r = 0; r < R; r++) {
      fade[r] = soften(s + r * TILE, key, low_key[r], high_key[r], first, last, state.top[r], state.sum[r]);
      by[r] = weigh(s + r * TILE, keys, first, last, high[r], low[r], all[r]);
    }
    int64_t d = 0;
    if constexpr (WIDE == 4)
      for (; d + 64 <= width; d += 64) values<2, 2, R>(keys, first, last, high, low, by, fade, all, d, state.acc, ahead);
    for (; d + 32 <= width; d += 32) values<1, 2, R>(keys, first, last, high, low, by, fade, all, d, state.acc, ahead);
    if (d < width) values<1, 1, R>(keys, first, last, high, low, by, fade, all, d, state.acc, ahead);
  }

  // `then` is what this thread is likely to take next, or null.
  void walk(const Item &item, const Reach &reach, float *scratch, float *s, const State &state, const Item *then) const {
    const Queries q = queries(scratch);
    const int64_t stored = padded4(a.dim);
    const int32_t *blocks = reach.blocks;
    const int64_t *low = reach.low, *high = reach.high;
    for (int64_t key = reach.from / TILE * TILE; key < reach.to; key += TILE) {
      Keys keys[GROUPS] = {};
      for (int g = 0; g < GROUPS; g++) {
        const int64_t at = key + g * LANES, offset = at % a.block_size;
        // A group of keys that nobody sees may have no block; batch() does not touch it.
        if (at + LANES <= low[0] || at >= reach.to) continue;
        const uint8_t *head = head_of(blocks[at / a.block_size], item.kv_head);
        const uint16_t *scales = reinterpret_cast<const uint16_t *>(head + a.block_size * stored) + offset;
        keys[g] = {head + offset * 4, head + a.block_size * stored / 2 + offset / 4 * stored * 2, scales,
                   scales + 2 * a.block_size};
      }
      Ahead ahead = key + TILE < reach.to ? tile(blocks, item.kv_head, key + TILE) : Ahead{};
      if (key + TILE >= reach.to && then) ahead = first_tile(*then);
      for (int64_t r = 0; r < item.rows; r += 3) {
        const State rows{state.top + r, state.sum + r, state.acc + r * width};
        switch (std::min<int64_t>(3, item.rows - r)) {
        case 1: batch<1>(q, r, keys, key, low + r, high + r, s, rows, ahead); break;
        case 2: batch<2>(q, r, keys, key, low + r, high + r, s, rows, ahead); break;
        default: batch<3>(q, r, keys, key, low + r, high + r, s, rows, ahead); break;
        }
      }
      ahead.some(TILE);
    }
  }
};

} // namespace attention
