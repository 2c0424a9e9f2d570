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
//
// Rows that hold the same blocks share the walk over them (Hydragen, sections 3.1 to 3.3; RelayAttention, section 3.2):
// a branch is a run of tiles of one segment that several rows see whole. Their queries walk it together, which is a
// product of matrices where each row alone had one of a vector; the state of each query is put aside, and its row goes
// on from there, or merges it in its turn, as if it had come that way alone. So no bit changes. Branches that begin
// where others end are the levels of a tree.
#pragma once

#include <atomic>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace attention {

constexpr int LANES = 16;
constexpr int TILE = 64;
constexpr int GROUPS = TILE / LANES;
constexpr int SEGMENT = 512;
constexpr int TOKENS_MAX = 32;  // query rows of one work item: enough to reuse a tile of K and V out of the first cache
constexpr int BATCH = 6;        // query rows in registers at once
constexpr int BRANCH_ROWS = TOKENS_MAX / BATCH * BATCH; // of one item where rows are many: no batch is left half empty
// One more wave of work takes about as long as so many multiplications of a query and a key, in dimensions.
constexpr int64_t WAVE = 150000;
constexpr int64_t ASIDE_BYTES = 64 << 20; // for states put aside; what is shared beyond is read row by row
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

// What was stored is loaded again behind this. Else the compiler may carry a product over in a register and fuse it with
// the addition that follows, in one place and not in another, and bits would depend on how many rows are together.
inline void settle() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// The larger of two in each lane; `y` where either is not a number.
inline Vec larger(Vec x, Vec y) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)x, (__m512)y); // GCC makes two instructions of the comparison
#else
  return x > y ? x : y;
#endif
}

// exp(x) for x <= 88, relative error below 2e-7, exactly 1 at 0. Below -87 it stays at about 1e-38: every caller
// multiplies such values with zero or adds them to 1.
inline Vec exp_of(Vec x) {
  x = larger(splat(-87.0f), x);
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
  return (Vec)((IntVec)p + ((IntVec)shifted << 23)); // nothing is left of the bits of `magic`
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
  return fold(v, larger);
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
  int64_t levels;    // of shared prefixes that rows walk together where it pays; 0: none, -1: all, and everywhere
  float scale, softcap; // softcap 0: none
};

}

