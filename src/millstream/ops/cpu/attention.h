// Paged attention over pages that are read in place: what all kinds of pages share, and plain pages.
//
// Pages of one layer: K (block, kv head, dim, block_size), V (block, kv head, block_size, dim), float32 or bfloat16.
// Arithmetic is float32. For one query token and head the order of every operation is fixed by the absolute positions
// of its keys, never by the batch, the chunk it came in or the number of threads:
//   - a score is a chain of multiply-adds over the head dimension;
//   - keys are walked in tiles of TILE at positions that are multiples of TILE, each merged into an online softmax;
//   - SEGMENT keys make one state, begun afresh; the states of segments are merged from the first to the last.
// Segments let several threads share one long row. Everything masked contributes an exact zero and a factor of exactly
// one, so it makes no difference whether a tile was skipped or walked for the sake of a neighbouring query.
#pragma once

#include <atomic>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace attention {

constexpr int LANES = 16;
constexpr int TILE = 64;
constexpr int GROUPS = TILE / LANES;
constexpr int SEGMENT = 512;
constexpr int TOKENS_MAX = 32;  // query rows of one work item: enough to reuse a tile of K and V out of the first cache
constexpr int BATCH = 6;        // query rows in registers at once
constexpr float EMPTY = -1e30f; // stands for "no key seen": finite, so that differences stay numbers
#if defined(__AVX512F__)
constexpr int WIDE = 4; // vectors of LANES in registers at once: 4 x 6 accumulators of 32 registers
#else
constexpr int WIDE = 1;
#endif

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef float VecAny __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t HalfAny __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(64)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec8Any __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t Half8Any __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t WordVec8 __attribute__((vector_size(32)));

struct Width16 {
  typedef Vec Value;
  static constexpr int lanes = 16;
  static inline Vec load(const float *p) { return *reinterpret_cast<const VecAny *>(p); }
  static inline Vec load(const uint16_t *p) {
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const HalfAny *>(p), WordVec) << 16);
  }
  static inline void store(float *p, Vec v) { *reinterpret_cast<VecAny *>(p) = v; }
};

struct Width8 {
  typedef Vec8 Value;
  static constexpr int lanes = 8;
  static inline Vec8 load(const float *p) { return *reinterpret_cast<const Vec8Any *>(p); }
  static inline Vec8 load(const uint16_t *p) {
    return (Vec8)(__builtin_convertvector(*reinterpret_cast<const Half8Any *>(p), WordVec8) << 16);
  }
  static inline void store(float *p, Vec8 v) { *reinterpret_cast<Vec8Any *>(p) = v; }
};

inline Vec splat(float x) { return x - Vec{}; }

// exp(x) for x <= 88, relative error below 2e-7, exactly 1 at 0. Below -87 it stays at about 1e-38: every caller
// multiplies such values with zero or adds them to 1.
inline Vec exp_of(Vec x) {
  const Vec low = splat(-87.0f);
  x = x < low ? low : x;
  const Vec magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  Vec r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  Vec g = splat(0.0013941124f);
  g = g * r + 0.0083631813f;
  g = g * r + 0.041666375f;
  g = g * r + 0.16666577f;
  g = g * r + 0.5f;
  const Vec p = (g * r) * r + r + 1.0f;
  return (Vec)((IntVec)p + (((IntVec)shifted - (IntVec)magic) << 23));
}

inline float exp_of(float x) { return exp_of(splat(x))[0]; }

// Folds sixteen lanes in a fixed order: halves upon each other.
template <class F> inline float fold(Vec v, F f) {
  v = f(v, __builtin_shuffle(v, IntVec{8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15}));
  v = f(v, __builtin_shuffle(v, IntVec{4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7}));
  v = f(v, __builtin_shuffle(v, IntVec{2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3}));
  v = f(v, __builtin_shuffle(v, IntVec{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}));
  return v[0];
}

