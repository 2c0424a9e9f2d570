// Paged attention over pages of 8 bits, all of it in integers but the softmax.
//
// A block holds for each kv head: keys as unsigned bytes around 128, (dim / 4, block_size, 4); values as signed bytes,
// (block_size / 4, dim, 4); a scale for the key and one for the value of every token, float32 (2, block_size). dim is
// rounded up to 16. Queries and softmax weights have 16 bits here, as two bytes each, so what is lost is lost where keys
// and values are stored. Dot products are exact; attention.h says how tiles and segments become a result.
#pragma once

#include <type_traits>

#include "attention.h"
#include "int8.h"

namespace attention {

inline int64_t padded8(int64_t dim) { return (dim + 15) / 16 * 16; }
inline int64_t head_bytes8(int64_t dim, int64_t block_size) { return block_size * (2 * padded8(dim) + 8); }

typedef uint8_t Bytes __attribute__((vector_size(16)));

// The largest absolute value of a head.
inline float largest(const float *x, int64_t dim) {
  Vec most = {};
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    const Vec v = Width16::load(x + d), size = v < 0.0f ? -v : v;
    most = size > most ? size : most;
  }
  float top = fold_max(most);
  for (; d < dim; d++) top = std::max(top, std::fabs(x[d]));
  return top;
}

// Sixteen values of a head, zeros beyond its end, as whole numbers of steps of 1 / inverse, of fewer than 2^22.
inline int8::Ints whole(const float *x, int64_t d, int64_t dim, float inverse) {
  Vec v = {};
  if (d + LANES <= dim) v = Width16::load(x + d);
  else std::memcpy(&v, x + d, size_t(dim - d) * sizeof(float));
  return (int8::Ints)(v * inverse + 12582912.0f) - int8::MAGIC;
}

inline void put_bytes(uint8_t *to, int8::Ints x) {
#if defined(__AVX512F__)
  const Bytes bytes = (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#else
  const Bytes bytes = __builtin_convertvector(x & 255, Bytes);
#endif
  std::memcpy(to, &bytes, sizeof bytes);
}

// One token's key or value of one head becomes bytes around `centre`; returns its scale.
inline float quantize8(const float *x, int64_t dim, int32_t centre, uint8_t *to) {
  const float most = largest(x, dim), inverse = most > 0.0f ? 127.0f / most : 0.0f;
  for (int64_t d = 0; d < dim; d += LANES) put_bytes(to + d, whole(x, d, dim, inverse) + centre);
  return most / 127.0f;
}

// `head` is where the block's part of one kv head begins.
inline void write8(uint8_t *head, int64_t dim, int64_t block_size, int64_t offset, const float *k, const float *v) {
  const int64_t width = padded8(dim);
  uint8_t bytes[1024];
  float *scales = reinterpret_cast<float *>(head + 2 * block_size * width);
  scales[offset] = quantize8(k, dim, 128, bytes);
  for (int64_t d = 0; d < width; d += 4) std::memcpy(head + (d / 4 * block_size + offset) * 4, bytes + d, 4);
  scales[block_size + offset] = quantize8(v, dim, 0, bytes);
  uint8_t *values = head + block_size * width + offset / 4 * width * 4 + offset % 4;
#if defined(__AVX512BW__)
  const __mmask64 lane = 0x1111111111111111ull << (offset % 4);
  for (int64_t d = 0; d < width; d += 16) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes + d)));
    _mm512_mask_storeu_epi8(values - offset % 4 + d * 4, lane, _mm512_slli_epi32(wide, int(offset % 4 * 8)));
  }
#else
  for (int64_t d = 0; d < width; d++) values[d * 4] = bytes[d];
#endif
}

constexpr int HELD = 3; // rows of a batch whose sums are in registers: both bytes of 3 x 4 vectors

struct Int8 : Shared<Int8> {
  using Shared<Int8>::Shared;
  static constexpr int64_t NEAR = 1, FAR = 4, ASIDE = 80; // measured