namespace attention {

typedef MillstreamAttention Args;

// The state of `rows` queries over some keys: running maximum, sum of exponentials, weighted sum of values.
struct State {
  float *top, *sum, *acc;
};

// What is done at a time, for some queries of one kv head. Queries of a row are numbered token * ratio + head.
struct Item {
  enum Part : int32_t { ROW, PIECE, TOTAL, BRANCH }; // PIECE: one segment of a row; TOTAL: only merges
  Part part;
  int32_t sequence, kv_head; // of a branch: the first of its rows, whose blocks are those of all
  int32_t begin, rows;       // queries [begin, begin + rows) of the row; of a branch, among `listed`
  int32_t from, to;          // segments
  int32_t first, last;       // the first key; of a branch the keys [first, last)
  int32_t wave;              // begins when all of the waves before it are over
  int64_t cost;
};

// Keys [from, to), whole tiles of one segment, and the rows that walk them together. `wave` counts the branches before
// it in its segment, `depth` those from the first key on that have other rows.
struct Branch {
  int32_t from, to, wave, depth;
  int32_t first, count; // among `members`
  int32_t queries;      // of all its rows, for one kv head
};

// A query of a branch; its state for kv head h is put aside at slot + h * step.
struct Listed {
  int32_t token, head, slot, step;
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

// The keys of one segment that the queries of an item walk, and which of them each sees.
struct Reach {
  const int32_t *blocks;
  int64_t from, to;
  int64_t low[TOKENS_MAX], high[TOKENS_MAX];
};

// What is common: who computes which rows over which keys, and how parts become a whole. `Kind` says how the queries of
// an item are made ready (`pack`) and how they walk over keys (`walk`).
// In the work of one key for one query: `Kind::FAR` is what it costs to read a key that this core had not read before in
// the step, `Kind::NEAR` one that it had, `Kind::ASIDE` to put a query's state aside and to take it up again.
template <class Kind> struct Shared {
  const Args &a;
  const int64_t ratio, width; // width: head dimension rounded up to whole vectors
  std::vector<Item> items;    // wave after wave
  std::vector<int> ends;      // where each wave ends among the items
  std::vector<int64_t> costs; // of each wave
  std::vector<Branch> branches;
  std::vector<int32_t> members;
  std::vector<Listed> listed;
  Scratch &memory;
  float *aside = nullptr;
  // By row and segment: where the states of its queries are put aside, -1 if nowhere; up to which key branches walked.
  std::vector<int32_t> slots, walked;
  std::vector<int32_t> lead; // by row: the segment that branches have merged up to, that one counted
  int64_t num_segments = 0, num_slots = 0;
  int threads = 1;

  // `kept` is memory for what is put aside: nobody else's until the last wave is over.
  Shared(const Args &args, Scratch &kept)
      : a(args), ratio(args.heads / args.kv_heads), width((args.dim + LANES - 1) / LANES * LANES), memory(kept) {}

  const Kind &kind() const { return static_cast<const Kind &>(*this); }

  int64_t state_floats() const { return TOKENS_MAX * (width + 2); }

  State state_at(float *p) const { return {p, p + TOKENS_MAX, p + 2 * TOKENS_MAX}; }

  int64_t first_key(int64_t position) const { return a.window > 0 ? std::max<int64_t>(0, position - a.window + 1) : 0; }

  int64_t new_tokens(int64_t row) const { return a.query_start[row + 1] - a.query_start[row]; }

  const int32_t *blocks_of(int64_t row) const { return a.block_tables + row * a.table_stride; }

  int32_t slot(int64_t row, int64_t segment) const {
    return slots.empty() ? -1 : slots[size_t(row * num_segments + segment)];
  }

  // The first key of a segment that the row walks itself.
  int64_t begins(int64_t row, int64_t segment) const {
    return slots.empty() ? segment * SEGMENT
                         : std::max<int64_t>(segment * SEGMENT, walked[size_t(row * num_segments + segment)]);
  }

  // 0, or -1 when a block that some query must see is not one of the pages.
  int plan() {
    int64_t longest = 0;
    for (int64_t s = 0; s < a.num_rows; s++) {
      const int64_t n = new_tokens(s), length = a.seq_lens[s];
      if (n <= 0) continue;
      if (length < n) return -1;
      for (int64_t b = first_key(length - n) / a.block_size; b * a.block_size < length; b++) {
        const int32_t block = b < a.table_stride ? blocks_of(s)[b] : -1;
        if (block < 0 || block >= a.num_blocks) return -1;
      }
      longest = std::max(longest, length);
    }
    num_segments = (longest + SEGMENT - 1) / SEGMENT;
    const int32_t wave = a.levels != 0 && find_branches() ? list_branches() : 0;
    const size_t num_branched = items.size();
    int32_t most = 0;
    for (int64_t s = 0; s < a.num_rows; s++) {
      const int64_t n = new_tokens(s), length = a.seq_lens[s];
      for (int64_t begin = 0; begin < n * ratio; begin += TOKENS_MAX) {
        const int64_t rows = std::min<int64_t>(TOKENS_MAX, n * ratio - begin);
        const int64_t from = first_key(length - n + begin / ratio);
        const int64_t to = length - n + (begin + rows - 1) / ratio + 1;
        Item item{};
        item.part = Item::ROW, item.sequence = int32_t(s), item.begin = int32_t(begin), item.rows = int32_t(rows);
        item.from = int32_t(from / SEGMENT), item.to = int32_t((to + SEGMENT - 1) / SEGMENT);
        if (!lead.empty()) item.from = std::max(item.from, lead[size_t(s)]);
        item.first = int32_t(std::min(to - 1, std::max(from, begins(s, item.from)))), item.wave = wave;
        int64_t keys = 0;
        int32_t alone = 0; // segments that it walks itself
        for (int32_t i = item.from; i < item.to; i++) {
          const int64_t left = std::min<int64_t>(to, (i + 1) * SEGMENT) - std::max(from, begins(s, i));
          keys += left, alone += left > 0;
        }
        // Reading a key costs about as much as computing with it for six rows.
        item.cost = keys * (rows + BATCH);
        most = std::max(most, alone);
        for (int64_t h = 0; h < a.kv_heads; h++) {
          item.kv_head = int32_t(h);
          items.push_back(item);
        }
      }
    }
    int64_t total = 0;
    for (const Item &item : items) total += item.cost;
    threads = total * a.dim < 200000 || !a.parallel ? 1 : int(std::max<int64_t>(1, a.num_threads));
    if (threads > 1 && most > 1 && int64_t(items.size() - num_branched) < 4 * threads) split(num_branched);
    if (num_slots > 0) aside = memory.take(size_t(num_slots * slot_floats()));
    // One thread keeps to the order that memory has.
    if (threads > 1 || wave > 0)
      std::stable_sort(items.begin(), items.end(), [this](const Item &x, const Item &y) {
        return x.wave != y.wave ? x.wave < y.wave : threads > 1 && x.cost > y.cost;
      });
    for (size_t i = 0; i < items.size(); i++) {
      if (ends.size() <= size_t(items[i].wave)) ends.push_back(int(i)), costs.push_back(0);
      ends.back() = int(i + 1), costs.back() += items[i].cost;
    }
    return 0;
  }

  int waves() const { return int(ends.size()); }

  // How many threads a wave is worth.
  int threads_of(int wave) const { return costs[size_t(wave)] * a.dim < 200000 ? 1 : threads; }

  // Rows of several segments become items by segment, and one that merges them. `first` is the first row's item.
  void split(size_t first) {
    std::vector<Item> whole(items.begin() + int64_t(first), items.end());
    items.resize(first);
    set_slots();
    for (const Item &item : whole) {
      if (item.to - item.from < 2) {
        items.push_back(item);
        continue;
      }
      for (int32_t i = item.from; i < item.to; i++) {
        give_slots(item.sequence, i);
        const int64_t upto = a.seq_lens[item.sequence] - new_tokens(item.sequence) + (item.begin + item.rows - 1) / ratio + 1;
        if (begins(item.sequence, i) >= std::min<int64_t>(upto, (i + 1) * SEGMENT)) continue;
        Item piece = item;
        piece.part = Item::PIECE, piece.from = i, piece.to = i + 1;
        piece.first = int32_t(std::max<int64_t>(item.first, begins(item.sequence, i)));
        piece.cost = item.cost / (item.to - item.from);
        items.push_back(piece);
      }
      Item total = item;
      total.part = Item::TOTAL, total.wave++, total.cost = int64_t(item.to - item.from) * item.rows * 16;
      items.push_back(total);
    }
  }

  int64_t slot_floats() const { return width + LANES; }

  void set_slots() {
    if (!slots.empty()) return;
    slots.assign(size_t(a.num_rows * num_segments), -1);
    walked.assign(slots.size(), 0);
  }

  int32_t give_slots(int64_t row, int64_t segment) {
    int32_t &at = slots[size_t(row * num_segments + segment)];
    if (at < 0) at = int32_t(num_slots), num_slots += new_tokens(row) * a.heads;
    return at;
  }

  // -- branches

  // Whether two rows hold the keys [from, to) in the same blocks.
  bool together(int64_t x, int64_t y, int64_t from, int64_t to) const {
    const int64_t first = from / a.block_size, last = (to - 1) / a.block_size;
    return std::memcmp(blocks_of(x) + first, blocks_of(y) + first, size_t(last - first + 1) * sizeof(int32_t)) == 0;
  }

  // What all queries of a row see, [low, high), and how it was branched so far.
  struct Trunk {
    int64_t low, high;
    int32_t depth, count;
  };

  // Finds what rows hold together. False when that is nothing, or too little to be worth it.
  bool find_branches() {
    if (a.num_rows < 2) return false;
    std::vector<Trunk> trunks(size_t(a.num_rows), Trunk{0, 0, 0, 0});
    int64_t highest = 0, second = 0;
    for (int64_t s = 0; s < a.num_rows; s++) {
      const int64_t n = new_tokens(s), length = a.seq_lens[s];
      // A row of many queries reads a key for as many at a time as it would in company.
      if (n <= 0 || n * ratio > TOKENS_MAX) continue;
      trunks[size_t(s)].low = first_key(length - 1);
      const int64_t high = trunks[size_t(s)].high = length - n + 1;
      second = std::max(second, std::min(high, highest)), highest = std::max(highest, high);
    }
    int64_t gain = 0, put = 0;
    int32_t last = 0;
    std::vector<int32_t> rows;
    for (int64_t from = 0; from + TILE <= second; from += SEGMENT) {
      rows.clear();
      for (int64_t s = 0; s < a.num_rows; s++)
        if (trunks[size_t(s)].low <= from && from + TILE <= trunks[size_t(s)].high) rows.push_back(int32_t(s));
      if (rows.size() > 1) branch(rows.data(), rows.data() + rows.size(), from, 0, trunks, gain, put);
    }
    for (const Branch &b : branches) last = std::max(last, b.wave);
    if (a.levels < 0 ? !branches.empty() : gain * a.kv_heads * a.dim > WAVE * (last + 1)) return true;
    branches.clear(), members.clear();
    return false;
  }

  // The branches of some rows from the tile at `from` to the end of its segment. Orders the rows.
  void branch(int32_t *first, int32_t *last, int64_t from, int32_t wave, std::vector<Trunk> &trunks, int64_t &gain,
              int64_t &put) {
    const int64_t stop = (from / SEGMENT + 1) * SEGMENT, at = from / a.block_size;
    const int64_t count = (from + TILE - 1) / a.block_size - at + 1;
    const auto reaches = [&](int32_t row, int64_t key) { return trunks[size_t(row)].high >= key; };
    std::sort(first, last, [&](int32_t x, int32_t y) {
      for (int64_t b = at; b < at + count; b++)
        if (blocks_of(x)[b] != blocks_of(y)[b]) return blocks_of(x)[b] < blocks_of(y)[b];
      return x < y;
    });
    for (int32_t *run = first, *end; run < last; run = end) {
      for (end = run + 1; end < last && together(*run, *end, from, from + TILE);) end++;
      if (end - run < 2) continue;
      int64_t to = from + TILE;
      const auto all = [&](int32_t row) { return reaches(row, to + TILE) && together(*run, row, to, to + TILE); };
      while (to < stop && std::all_of(run, end, all)) to += TILE;
      Trunk &trunk = trunks[size_t(*run)];
      const int32_t size = int32_t(end - run), depth = trunk.count == size ? trunk.depth : trunk.depth + 1;
      int64_t queries = 0;
      for (int32_t *row = run; row < end; row++) queries += new_tokens(*row) * ratio;
      const int64_t parts = (queries + BRANCH_ROWS - 1) / BRANCH_ROWS, cores = std::max<int64_t>(1, a.num_threads);
      const int64_t saved = (size - parts) * Kind::NEAR +
                            (std::min<int64_t>(size, cores) - std::min(parts, cores)) * (Kind::FAR - Kind::NEAR);
      const int64_t worth = (to - from) * saved - queries * Kind::ASIDE;
      const int64_t bytes = wave > 0 ? 0 : queries * a.kv_heads * slot_floats() * int64_t(sizeof(float));
      if (put + bytes > ASIDE_BYTES || (a.levels > 0 && (depth > a.levels || worth <= 0))) continue;
      gain += worth, put += bytes;
      branches.push_back({int32_t(from), int32_t(to), wave, depth, int32_t(members.size()), size, int32_t(queries)});
      members.insert(members.end(), run, end);
      for (int32_t *row = run; row < end; row++) trunks[size_t(*row)].depth = depth, trunks[size_t(*row)].count = size;
      int32_t *further = std::partition(run, end, [&](int32_t row) { return reaches(row, to + TILE); });
      if (to < stop && further - run > 1) branch(run, further, to, wave + 1, trunks, gain, put);
    }
  }

  // Whether a branch begins where its rows begin, so that its segments may be merged as they come.
  bool leads(const Branch &b) const {
    for (int32_t m = b.first; m < b.first + b.count; m++) {
      const int64_t row = members[size_t(m)];
      if (first_key(a.seq_lens[row] - new_tokens(row)) / SEGMENT * SEGMENT != b.from) return false;
    }
    return true;
  }

  // Where the run ends that begins with a branch and goes on through whole segments with the same rows; those after the
  // first are marked.
  int32_t run_of(size_t first, std::vector<char> &taken) const {
    const auto whole = [&](const Branch &b) { return b.from % SEGMENT == 0 && b.to % SEGMENT == 0; };
    const auto rows = [&](const Branch &b) { return members.begin() + b.first; };
    const Branch &b = branches[first];
    int32_t to = b.to;
    if (!whole(b) || !leads(b)) return to;
    for (size_t i = first + 1; i < branches.size() && branches[i].from / SEGMENT <= to / SEGMENT; i++) {
      const Branch &next = branches[i];
      if (next.from != to || next.count != b.count || !whole(next)) continue;
      if (std::equal(rows(b), rows(b) + b.count, rows(next))) to = next.to, taken[i] = 1;
    }
    return to;
  }

  // The items of all branches; returns the wave that comes after them.
  int32_t list_branches() {
    int32_t last = 0;
    set_slots();
    lead.assign(size_t(a.num_rows), 0);
    std::vector<char> taken(branches.size(), 0);
    for (size_t i = 0; i < branches.size(); i++) {
      if (taken[i]) continue;
      const Branch &b = branches[i];
      // Where there is little, all threads shall have some of it.
      const int64_t items_of_each = a.kv_heads * int64_t(branches.size());
      const int64_t wanted = (4 * a.num_threads + items_of_each - 1) / items_of_each;
      const int32_t parts = int32_t(std::max<int64_t>((b.queries + BRANCH_ROWS - 1) / BRANCH_ROWS,
                                                      std::min<int64_t>(wanted, b.queries / BATCH)));
      const int32_t size = ((b.queries + parts - 1) / parts + BATCH - 1) / BATCH * BATCH;
      // Merging on the way saves putting aside, but segments that are items of their own can be shared out.
      Item item{};
      item.part = Item::BRANCH, item.sequence = members[size_t(b.first)], item.wave = b.wave;
      item.first = b.from, item.last = parts * a.kv_heads >= 2 * a.num_threads ? run_of(i, taken) : b.to;
      item.from = item.first / SEGMENT, item.to = (item.last + SEGMENT - 1) / SEGMENT;
      const int32_t begin = int32_t(listed.size()), stop = begin + b.queries, merged = item.to - 1;
      for (int32_t m = b.first; m < b.first + b.count; m++) {
        const int32_t row = members[size_t(m)], count = int32_t(new_tokens(row) * ratio);
        const int32_t at = give_slots(row, merged);
        walked[size_t(row * num_segments + merged)] = item.last;
        if (merged > item.from) lead[size_t(row)] = merged;
        for (int32_t n = 0; n < count; n++)
          listed.push_back({int32_t(a.query_start[row] + n / ratio), int32_t(n % ratio), at + n, count});
      }
      for (int64_t h = 0; h < a.kv_heads; h++)
        for (item.begin = begin; item.begin < stop; item.begin += size) {
          item.kv_head = int32_t(h), item.rows = std::min(size, stop - item.begin);
          item.cost = int64_t(item.last - item.first) * (item.rows + BATCH);
          items.push_back(item);
        }
      last = std::max(last, b.wave);
    }
    return last + 1;
  }

  // -- the work

  void run() {
    for (int wave = 0; wave < waves(); wave++) {
      struct Job {
        const Shared &shared;
        int wave;
        std::atomic<int> next;
      } job{*this, wave, {0}};
      if (threads_of(wave) > 1)
        a.parallel(
            [](void *self) {
              Job &job = *static_cast<Job *>(self);
              job.shared.work(job.wave, job.next);
            },
            &job, unsigned(threads), 0);
      else
        work(wave, job.next);
    }
  }

  // Any number of threads at once, over one counter; all of the wave before must be done.
  void work(int wave, std::atomic<int> &next) const {
    static thread_local Scratch kept;
    float *p = kept.take(2 * state_floats() + TOKENS_MAX * (width + TILE));
    const State total = state_at(p), fresh = state_at(p + state_floats());
    float *q = p + 2 * state_floats(), *weights = q + TOKENS_MAX * width;
    const int first = wave > 0 ? ends[size_t(wave - 1)] : 0, end = ends[size_t(wave)];
    for (int i; (i = first + next.fetch_add(1, std::memory_order_relaxed)) < end;) {
      const Item &item = items[size_t(i)];
      // What this thread, or its neighbour, is likely to take next.
      const Item *then = i + threads < end ? &items[size_t(i + threads)] : nullptr;
      if (item.part != Item::TOTAL) kind().pack(item, q);
      segment(item, item.from, q, weights, total, item.to - item.from == 1 ? then : nullptr);
      for (int32_t s = item.from + 1; s < item.to; s++) {
        segment(item, s, q, weights, fresh, s + 1 == item.to ? then : nullptr);
        merge(total, fresh, item.rows);
      }
      if (item.part == Item::ROW || item.part == Item::TOTAL) finish(item, total);
      else put_aside(item, total);
    }
  }

  // The state of an item's queries over one segment.
  void segment(const Item &item, int64_t number, float *q, float *weights, const State &state, const Item *then) const {
    Reach reach;
    reach.blocks = blocks_of(item.sequence);
    if (item.part == Item::BRANCH) {
      reach.from = std::max<int64_t>(item.first, number * SEGMENT);
      reach.to = std::min<int64_t>(item.last, (number + 1) * SEGMENT);
      for (int64_t r = 0; r < item.rows; r++) reach.low[r] = reach.from, reach.high[r] = reach.to;
    } else {
      const int64_t start = a.seq_lens[item.sequence] - new_tokens(item.sequence);
      for (int64_t r = 0; r < item.rows; r++) {
        const int64_t position = start + (item.begin + r) / ratio;
        reach.low[r] = first_key(position), reach.high[r] = position + 1;
      }
      reach.from = std::max(begins(item.sequence, number), reach.low[0]);
      reach.to = item.part == Item::TOTAL ? 0 : std::min((number + 1) * SEGMENT, reach.high[item.rows - 1]);
    }
    const int64_t walked_to = item.part == Item::BRANCH ? item.first : begins(item.sequence, number);
    if (walked_to > number * SEGMENT || item.part == Item::TOTAL) take_up(item, number, state);
    else clear(state, item.rows);
    if (reach.from < reach.to) kind().walk(item, reach, q, weights, state, then);
  }

  float *aside_of(const Item &item, int64_t number, int64_t r) const {
    int64_t at;
    if (item.part == Item::BRANCH) {
      const Listed &query = listed[size_t(item.begin + r)];
      at = query.slot + int64_t(item.kv_head) * query.step;
    } else {
      at = slot(item.sequence, number) + item.kv_head * new_tokens(item.sequence) * ratio + item.begin + r;
    }
    return aside + at * slot_floats();
  }

  void put_aside(const Item &item, const State &state) const {
    for (int64_t r = 0; r < item.rows; r++) {
      float *to = aside_of(item, item.to - 1, r);
      std::memcpy(to, state.acc + r * width, size_t(width) * sizeof(float));
      to[width] = state.top[r], to[width + 1] = state.sum[r];
    }
  }

  void take_up(const Item &item, int64_t number, const State &state) const {
    for (int64_t r = 0; r < item.rows; r++) {
      const float *from = aside_of(item, number, r);
      std::memcpy(state.acc + r * width, from, size_t(width) * sizeof(float));
      state.top[r] = from[width], state.sum[r] = from[width + 1];
    }
  }

  // Where query r of an item lies.
  const float *query(const Item &item, int64_t r) const {
    int64_t token, head;
    if (item.part == Item::BRANCH) {
      token = listed[size_t(item.begin + r)].token, head = listed[size_t(item.begin + r)].head;
    } else {
      token = a.query_start[item.sequence] + (item.begin + r) / ratio, head = (item.begin + r) % ratio;
    }
    return a.q + token * a.q_token_stride + (item.kv_head * ratio + head) * a.q_head_stride;
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
    settle();
    Vec most = splat(EMPTY);
    for (int g = first; g < last; g++) {
      Vec x = Width16::load(s + g * LANES);
      if (a.softcap > 0.0f) x = tanh_of(x / a.softcap) * a.softcap;
      if (masked) {
        const IntVec at = lane + g * LANES;
        x = ((at >= from) & (at < to)) ? x : splat(EMPTY);
      }
      Width16::store(s + g * LANES, x);
      most = larger(x, most);
    }
    settle();
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

  // The same for R queries that see the whole tile. The steps of one query wait for each other, those of several do not:
  // each is taken for all before the next. `fade` has LANES.
  template <int R> inline void soften_whole(float *s, const State &state, float *fade) const {
    alignas(64) float before[LANES] = {}, now[LANES] = {};
    settle();
    for (int r = 0; r < R; r++) {
      Vec most = splat(EMPTY);
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++) most = larger(Width16::load(s + r * TILE + g * LANES), most);
      before[r] = state.top[r];
      now[r] = std::max(before[r], fold_max(most));
    }
    Width16::store(fade, exp_of(Width16::load(before) - Width16::load(now)));
    for (int r = 0; r < R; r++) {
      Vec all = {};
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++) {
        const Vec p = exp_of(Width16::load(s + r * TILE + g * LANES) - now[r]);
        Width16::store(s + r * TILE + g * LANES, p);
        all += p;
      }
      const float added = fold_sum(all);
      state.top[r] = now[r];
      state.sum[r] = state.sum[r] * fade[r] + added;
    }
  }