inline float fold_sum(Vec v) {
  return fold(v, [](Vec x, Vec y) { return x + y; });
}
inline float fold_max(Vec v) {
  return fold(v, [](Vec x, Vec y) { return x > y ? x : y; });
}

inline Vec tanh_of(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec z = x * x;
  Vec g = splat(-0.0061131885f);
  g = g * z + 0.021010079f;
  g = g * z - 0.053854069f;
  g = g * z + 0.13332795f;
  g = g * z - 0.33333329f;
  const Vec small = (g * z) * x + x;
  const Vec bound = size > 20.0f ? splat(20.0f) : size;
  const Vec large = 1.0f - 2.0f / (exp_of(bound + bound) + 1.0f);
  return size < 0.625f ? small : (x < 0.0f ? -large : large);
}

// s[r][key] = q[r] . K[key] for R rows and G vectors of keys. k[g] points at dimension 0 of its first key.
template <int G, int R, class E>
inline void score_block(const float *q, int64_t q_stride, int64_t dim, const E *const *k, int64_t k_stride, float *s) {
  Vec acc[R][G] = {};
  const E *at[G];
  for (int g = 0; g < G; g++) at[g] = k[g];
  for (int64_t d = 0; d < dim; d++) {
    Vec row[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) row[g] = Width16::load(at[g]), at[g] += k_stride;
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const float b = q[r * q_stride + d];
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) acc[r][g] += b * row[g];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) Width16::store(s + r * TILE + g * LANES, acc[r][g]);
}

template <int R, class E>
inline void score_rows(const float *q, int64_t q_stride, int64_t dim, const E *const *k, int64_t k_stride, int first,
                       int last, float *s) {
  int g = first;
  if constexpr (WIDE == 4) {
    switch (last - first) {
    case 4: score_block<4, R>(q, q_stride, dim, k + g, k_stride, s + g * LANES); return;
    case 3: score_block<3, R>(q, q_stride, dim, k + g, k_stride, s + g * LANES); return;
    case 2: score_block<2, R>(q, q_stride, dim, k + g, k_stride, s + g * LANES); return;
    default: break;
    }
  }
  for (; g < last; g++) score_block<1, R>(q, q_stride, dim, k + g, k_stride, s + g * LANES);
}

// acc[r] = acc[r] * fade[r] + sum over keys of p[r][key] * V[key], for R rows and G vectors of the head dimension.
template <class W, int G, int R, class E>
inline void value_block(const float *p, const float *fade, const E *const *v, int64_t dim, int first, int last,
                        float *acc, int64_t acc_stride) {
  typename W::Value sum[R][G];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) sum[r][g] = W::load(acc + r * acc_stride + g * W::lanes) * fade[r];
  for (int key = first; key < last;) {
    const int stop = std::min(last, (key / LANES + 1) * LANES);
    const E *at = v[key / LANES] + (key % LANES) * dim;
    for (; key < stop; key++, at += dim) {
      typename W::Value row[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) row[g] = W::load(at + g * W::lanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const float b = p[r * TILE + key];
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) sum[r][g] += b * row[g];
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) W::store(acc + r * acc_stride + g * W::lanes, sum[r][g]);
}

template <int R, class E>
inline void value_rows(const float *p, const float *fade, const E *const *v, int64_t dim, int first, int last,
                       float *acc, int64_t acc_stride) {
  const E *at[GROUPS];
  for (int g = 0; g < GROUPS; g++) at[g] = v[g];
  int64_t d = 0;
  const auto step = [&](int64_t n) {
    d += n;
    for (int g = first / LANES; g * LANES < last; g++) at[g] += n;
  };
  if constexpr (WIDE == 4)
    while (dim - d >= 64) value_block<Width16, 4, R>(p, fade, at, dim, first, last, acc + d, acc_stride), step(64);
  while (dim - d >= 16) value_block<Width16, 1, R>(p, fade, at, dim, first, last, acc + d, acc_stride), step(16);
  if (dim - d >= 8) value_block<Width8, 1, R>(p, fade, at, dim, first, last, acc + d, acc_stride);
}

} // namespace attention