  // Queries of an item as they lie in its scratch: high bytes, low bytes, then the scale of each and what the centre of
  // the keys adds to its sums.
  struct Queries {
    int8_t *high, *low;
    float *scale;
    int32_t *centre;
  };

  Queries queries(float *q) const {
    int8_t *bytes = reinterpret_cast<int8_t *>(q);
    float *scale = reinterpret_cast<float *>(bytes + 2 * TOKENS_MAX * width);
    return {bytes, bytes + TOKENS_MAX * width, scale, reinterpret_cast<int32_t *>(scale + TOKENS_MAX)};
  }

  // Memory that is needed next, asked for a little at a time: the processor's own prefetching begins anew in each block,
  // and more requests at once than it can keep open would hold up what is computed meanwhile.
  struct Ahead {
    const char *at = nullptr;
    int64_t lines = 0;

    void some(int n) {
      for (; n > 0 && lines > 0; n--, lines--, at += 64) __builtin_prefetch(at, 0, 2);
    }
  };

  // The tile that begins at `key`, where it is one run of memory.
  Ahead tile(const int32_t *blocks, int64_t kv_head, int64_t key) const {
    const int32_t block = blocks[key / a.block_size];
    if (block < 0 || a.block_size != TILE) return {};
    const int64_t head_size = head_bytes8(a.dim, a.block_size);
    return {static_cast<const char *>(a.k) + (int64_t(block) * a.kv_heads + kv_head) * head_size, head_size / 64};
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
      to.centre[r] = -128 * all;
    }
  }

  // Scores of R rows over G groups of LANES keys that follow each other in one block.
  template <int G, int R>
  inline void scores(const Queries &q, int64_t row, const uint8_t *keys, const float *key_scales, float *s,
                     Ahead &ahead) const {
    int8::Ints high[R][G] = {}, low[R][G] = {};
    const int8_t *q_high = q.high + row * width, *q_low = q.low + row * width;
    for (int64_t d = 0; d < width; d += 4, keys += a.block_size * 4) {
      ahead.some(G);
      int8::Ints k[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) k[g] = *reinterpret_cast<const int8::IntsAny *>(keys + g * 64);
#pragma GCC unroll 3
      for (int r = 0; r < R; r++) {
        int32_t h, l;
        std::memcpy(&h, q_high + r * width + d, 4), std::memcpy(&l, q_low + r * width + d, 4);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
          high[r][g] = int8::dot(high[r][g], k[g], int8::same(h));
          low[r][g] = int8::dot(low[r][g], k[g], int8::same(l));
        }
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const int8::Ints total = high[r][g] * 256 + low[r][g] + q.centre[row + r];
        Width16::store(s + r * TILE + g * LANES,
                       __builtin_convertvector(total, Vec) * q.scale[row + r] * Width16::load(key_scales + g * LANES));
      }
  }

  // Weights of one row over a tile, times the scales of the values, to 16 bits: high bytes and low bytes.
  inline float weigh(const float *s, const float *const *value_scales, int first, int last, uint8_t *high,
                     uint8_t *low) const {
    float w[TILE];
    Vec most = {};
    for (int g = first; g < last; g++) {
      const Vec p = Width16::load(s + g * LANES);
      // What nobody sees may have any scale.
      const Vec x = p > 0.0f ? p * Width16::load(value_scales[g]) : Vec{};
      Width16::store(w + g * LANES, x);
      most = x > most ? x : most;
    }
    const float top = fold_max(most);
    const float inverse = top > 0.0f ? 65535.0f / top : 0.0f;
    for (int g = first; g < last; g++) {
      const int8::Ints x = __builtin_convertvector(Width16::load(w + g * LANES) * inverse + 0.5f, int8::Ints);
      put_bytes(high + g * LANES, x >> 8);
      put_bytes(low + g * LANES, x);
    }
    return top / 65535.0f;
  }

  // The same for R rows that see the whole tile, step by step for all of them. `s` is overwritten, `by` has LANES.
  template <int R>
  inline void weigh_whole(float *s, const float *const *value_scales, uint8_t (*high)[TILE], uint8_t (*low)[TILE],
                          float *by) const {
    alignas(64) float top[LANES] = {}, inverse[LANES];
    for (int r = 0; r < R; r++) {
      Vec most = {};
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++) {
        const Vec x = Width16::load(s + r * TILE + g * LANES) * Width16::load(value_scales[g]);
        Width16::store(s + r * TILE + g * LANES, x);
        most = larger(x, most);
      }
      top[r] = fold_max(most);
    }
    const Vec tops = Width16::load(top);
    Width16::store(inverse, tops > 0.0f ? 65535.0f / tops : Vec{});
    Width16::store(by, tops / 65535.0f);
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++) {
        const int8::Ints x =
            __builtin_convertvector(Width16::load(s + r * TILE + g * LANES) * inverse[r] + 0.5f, int8::Ints);
        put_bytes(high[r] + g * LANES, x >> 8);
        put_bytes(low[r] + g * LANES, x);
      }
  }

  // acc[r] = acc[r] * fade[r] + what the values of a tile add, over G groups of 16 dimensions.
  template <int G, int R>
  inline void values(const uint8_t *const *v, int first, int last, const uint8_t (*high)[TILE], const uint8_t (*low)[TILE],
                     const float *by, const float *fade, int64_t d, float *acc, Ahead &ahead) const {
    int8::Ints h[R][G] = {}, l[R][G] = {};
    for (int g = first; g < last; g++) {
      const uint8_t *at = v[g] + d * 4;
      for (int quad = 0; quad < LANES / 4; quad++, at += width * 4) {
        ahead.some(G);
        int8::Ints x[G];
#pragma GCC unroll 4
        for (int i = 0; i < G; i++) x[i] = *reinterpret_cast<const int8::IntsAny *>(at + i * 64);
#pragma GCC unroll 3
        for (int r = 0; r < R; r++) {
          int32_t a_high, a_low;
          std::memcpy(&a_high, high[r] + g * LANES + quad * 4, 4), std::memcpy(&a_low, low[r] + g * LANES + quad * 4, 4);
#pragma GCC unroll 4
          for (int i = 0; i < G; i++) {
            h[r][i] = int8::dot(h[r][i], int8::same(a_high), x[i]);
            l[r][i] = int8::dot(l[r][i], int8::same(a_low), x[i]);
          }
        }
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < G; i++) {
        float *to = acc + r * width + d + i * 16;
        const Vec total = __builtin_convertvector(h[r][i] * 256 + l[r][i], Vec);
        Width16::store(to, (Vec)int8::fma((int8::Vec)total, int8::splat(by[r]),
                                          (int8::Vec)(Width16::load(to) * fade[r])));
      }
  }

  template <int R>
  void batch(const Queries &q, int64_t row, const uint8_t *const *k, const uint8_t *const *v,
             const float *const *key_scales, const float *const *value_scales, int64_t key, const int64_t *low_key,
             const int64_t *high_key, float *s, const State &state, Ahead &ahead) const {
    int64_t least = low_key[0], most = high_key[0];
    for (int r = 1; r < R; r++) least = std::min(least, low_key[r]), most = std::max(most, high_key[r]);
    const int64_t from = std::max(least, key) - key, to = std::min<int64_t>(most, key + TILE) - key;
    if (from >= to) return;
    const int first = int(from / LANES), last = int((to + LANES - 1) / LANES);
    // Of R rows, HELD at a time: what registers hold of their sums.
    constexpr int FIRST = std::min(R, HELD), REST = R - FIRST;
    const auto score = [&](auto rows, int at) {
      constexpr int N = decltype(rows)::value;
      if (WIDE == 4 && first == 0 && last == GROUPS && a.block_size % TILE == 0)
        scores<4, N>(q, row + at, k[0], key_scales[0], s + at * TILE, ahead);
      else
        for (int g = first; g < last; g++) scores<1, N>(q, row + at, k[g], key_scales[g], s + at * TILE + g * LANES, ahead);
    };
    score(std::integral_constant<int, FIRST>{}, 0);
    if constexpr (REST > 0) score(std::integral_constant<int, REST>{}, FIRST);
    alignas(64) float fade[LANES], by[LANES];
    alignas(64) uint8_t high[R][TILE], low[R][TILE];
    if (whole_tile<R>(key, low_key, high_key)) {
      soften_whole<R>(s, state, fade);
      weigh_whole<R>(s, value_scales, high, low, by);
    } else {
      for (int r = 0; r < R; r++) {
        fade[r] = soften(s + r * TILE, key, low_key[r], high_key[r], first, last, state.top[r], state.sum[r]);
        by[r] = weigh(s + r * TILE, value_scales, first, last, high[r], low[r]);
      }
    }
    const auto add = [&](auto rows, int at) {
      constexpr int N = decltype(rows)::value;
      float *acc = state.acc + at * width;
      int64_t d = 0;
      if constexpr (WIDE == 4)
        for (; d + 64 <= width; d += 64)
          values<4, N>(v, first, last, high + at, low + at, by + at, fade + at, d, acc, ahead);
      for (; d < width; d += 16) values<1, N>(v, first, last, high + at, low + at, by + at, fade + at, d, acc, ahead);
    };
    add(std::integral_constant<int, FIRST>{}, 0);
    if constexpr (REST > 0) add(std::integral_constant<int, REST>{}, FIRST);
  }

  // `then` is what this thread is likely to take next, or null.
  void walk(const Item &item, const Reach &reach, float *scratch, float *s, const State &state, const Item *then) const {
    const Queries q = queries(scratch);
    const int64_t head_size = head_bytes8(a.dim, a.block_size);
    const int32_t *blocks = reach.blocks;
    const int64_t *low = reach.low, *high = reach.high;
    for (int64_t key = reach.from / TILE * TILE; key < reach.to; key += TILE) {
      const uint8_t *k[GROUPS] = {}, *v[GROUPS] = {};
      const float *key_scales[GROUPS] = {}, *value_scales[GROUPS] = {};
      for (int g = 0; g < GROUPS; g++) {
        const int64_t at = key + g * LANES, offset = at % a.block_size;
        // A group of keys that nobody sees may have no block; batch() does not touch it.
        if (at + LANES <= low[0] || at >= reach.to) continue;
        const uint8_t *head = static_cast<const uint8_t *>(a.k) +
                              (int64_t(blocks[at / a.block_size]) * a.kv_heads + item.kv_head) * head_size;
        k[g] = head + offset * 4;
        v[g] = head + a.block_size * width + offset * width;
        key_scales[g] = reinterpret_cast<const float *>(head + 2 * a.block_size * width) + offset;
        value_scales[g] = key_scales[g] + a.block_size;
      }
      Ahead ahead = key + TILE < reach.to ? tile(blocks, item.kv_head, key + TILE) : Ahead{};
      if (key + TILE >= reach.to && then) ahead = first_tile(*then);
      for (int64_t r = 0; r < item.rows; r += BATCH) {
        const State rows{state.top + r, state.sum + r, state.acc + r * width};
        switch (std::min<int64_t>(BATCH, item.rows - r)) {
        case 1: batch<1>(q, r, k, v, key_scales, value_scales, key, low + r, high + r, s, rows, ahead); break;
        case 2: batch<2>(q, r, k, v, key_scales, value_scales, key, low + r, high + r, s, rows, ahead); break;
        case 3: batch<3>(q, r, k, v, key_scales, value_scales, key, low + r, high + r, s, rows, ahead); break;
        case 4: batch<4>(q, r, k, v, key_scales, value_scales, key, low + r, high + r, s, rows, ahead); break;
        case 5: batch<5>(q, r, k, v, key_scales, value_scales, key, low + r, high + r, s, rows, ahead); break;
        default: batch<6>(q, r, k, v, key_scales, value_scales, key, low + r, high + r, s, rows, ahead); break;
        }
      }
      ahead.some(TILE);
    }
  }
};

} // namespace attention