  // Whether R queries see all keys of the tile at `key`, and nothing is done to their scores.
  template <int R> bool whole_tile(int64_t key, const int64_t *low, const int64_t *high) const {
    bool whole = a.softcap <= 0.0f;
    for (int r = 0; r < R; r++) whole &= low[r] <= key && high[r] >= key + TILE;
    return whole;
  }
};

// Pages in float32 or bfloat16: K (block, kv head, dim, block_size), V (block, kv head, block_size, dim).
template <class E> struct Plain : Shared<Plain<E>> {
  using Base = Shared<Plain<E>>;
  using Base::a, Base::query, Base::soften, Base::width;
  using Base::Base;
  static constexpr int64_t NEAR = 2, FAR = 6, ASIDE = 70; // measured

  void pack(const Item &item, float *q) const {
    for (int64_t r = 0; r < item.rows; r++) {
      const float *from = query(item, r);
      for (int64_t d = 0; d < a.dim; d++) q[r * width + d] = from[d] * a.scale;
    }
  }

  // Keys and values of a tile, asked for ahead of their use. Blocks lie apart, and the processor's own prefetching begins
  // anew at each. Part by part: a core that has more requests open than it can keep stands still.
  struct Ahead {
    static constexpr int64_t LINE = 64 / int64_t(sizeof(E));
    const Args &a;
    const int32_t *blocks;
    int64_t kv_head, from, to, parts, part = 0;

    __attribute__((noinline)) void next() {
      const int64_t begin = part, end = ++part, head_size = a.block_size * a.dim;
      for (int64_t at = from; at < to;) {
        const int64_t offset = at % a.block_size, n = std::min(to - at, a.block_size - offset);
        const int64_t head = (int64_t(blocks[at / a.block_size]) * a.kv_heads + kv_head) * head_size;
        const E *k = static_cast<const E *>(a.k) + head + offset, *v = static_cast<const E *>(a.v) + head + offset * a.dim;
        for (int64_t d = a.dim * begin / parts; d < a.dim * end / parts; d++)
          for (int64_t i = 0; i < n; i += LINE) __builtin_prefetch(k + d * a.block_size + i, 0, 2);
        const int64_t lines = (n * a.dim + LINE - 1) / LINE;
        for (int64_t i = lines * begin / parts; i < lines * end / parts; i++) __builtin_prefetch(v + i * LINE, 0, 2);
        at += n;
      }
    }
  };

  template <int R>
  void batch(const float *q, const E *const *k, const E *const *v, int64_t key, const int64_t *low,
             const int64_t *high, float *s, const State &state, Ahead &ahead) const {
    ahead.next();
    int64_t least = low[0], most = high[0];
    for (int r = 1; r < R; r++) least = std::min(least, low[r]), most = std::max(most, high[r]);
    const int64_t from = std::max(least, key) - key, to = std::min<int64_t>(most, key + TILE) - key;
    if (from >= to) return;
    const int first = int(from / LANES), last = int((to + LANES - 1) / LANES);
    score_rows<R>(q, width, a.dim, k, a.block_size, first, last, s);
    ahead.next();
    alignas(64) float fade[LANES];
    if (this->template whole_tile<R>(key, low, high)) this->template soften_whole<R>(s, state, fade);
    else
      for (int r = 0; r < R; r++)
        fade[r] = soften(s + r * TILE, key, low[r], high[r], first, last, state.top[r], state.sum[r]);
    ahead.next();
    value_rows<R>(s, fade, v, a.dim, int(from), int(to), state.acc, width);
  }

  void walk(const Item &item, const Reach &reach, const float *q, float *s, const State &state, const Item *) const {
    const int64_t head_size = a.block_size * a.dim;
    const int32_t *blocks = reach.blocks;
    const int64_t *low = reach.low, *high = reach.high;
    for (int64_t key = reach.from / TILE * TILE; key < reach.to; key += TILE) {
      const E *k[GROUPS] = {}, *v[GROUPS] = {};
      for (int g = 0; g < GROUPS; g++) {
        const int64_t at = key + g * LANES;
        // A group of keys that nobody sees may have no block; batch() does not touch it.
        if (at + LANES <= low[0] || at >= reach.to) continue;
        const int64_t head = int64_t(blocks[at / a.block_size]) * a.kv_heads + item.kv_head, offset = at % a.block_size;
        k[g] = static_cast<const E *>(a.k) + head * head_size + offset;
        v[g] = static_cast<const E *>(a.v) + head * head_size + offset * a.dim;
      }
      Ahead ahead{a, blocks, item.kv_head, key + TILE, std::min(reach.to, key + 2 * TILE), (item.rows + BATCH - 1) / BATCH * 3};
      for (int64_t r = 0; r < item.rows; r += BATCH) {
        const State rows{state.top + r, state.sum + r, state.acc + r * width};
        const float *queries = q + r * width;
        switch (std::min<int64_t>(BATCH, item.rows - r)) {
        case 1: batch<1>(queries, k, v, key, low + r, high + r, s, rows, ahead); break;
        case 2: batch<2>(queries, k, v, key, low + r, high + r, s, rows, ahead); break;
        case 3: batch<3>(queries, k, v, key, low + r, high + r, s, rows, ahead); break;
        case 4: batch<4>(queries, k, v, key, low + r, high + r, s, rows, ahead); break;
        case 5: batch<5>(queries, k, v, key, low + r, high + r, s, rows, ahead); break;
        default: batch<6>(queries, k, v, key, low + r, high + r, s, rows, ahead); break;
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