extern "C" {

// Mirrored field by field in cpu_paged.py. Strides are in elements.
struct MillstreamAttention {
  const float *q;
  float *out;
  float *lse;
  const void *k;
  const void *v;
  const int32_t *query_start;
  const int32_t *seq_lens;
  const int32_t *block_tables;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned); // GOMP_parallel of the process, or null
  int64_t q_token_stride, q_head_stride;
  int64_t out_token_stride, out_head_stride; // lse is (T, heads), contiguous
  int64_t num_rows, table_stride;
  int64_t num_blocks, block_size;
  int64_t heads, kv_heads, dim;
  int64_t window; // 0: none
  int64_t num_threads;
  int64_t page_bits; // 32 or 16
  float scale, softcap; // softcap 0: none
};

}

namespace attention {

typedef MillstreamAttention Args;

// The state of `rows` queries over some keys: running maximum, sum of exponentials, weighted sum of values.
struct State {
  float *top, *sum, *acc;
};

// Query rows [begin, begin + rows) of one sequence and kv head, numbered token * ratio + head; segments [from, to).
struct Item {
  int32_t sequence, kv_head;
  int32_t begin, rows;
  int32_t from, to;
  int32_t part; // its place among the partial states, -1: it finishes its rows itself
  int64_t cost;
};

struct Scratch {
  std::unique_ptr<char[]> bytes;
  size_t size = 0;
  float *take(size_t floats) {
    const size_t need = floats * sizeof(float) + 64;
    if (size < need) bytes.reset(new char[need]), size = need;
    const uintptr_t at = reinterpret_cast<uintptr_t>(bytes.get());
    return reinterpret_cast<float *>((at + 63) / 64 * 64);
  }
};

// What is common: who computes which rows over which keys, and how parts become a whole. `Kind` says how the rows of an
// item are made ready (`pack`) and how one segment of keys becomes a state (`segment`).
template <class Kind> struct Shared {
  const Args &a;
  const int64_t ratio, width; // width: head dimension rounded up to whole vectors
  std::vector<Item> items;
  std::vector<Item> split; // rows whose segments are items of their own; `part` is the first of them
  Scratch memory;
  float *parts = nullptr;
  int threads = 1;

  explicit Shared(const Args &args)
      : a(args), ratio(args.heads / args.kv_heads), width((args.dim + LANES - 1) / LANES * LANES) {}

  const Kind &kind() const { return static_cast<const Kind &>(*this); }

  int64_t state_floats() const { return TOKENS_MAX * (width + 2); }

  State state_at(float *p) const { return {p, p + TOKENS_MAX, p + 2 * TOKENS_MAX}; }

  int64_t first_key(int64_t position) const { return a.window > 0 ? std::max<int64_t>(0, position - a.window + 1) : 0; }

  // 0, or -1 when a block that some query must see is not one of the pages.
  int plan() {
    int64_t total = 0;
    int32_t longest = 0;
    for (int64_t s = 0; s < a.num_rows; s++) {
      const int64_t n = a.query_start[s + 1] - a.query_start[s], length = a.seq_lens[s];
      if (n <= 0) continue;
      if (length < n) return -1;
      for (int64_t b = first_key(length - n) / a.block_size; b * a.block_size < length; b++) {
        const int32_t block = b < a.table_stride ? a.block_tables[s * a.table_stride + b] : -1;
        if (block < 0 || block >= a.num_blocks) return -1;
      }
      for (int64_t begin = 0; begin < n * ratio; begin += TOKENS_MAX) {
        const int64_t rows = std::min<int64_t>(TOKENS_MAX, n * ratio - begin);
        const int64_t from = first_key(length - n + begin / ratio);
        const int64_t to = length - n + (begin + rows - 1) / ratio + 1;
        Item item{};
        item.sequence = int32_t(s), item.begin = int32_t(begin), item.rows = int32_t(rows);
        item.from = int32_t(from / SEGMENT), item.to = int32_t((to + SEGMENT - 1) / SEGMENT);
        item.part = -1;
        // Reading a key costs about as much as computing with it for six rows.
        item.cost = (to - from) * (rows + BATCH);
        longest = std::max(longest, item.to - item.from);
        for (int64_t h = 0; h < a.kv_heads; h++) {
          item.kv_head = int32_t(h);
          items.push_back(item);
          total += item.cost;
        }
      }
    }
    threads = total * a.dim < 200000 || !a.parallel ? 1 : int(std::max<int64_t>(1, a.num_threads));
    if (threads == 1) return 0;
    if (int64_t(items.size()) < 4 * threads && longest > 1) {
      std::vector<Item> whole;
      whole.swap(items);
      int32_t num_parts = 0;
      for (const Item &item : whole) {
        if (item.to - item.from < 2) {
          items.push_back(item);
          continue;
        }
        split.push_back(item);
        split.back().part = num_parts;
        for (int32_t segment = item.from; segment < item.to; segment++) {
          Item piece = item;
          piece.from = segment, piece.to = segment + 1, piece.part = num_parts++;
          piece.cost = item.cost / (item.to - item.from);
          items.push_back(piece);
        }
      }
      parts = memory.take(size_t(num_parts) * state_floats());
    }
    std::stable_sort(items.begin(), items.end(), [](const Item &x, const Item &y) { return x.cost > y.cost; });
    return 0;
  }

  void run() {
    std::atomic<int> next{0};
    struct Job {
      const Shared &shared;
      std::atomic<int> &next;
    } job{*this, next};
    if (threads > 1)
      a.parallel([](void *self) { static_cast<Job *>(self)->shared.work(static_cast<Job *>(self)->next); }, &job,
                 unsigned(threads), 0);
    else
      work(next);
    join();
  }

  // Rows whose segments were items of their own become whole. After all of `work`.
  void join() const {
    if (split.empty()) return;
    static thread_local Scratch kept;
    const State total = state_at(kept.take(state_floats()));
    for (const Item &item : split) {
      clear(total, item.rows);
      for (int32_t i = 0; i < item.to - item.from; i++)
        merge(total, state_at(parts + (item.part + i) * state_floats()), item.rows);
      finish(item, total);
    }
  }

  // Any number of threads at once, over one counter.
  void work(std::atomic<int> &next) const {
    static thread_local Scratch kept;
    float *p = kept.take(2 * state_floats() + TOKENS_MAX * (width + TILE));
    const State total = state_at(p), fresh = state_at(p + state_floats());
    float *q = p + 2 * state_floats(), *weights = q + TOKENS_MAX * width;
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < int(items.size());) {
      const Item &item = items[i];
      // What this thread, or its neighbour, is likely to take next.
      const Item *then = size_t(i + threads) < items.size() ? &items[size_t(i + threads)] : nullptr;
      kind().pack(item, q);
      if (item.part >= 0) {
        kind().segment(item, item.from, q, weights, state_at(parts + item.part * state_floats()), then);
        continue;
      }
      kind().segment(item, item.from, q, weights, total, item.to - item.from == 1 ? then : nullptr);
      for (int32_t s = item.from + 1; s < item.to; s++) {
        kind().segment(item, s, q, weights, fresh, s + 1 == item.to ? then : nullptr);
        merge(total, fresh, item.rows);
      }
      finish(item, total);
    }
  }

  void clear(const State &state, int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) state.top[r] = EMPTY, state.sum[r] = 0.0f;
    std::memset(state.acc, 0, size_t(rows * width) * sizeof(float));
  }

  void merge(const State &into, const State &from, int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) {
      const float top = std::max(into.top[r], from.top[r]);
      const float mine = exp_of(into.top[r] - top), theirs = exp_of(from.top[r] - top);
      into.top[r] = top;
      into.sum[r] = into.sum[r] * mine + from.sum[r] * theirs;
      for (int64_t d = 0; d < width; d += LANES) {
        float *at = into.acc + r * width + d;
        Width16::store(at, Width16::load(at) * mine + Width16::load(from.acc + r * width + d) * theirs);
      }
    }
  }

  void finish(const Item &item, const State &state) const {
    for (int64_t r = 0; r < item.rows; r++) {
      const int64_t token = a.query_start[item.sequence] + (item.begin + r) / ratio;
      const int64_t head = item.kv_head * ratio + (item.begin + r) % ratio;
      float *out = a.out + token * a.out_token_stride + head * a.out_head_stride;
      const float share = 1.0f / state.sum[r];
      for (int64_t d = 0; d < a.dim; d++) out[d] = state.acc[r * width + d] * share;
      a.lse[token * a.heads + head] = state.top[r] + std::log(state.sum[r]);
    }
  }

  // Scores of one tile become weights; returns the factor by which what was summed before fades.
  inline float soften(float *s, int64_t key, int64_t low, int64_t high, int first, int last, float &top,
                      float &sum) const {
    static const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int32_t from = int32_t(std::max<int64_t>(low - key, 0)), to = int32_t(std::min<int64_t>(high - key, TILE));
    const bool masked = from > first * LANES || to < last * LANES;
    Vec most = splat(EMPTY);
    for (int g = first; g < last; g++) {
      Vec x = Width16::load(s + g * LANES);
      if (a.softcap > 0.0f) x = tanh_of(x / a.softcap) * a.softcap;
      if (masked) {
        const IntVec at = lane + g * LANES;
        x = ((at >= from) & (at < to)) ? x : splat(EMPTY);
      }
      Width16::store(s + g * LANES, x);
      most = x > most ? x : most;
    }
    const float now = std::max(top, fold_max(most));
    Vec all = {};
    for (int g = first; g < last; g++) {
      Vec p = exp_of(Width16::load(s + g * LANES) - now);
      if (masked) {
        const IntVec at = lane + g * LANES;
        p = ((at >= from) & (at < to)) ? p : splat(0.0f);
      }
      Width16::store(s + g * LANES, p);
      all += p;
    }
    const float added = fold_sum(all);
    const float fade = exp_of(top - now);
    top = now;
    sum = sum * fade + added;
    return fade;
  }
};

// Pages in float32 or bfloat16: K (block, kv head, dim, block_size), V (block, kv head, block_size, dim).
template <class E> struct Plain : Shared<Plain<E>> {
  using Base = Shared<Plain<E>>;
  using Base::a, Base::clear, Base::first_key, Base::ratio, Base::soften, Base::width;
  using Base::Base;

  void pack(const Item &item, float *q) const {
    for (int64_t r = 0; r < item.rows; r++) {
      const int64_t token = a.query_start[item.sequence] + (item.begin + r) / ratio;
      const int64_t head = item.kv_head * ratio + (item.begin + r) % ratio;
      const float *from = a.q + token * a.q_token_stride + head * a.q_head_stride;
      for (int64_t d = 0; d < a.dim; d++) q[r * width + d] = from[d] * a.scale;
    }
  }

  template <int R>
  void batch(const float *q, const E *const *k, const E *const *v, int64_t key, const int64_t *low,
             const int64_t *high, float *s, const State &state) const {
    int64_t least = low[0], most = high[0];
    for (int r = 1; r < R; r++) least = std::min(least, low[r]), most = std::max(most, high[r]);
    const int64_t from = std::max(least, key) - key, to = std::min<int64_t>(most, key + TILE) - key;
    if (from >= to) return;
    const int first = int(from / LANES), last = int((to + LANES - 1) / LANES);
    score_rows<R>(q, width, a.dim, k, a.block_size, first, last, s);
    float fade[R];
    for (int r = 0; r < R; r++) fade[r] = soften(s + r * TILE, key, low[r], high[r], first, last, state.top[r], state.sum[r]);
    value_rows<R>(s, fade, v, a.dim, int(from), int(to), state.acc, width);
  }

  // Asks for the keys and values of a tile ahead of their use. Blocks lie apart, and the processor's own prefetching
  // begins anew at each.
  __attribute__((always_inline)) inline void fetch(const int32_t *blocks, int64_t kv_head, int64_t from, int64_t to) const {
    const int64_t head_size = a.block_size * a.dim, line = 64 / int64_t(sizeof(E));
    for (int64_t at = from; at < to;) {
      const int64_t offset = at % a.block_size, n = std::min(to - at, a.block_size - offset);
      const int64_t head = (int64_t(blocks[at / a.block_size]) * a.kv_heads + kv_head) * head_size;
      const E *k = static_cast<const E *>(a.k) + head + offset, *v = static_cast<const E *>(a.v) + head + offset * a.dim;
      for (int64_t d = 0; d < a.dim; d++, k += a.block_size)
        for (int64_t i = 0; i < n; i += line) __builtin_prefetch(k + i, 0, 2);
      for (int64_t i = 0; i < n * a.dim; i += line) __builtin_prefetch(v + i, 0, 2);
      at += n;
    }
  }

  void segment(const Item &item, int64_t number, const float *q, float *s, const State &state, const Item *) const {
    clear(state, item.rows);
    const int64_t length = a.seq_lens[item.sequence];
    const int64_t start = length - (a.query_start[item.sequence + 1] - a.query_start[item.sequence]);
    const int32_t *blocks = a.block_tables + item.sequence * a.table_stride;
    const int64_t head_size = a.block_size * a.dim;
    int64_t low[TOKENS_MAX], high[TOKENS_MAX];
    for (int64_t r = 0; r < item.rows; r++) {
      const int64_t position = start + (item.begin + r) / ratio;
      low[r] = first_key(position), high[r] = position + 1;
    }
    const int64_t seg_from = std::max(number * SEGMENT, low[0]);
    const int64_t seg_to = std::min((number + 1) * SEGMENT, high[item.rows - 1]);
    for (int64_t key = seg_from / TILE * TILE; key < seg_to; key += TILE) {
      const E *k[GROUPS] = {}, *v[GROUPS] = {};
      for (int g = 0; g < GROUPS; g++) {
        const int64_t at = key + g * LANES;
        // A group of keys that nobody sees may have no block; batch() does not touch it.
        if (at + LANES <= low[0] || at >= seg_to) continue;
        const int64_t head = int64_t(blocks[at / a.block_size]) * a.kv_heads + item.kv_head, offset = at % a.block_size;
        k[g] = static_cast<const E *>(a.k) + head * head_size + offset;
        v[g] = static_cast<const E *>(a.v) + head * head_size + offset * a.dim;
      }
      if (key + TILE < seg_to) fetch(blocks, item.kv_head, key + TILE, std::min(seg_to, key + 2 * TILE));
      for (int64_t r = 0; r < item.rows; r += BATCH) {
        const State rows{state.top + r, state.sum + r, state.acc + r * width};
        const float *queries = q + r * width;
        switch (std::min<int64_t>(BATCH, item.rows - r)) {
        case 1: batch<1>(queries, k, v, key, low + r, high + r, s, rows); break;
        case 2: batch<2>(queries, k, v, key, low + r, high + r, s, rows); break;
        case 3: batch<3>(queries, k, v, key, low + r, high + r, s, rows); break;
        case 4: batch<4>(queries, k, v, key, low + r, high + r, s, rows); break;
        case 5: batch<5>(queries, k, v, key, low + r, high + r, s, rows); break;
        default: batch<6>(queries, k, v, key, low + r, high + r, s, rows); break;
        }
      }
    }
  }
};

inline void keep(float *to, float x) { *to = x; }

// Rounds to nearest, ties to even, as torch does; a NaN stays one.
inline void keep(uint16_t *to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *to = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

} // namespace attention
