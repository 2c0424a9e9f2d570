// A run of decoder layers as one call: norms, products, rotary positions, the writing of keys and values, attention and
// activations, with a barrier between them and nothing else. The members of the team share each of them out by rows,
// heads or outputs; what a row's result is does not depend on how.
#include "attention4.h"
#include "attention8.h"
#include "channel.h"
#include "pool.h"

extern "C" {

struct MillstreamNorm {
  const float *weight; // null: the identity
  float eps;
  int32_t unused;
};

// The keys and values of one layer, and where its group's tokens lie. `kind` 0: float32, 1: bfloat16, 2: 8 bits,
// 3: 4 bits.
struct MillstreamGroup {
  const int32_t *block_tables;
  const int64_t *slots;
  int64_t table_stride, num_blocks, block_size, kind;
};

// cos and sin, (positions, half) of each.
struct MillstreamRope {
  const float *cos, *sin;
  int64_t half;
};

struct MillstreamLayer {
  MillstreamNorm mixer_norm, mixer_post_norm, channel_norm, channel_post_norm, q_norm, k_norm;
  MillstreamMatrix qkv, out, gate, up, down;
  void *k, *v; // pages; v is not used where one block holds both
  int64_t group, rope; // rope -1: none
  int64_t activation;  // 0: silu, 1: gelu by tanh, 2: gelu
  int64_t heads, kv_heads, dim, inner, window;
  float scale, softcap;
};

struct MillstreamStep {
  const MillstreamLayer *layers;
  const MillstreamGroup *groups;
  const MillstreamRope *ropes;
  MillstreamMatrix embedding; // (vocabulary, width); without a stream x is given
  const int64_t *tokens, *positions;
  const int32_t *query_start, *seq_lens;
  float *x; // (tokens, width)
  void *scratch;
  int64_t first_layer, last_layer, num_groups, num_tokens, num_rows, width, scratch_bytes, num_threads;
  float embed_scale;
  int32_t levels; // of shared prefixes that rows may walk together, as in MillstreamAttention
};

// Logits (rows, outputs) of some rows of x, from the last norm on.
struct MillstreamHead {
  MillstreamNorm norm;
  MillstreamMatrix matrix;
  const float *x;
  const int64_t *rows;
  float *logits;  // null: only the likeliest output of each row is wanted
  int64_t *best;  // (rows), then
  float *most;    // (rows): its logit, NaN where any logit is one
  void *scratch;
  int64_t num_rows, width, scratch_bytes, num_threads;
  float softcap;
  int32_t unused;
};

// Keys and values (tokens, kv heads, dim), with strides in floats, into pages of codes at `slots`.
struct MillstreamWriteCodes {
  uint8_t *pages;
  const int64_t *slots;
  const float *k, *v;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int64_t num_tokens, num_blocks, block_size, kv_heads, dim, bits;
};

// y = x W^T + bias for x (rows, inputs), y (rows, outputs), both with their strides in floats.
struct MillstreamProduct {
  MillstreamMatrix matrix;
  const float *x;
  float *y;
  void *scratch;
  int64_t rows, x_stride, y_stride, scratch_bytes, num_threads;
};

}

namespace {

using attention::exp_of;
using int8::fma;
using int8::load;
using int8::splat;
using int8::store;
using int8::Vec;

constexpr int64_t MAX_MEMBERS = 256;

// Memory of a step, handed out in order; the same calls with no memory behind say how much is needed.
struct Arena {
  char *at;
  int64_t used = 0;

  template <class T> T *take(int64_t count) {
    T *found = reinterpret_cast<T *>(at + used);
    used += (count * int64_t(sizeof(T)) + 127) / 64 * 64;
    return found;
  }

  int8::Rows rows(int64_t count, int64_t inputs) {
    const int64_t runs = int8::runs_of(inputs);
    int8_t *q = take<int8_t>(count * runs * int8::RUN);
    float *scale = take<float>(count * runs);
    return {q, scale, take<float>(count * runs), runs};
  }
};

// x / rms(x) * weight. `out` may be x.
inline void norm_row(const MillstreamNorm &norm, const float *x, int64_t width, float *out) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) squares = fma(load(x + i), load(x + i), squares);
  float sum = attention::fold_sum((attention::Vec)squares);
  for (; i < width; i++) sum = __builtin_fmaf(x[i], x[i], sum);
  const float by = 1.0f / std::sqrt(sum / float(width) + norm.eps);
  for (i = 0; i + 16 <= width; i += 16) store(out + i, load(x + i) * by * load(norm.weight + i));
  for (; i < width; i++) out[i] = x[i] * by * norm.weight[i];
}

inline Vec activate(Vec x, int64_t kind) {
  if (kind == 0) {
    const Vec bounded = x < -87.0f ? splat(-87.0f) : x;
    return x / (1.0f + (Vec)exp_of((attention::Vec)(bounded > 87.0f ? splat(-87.0f) : -bounded)));
  }
  if (kind == 1) {
    const Vec inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + (Vec)attention::tanh_of((attention::Vec)inner));
  }
  Vec out;
  for (int i = 0; i < 16; i++) out[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.7071067812f));
  return out;
}

inline void rotate(float *x, const MillstreamRope &rope, int64_t position) {
  const float *cos = rope.cos + position * rope.half, *sin = rope.sin + position * rope.half;
  int64_t d = 0;
  for (; d + 16 <= rope.half; d += 16) {
    const Vec a = load(x + d), b = load(x + d + rope.half), c = load(cos + d), s = load(sin + d);
    store(x + d, a * c - b * s);
    store(x + d + rope.half, b * c + a * s);
  }
  for (; d < rope.half; d++) {
    const float a = x[d], b = x[d + rope.half];
    x[d] = a * cos[d] - b * sin[d];
    x[d + rope.half] = b * cos[d] + a * sin[d];
  }
}

template <class E>
inline void write_plain(E *k_pages, E *v_pages, const MillstreamLayer &l, int64_t block_size, int64_t slot, int64_t head,
                        const float *k, const float *v) {
  const int64_t base = (slot / block_size * l.kv_heads + head) * block_size * l.dim, offset = slot % block_size;
  for (int64_t d = 0; d < l.dim; d++) attention::keep(k_pages + base + d * block_size + offset, k[d]);
  for (int64_t d = 0; d < l.dim; d++) attention::keep(v_pages + base + offset * l.dim + d, v[d]);
}

inline void write_codes(uint8_t *pages, int64_t bits, int64_t kv_heads, int64_t dim, int64_t block_size, int64_t slot,
                        int64_t head, const float *k, const float *v) {
  const int64_t place = slot / block_size * kv_heads + head, offset = slot % block_size;
  if (bits == 8) attention::write8(pages + place * attention::head_bytes8(dim, block_size), dim, block_size, offset, k, v);
  else attention::write4(pages + place * attention::head_bytes4(dim, block_size), dim, block_size, offset, k, v);
}

// Attention of one cache group: planned once a step, pointed at each layer's pages in turn.
struct GroupAttention {
  MillstreamAttention args{};
  std::unique_ptr<attention::Plain<float>> wide;
  std::unique_ptr<attention::Plain<uint16_t>> half;
  std::unique_ptr<attention::Int8> bytes;
  std::unique_ptr<attention::Int4> nibbles;

  int plan(int64_t kind, attention::Scratch &kept) {
    if (kind == 0) return (wide.reset(new attention::Plain<float>(args, kept)), wide->plan());
    if (kind == 1) return (half.reset(new attention::Plain<uint16_t>(args, kept)), half->plan());
    if (kind == 2) return (bytes.reset(new attention::Int8(args, kept)), bytes->plan());
    return (nibbles.reset(new attention::Int4(args, kept)), nibbles->plan());
  }

  template <class F> void with(F f) {
    if (wide) f(*wide);
    else if (half) f(*half);
    else if (bytes) f(*bytes);
    else f(*nibbles);
  }

  int waves() {
    int found = 0;
    with([&](auto &kind) { found = kind.waves(); });
    return found;
  }
};

struct Layers {
  const MillstreamStep &step;
  std::vector<GroupAttention> attentions;
  std::vector<std::atomic<int64_t>> taken;
  std::vector<std::atomic<int>> items; // by layer and wave
  size_t waves = 1;
  pool::Barrier barrier;
  int8::Rows wide{}, inner{};
  float *qkv = nullptr, *seen = nullptr, *lse = nullptr, *hidden = nullptr, *middle = nullptr;
  int64_t qkv_width = 0, seen_width = 0;
  uint32_t size;

  static constexpr int PHASES = 11;

  Layers(const MillstreamStep &s, uint32_t members)
      : step(s), taken(size_t(PHASES * (s.last_layer - s.first_layer) + 1) * members), size(members) {}

  int64_t lay_out(char *memory) {
    int64_t widest = step.width, inner_width = 1, heads = 1, whole_width = 0;
    for (int64_t i = step.first_layer; i < step.last_layer; i++) {
      const MillstreamLayer &l = step.layers[i];
      qkv_width = std::max(qkv_width, (l.heads + 2 * l.kv_heads) * l.dim);
      seen_width = std::max(seen_width, l.heads * l.dim);
      inner_width = std::max(inner_width, l.inner);
      if (l.down.kind == int8::CHANNEL) whole_width = std::max(whole_width, l.inner);
      heads = std::max(heads, l.heads);
    }
    // Rows a multiple of 4096 bytes apart would all want the same few lines of the cache.
    qkv_width += 16, seen_width += 16;
    Arena arena{memory};
    wide = arena.rows(step.num_tokens, std::max(widest, seen_width));
    inner = arena.rows(step.num_tokens, inner_width);
    qkv = arena.take<float>(step.num_tokens * qkv_width);
    seen = arena.take<float>(step.num_tokens * seen_width);
    lse = arena.take<float>(step.num_tokens * heads);
    hidden = arena.take<float>(step.num_tokens * step.width);
    middle = arena.take<float>(step.num_tokens * whole_width);
    return arena.used;
  }

  int plan() {
    static thread_local std::vector<attention::Scratch> kept;
    kept.resize(std::max(kept.size(), size_t(step.num_groups)));
    attentions.resize(size_t(step.num_groups));
    for (int64_t i = step.first_layer; i < step.last_layer; i++) {
      const MillstreamLayer &l = step.layers[i];
      GroupAttention &attend = attentions[size_t(l.group)];
      if (attend.args.q) continue;
      const MillstreamGroup &g = step.groups[l.group];
      MillstreamAttention &a = attend.args;
      a.q = qkv, a.out = seen, a.lse = lse;
      a.query_start = step.query_start, a.seq_lens = step.seq_lens, a.block_tables = g.block_tables;
      // Never called: it only says that rows may be cut into parts. The members of this team take them.
      if (size > 1) a.parallel = [](void (*)(void *), void *, unsigned, unsigned) {};
      a.q_token_stride = qkv_width, a.q_head_stride = l.dim, a.out_token_stride = seen_width, a.out_head_stride = l.dim;
      a.num_rows = step.num_rows, a.table_stride = g.table_stride, a.num_blocks = g.num_blocks;
      a.block_size = g.block_size, a.heads = l.heads, a.kv_heads = l.kv_heads, a.dim = l.dim, a.window = l.window;
      a.num_threads = size, a.page_bits = 32, a.levels = step.levels, a.scale = l.scale, a.softcap = l.softcap;
      if (attend.plan(g.kind, kept[size_t(l.group)]) != 0) return -1;
      waves = std::max(waves, size_t(attend.waves()));
      for (int64_t t = 0; t < step.num_tokens; t++)
        if (g.slots[t] < 0 || g.slots[t] >= g.num_blocks * g.block_size) return -1;
    }
    items = std::vector<std::atomic<int>>(waves * size_t(step.last_layer - step.first_layer));
    return 0;
  }

  template <class Put> auto product(const MillstreamMatrix &w, const int8::Rows &x, const Put &put) const {
    return int8::AnyProduct<Put>{w, x, step.num_tokens, put};
  }

  void work(uint32_t member) {
    const tiles::Scope scope;
    const int64_t tokens = step.num_tokens, width = step.width;
    std::atomic<int64_t> *next = taken.data();
    // All members do the same phases in the same order, so each finds the same counters.
    const auto share = [&](int64_t total, const auto &each) {
      pool::Shares{next, member, size}.each(total, each);
      next += size;
      barrier.wait(size);
    };
    if (step.embedding.stream)
      share(tokens, [&](int64_t t) {
        float *x = step.x + t * width;
        int8::any_output_row(step.embedding, step.tokens[t], x);
        for (int64_t i = 0; i < width; i++) x[i] *= step.embed_scale;
      });
    else next += size;
    for (int64_t i = step.first_layer; i < step.last_layer; i++) {
      const MillstreamLayer &l = step.layers[i];
      std::atomic<int64_t> *const after = next + (PHASES - 1) * size;
      const auto runs = [&](int64_t inputs) { return int8::runs_of(inputs); };
      int8::Rows x = wide;
      x.runs = runs(width);
      const auto normed = [&](const MillstreamNorm &norm, const MillstreamMatrix &next_product) {
        share(tokens, [&](int64_t t) {
          static thread_local std::vector<float> row;
          row.resize(size_t(width));
          norm_row(norm, step.x + t * width, width, row.data());
          int8::quantize_for(next_product, row.data(), width, x, t);
        });
      };
      const auto added = [&](const MillstreamMatrix &w, const int8::Rows &rows, const MillstreamNorm &post) {
        if (post.weight) {
          const auto put = [&](int64_t t, int64_t o, int64_t n, const float *y) {
            std::memcpy(hidden + t * width + o, y, size_t(n) * sizeof(float));
          };
          const auto multiply = product(w, rows, put);
          share(multiply.units(), [&](int64_t unit) { multiply.unit(unit); });
          share(tokens, [&](int64_t t) {
            float *y = hidden + t * width;
            norm_row(post, y, width, y);
            for (int64_t d = 0; d < width; d++) step.x[t * width + d] += y[d];
          });
        } else {
          const auto put = [&](int64_t t, int64_t o, int64_t n, const float *y) {
            float *to = step.x + t * width + o;
            for (int64_t d = 0; d < n; d++) to[d] += y[d];
          };
          const auto multiply = product(w, rows, put);
          share(multiply.units(), [&](int64_t unit) { multiply.unit(unit); });
        }
      };

      normed(l.mixer_norm, l.qkv);
      {
        const auto put = [&](int64_t t, int64_t o, int64_t n, const float *y) {
          std::memcpy(qkv + t * qkv_width + o, y, size_t(n) * sizeof(float));
        };
        const auto multiply = product(l.qkv, x, put);
        share(multiply.units(), [&](int64_t unit) { multiply.unit(unit); });
      }
      share(tokens * l.kv_heads, [&](int64_t unit) {
        const int64_t soon = unit + SOON;
        if (soon < tokens * l.kv_heads) ask_place(l, soon / l.kv_heads, soon % l.kv_heads);
        place(l, unit / l.kv_heads, unit % l.kv_heads);
      });
      GroupAttention &attend = attentions[size_t(l.group)];
      if (member == 0) attend.args.k = l.k, attend.args.v = l.v;
      barrier.wait(size);
      attend.with([&](auto &kind) {
        for (int wave = 0; wave < kind.waves(); wave++) {
          kind.work(wave, items[size_t(i - step.first_layer) * waves + size_t(wave)]);
          barrier.wait(size);
        }
      });
      int8::Rows heads = wide;
      heads.runs = runs(l.heads * l.dim);
      share(tokens, [&](int64_t t) {
        int8::quantize_for(l.out, seen + t * seen_width, l.heads * l.dim, heads, t);
      });
      added(l.out, heads, l.mixer_post_norm);

      normed(l.channel_norm, l.gate);
      int8::Rows between = inner;
      between.runs = runs(l.inner);
      share(gated(l, x, between).units(), [&](int64_t unit) { gated(l, x, between).unit(unit); });
      if (l.down.kind == int8::CHANNEL)
        share(tokens, [&](int64_t t) { int8::quantize_for(l.down, middle + t * l.inner, l.inner, between, t); });
      added(l.down, between, l.channel_post_norm);
      next = after + size;
    }
  }

  // The two products of an MLP for the same outputs, what follows them, and back to 8 bits (or as floats to `middle`).
  struct Gated {
    const Layers &all;
    const MillstreamLayer &l;
    const int8::Rows &x, &to;

    int64_t blocks() const { return (all.step.num_tokens + int8::ROWS - 1) / int8::ROWS; }
    int64_t units() const { return l.inner / int8::RUN * blocks(); }

    void unit(int64_t number) const {
      static_assert(int8::WIDE * int8::PANEL == int8::RUN, "one unit is one run of the next product");
      static thread_local float gate[(int8::ROWS + 1) * int8::RUN];
      int64_t first = -1;
      const auto keep = [&](int64_t t, int64_t, int64_t, const float *y) {
        if (first < 0) first = t;
        std::memcpy(gate + (t - first) * int8::RUN, y, int8::RUN * sizeof(float));
      };
      all.product(l.gate, x, keep).unit(number);
      const auto put = [&](int64_t t, int64_t o, int64_t, const float *y) {
        float both[int8::RUN];
        const float *g = gate + (t - first) * int8::RUN;
        for (int i = 0; i < int8::RUN; i += 16) store(both + i, activate(load(g + i), l.activation) * load(y + i));
        if (l.down.kind == int8::CHANNEL) {
          // The largest of a row is known when all of it is.
          std::memcpy(all.middle + t * l.inner + o, both, sizeof(both));
          return;
        }
        const int64_t run = o / int8::RUN, at = t * to.runs + run;
        int8::quantize_row(both, int8::RUN, to.q + at * int8::RUN, to.scale + at, to.sum + at);
      };
      all.product(l.up, x, put).unit(number);
    }
  };

  Gated gated(const MillstreamLayer &l, const int8::Rows &x, const int8::Rows &to) const { return {*this, l, x, to}; }

  static constexpr int64_t SOON = 3; // units of `place` whose lines are asked for ahead: each lies apart in memory

  // Asks for the lines of a page that `place` will write.
  void ask_place(const MillstreamLayer &l, int64_t t, int64_t head) const {
    const MillstreamGroup &g = step.groups[l.group];
    if (g.kind != 2) return;
    const int64_t slot = g.slots[t], offset = slot % g.block_size, width = attention::padded8(l.dim);
    const char *at = static_cast<const char *>(l.k) +
                     (slot / g.block_size * l.kv_heads + head) * attention::head_bytes8(l.dim, g.block_size);
    for (int64_t d = 0; d < width; d += 4) __builtin_prefetch(at + (d / 4 * g.block_size + offset) * 4, 1, 2);
    const char *values = at + g.block_size * width + offset / 4 * width * 4;
    for (int64_t i = 0; i < width * 4; i += 64) __builtin_prefetch(values + i, 1, 2);
    for (int64_t i = 0; i < 2; i++) __builtin_prefetch(at + 2 * g.block_size * width + (i * g.block_size + offset) * 4, 1, 2);
  }

  // Norms and turns the queries and the key of one token and kv head, and puts key and value into their page.
  void place(const MillstreamLayer &l, int64_t t, int64_t head) const {
    float *row = qkv + t * qkv_width;
    const int64_t ratio = l.heads / l.kv_heads, position = step.positions[t];
    float *k = row + (l.heads + head) * l.dim, *v = row + (l.heads + l.kv_heads + head) * l.dim;
    for (int64_t h = head * ratio; h < (head + 1) * ratio; h++) {
      float *q = row + h * l.dim;
      if (l.q_norm.weight) norm_row(l.q_norm, q, l.dim, q);
      if (l.rope >= 0) rotate(q, step.ropes[l.rope], position);
    }
    if (l.k_norm.weight) norm_row(l.k_norm, k, l.dim, k);
    if (l.rope >= 0) rotate(k, step.ropes[l.rope], position);
    const MillstreamGroup &g = step.groups[l.group];
    const int64_t slot = g.slots[t];
    if (g.kind == 0)
      write_plain(static_cast<float *>(l.k), static_cast<float *>(l.v), l, g.block_size, slot, head, k, v);
    else if (g.kind == 1)
      write_plain(static_cast<uint16_t *>(l.k), static_cast<uint16_t *>(l.v), l, g.block_size, slot, head, k, v);
    else write_codes(static_cast<uint8_t *>(l.k), g.kind == 2 ? 8 : 4, l.kv_heads, l.dim, g.block_size, slot, head, k, v);
  }
};

inline uint32_t members(int64_t threads) { return uint32_t(std::min(std::max<int64_t>(threads, 1), MAX_MEMBERS)); }

// One layer's attention over pages of codes.
template <class Kind> int attend(MillstreamAttention args) {
  if (args.num_threads > 1) args.parallel = [](void (*)(void *), void *, unsigned, unsigned) {};
  static thread_local attention::Scratch kept;
  Kind pages(args, kept);
  if (pages.plan() != 0) return -1;
  for (int wave = 0; wave < pages.waves(); wave++) {
    struct Job {
      const Kind &pages;
      int wave;
      std::atomic<int> next;
    } job{pages, wave, {0}};
    pool::team().run(
        [](void *self, uint32_t, uint32_t) {
          Job &job = *static_cast<Job *>(self);
          job.pages.work(job.wave, job.next);
        },
        &job, members(pages.threads_of(wave)));
  }
  return 0;
}

} // namespace

extern "C" {

// Bytes of scratch that a step of `num_tokens` needs.
int64_t millstream_layers_scratch(const MillstreamStep *s) { return Layers(*s, 1).lay_out(nullptr); }

// 0; -1 when a row needs a block that is not one of the pages, has fewer tokens than queries, or a slot beyond the
// pages; -2 when there is too little scratch; -3 for a token that has no embedding. Nothing is written then.
int millstream_layers(const MillstreamStep *s) {
  if (s->num_tokens <= 0) return 0;
  for (int64_t t = 0; s->embedding.stream && t < s->num_tokens; t++)
    if (s->tokens[t] < 0 || s->tokens[t] >= s->embedding.outputs) return -3;
  Layers layers(*s, members(s->num_threads));
  if (layers.lay_out(static_cast<char *>(s->scratch)) > s->scratch_bytes) return -2;
  if (layers.plan() != 0) return -1;
  pool::team().run([](void *job, uint32_t member, uint32_t) { static_cast<Layers *>(job)->work(member); }, &layers,
                   layers.size);
  return 0;
}

// The first of the largest of n values; `sound` when none is a NaN.
static int64_t likeliest(const float *y, int64_t n, bool &sound) {
#if defined(__AVX512F__)
  if (n == 2 * int8::PANEL) {
    const __m512 a = _mm512_loadu_ps(y), b = _mm512_loadu_ps(y + 16);
    sound = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) == 0;
    const __m512 top = _mm512_set1_ps(attention::fold_max((attention::Vec)_mm512_max_ps(a, b)));
    const uint32_t low = _mm512_cmp_ps_mask(a, top, _CMP_EQ_OQ), high = _mm512_cmp_ps_mask(b, top, _CMP_EQ_OQ);
    return low ? __builtin_ctz(low) : high ? 16 + __builtin_ctz(high) : 0;
  }
#endif
  int64_t best = 0;
  sound = y[0] == y[0];
  for (int64_t i = 1; i < n; i++) {
    sound &= y[i] == y[i];
    if (y[i] > y[best]) best = i;
  }
  return best;
}

// Beside the rows, where only the likeliest are wanted, the likeliest output of every unit and its logit.
static int64_t lay_out_head(const MillstreamHead &h, char *memory, int8::Rows &rows, int32_t *&place, float *&most) {
  Arena arena{memory};
  const int64_t units = h.logits ? 0 : h.num_rows * ((h.matrix.outputs + int8::RUN - 1) / int8::RUN);
  rows = arena.rows(h.num_rows, h.width);
  place = arena.take<int32_t>(units);
  most = arena.take<float>(units);
  return arena.used;
}

int64_t millstream_head_scratch(const MillstreamHead *h) {
  int8::Rows rows;
  int32_t *place;
  float *most;
  return lay_out_head(*h, nullptr, rows, place, most);
}

int millstream_head(const MillstreamHead *h) {
  struct Job {
    const MillstreamHead &h;
    int8::Rows rows;
    int32_t *place;
    float *most;
    std::vector<std::atomic<int64_t>> taken;
    pool::Barrier barrier;
  };
  if (h->num_rows <= 0) return 0;
  const uint32_t size = members(h->num_threads);
  Job job{*h, {}, nullptr, nullptr, std::vector<std::atomic<int64_t>>(3 * size), {}};
  if (lay_out_head(*h, static_cast<char *>(h->scratch), job.rows, job.place, job.most) > h->scratch_bytes) return -2;
  pool::team().run(
      [](void *self, uint32_t member, uint32_t size) {
        const tiles::Scope scope;
        Job &job = *static_cast<Job *>(self);
        const MillstreamHead &h = job.h;
        const int8::Rows &rows = job.rows;
        pool::Shares{job.taken.data(), member, size}.each(h.num_rows, [&](int64_t r) {
          static thread_local std::vector<float> row;
          row.resize(size_t(h.width));
          norm_row(h.norm, h.x + h.rows[r] * h.width, h.width, row.data());
          int8::quantize_for(h.matrix, row.data(), h.width, rows, r);
        });
        job.barrier.wait(size);
        const int64_t pairs = (h.matrix.outputs + int8::RUN - 1) / int8::RUN;
        const auto put = [&](int64_t r, int64_t o, int64_t n, float *y) {
          if (h.softcap > 0.0f)
            for (int64_t i = 0; i < n; i++) y[i] = h.softcap * std::tanh(y[i] / h.softcap);
          if (h.logits) {
            std::memcpy(h.logits + r * h.matrix.outputs + o, y, size_t(n) * sizeof(float));
            return;
          }
          bool sound;
          const int64_t best = likeliest(y, n, sound);
          const int64_t at = r * pairs + o / int8::RUN;
          job.place[at] = int32_t(o + best);
          job.most[at] = sound ? y[best] : NAN;
        };
        const int8::AnyProduct<decltype(put)> multiply{h.matrix, rows, h.num_rows, put};
        pool::Shares{job.taken.data() + size, member, size}.each(multiply.units(),
                                                                [&](int64_t unit) { multiply.unit(unit); });
        if (h.logits) return;
        job.barrier.wait(size);
        pool::Shares{job.taken.data() + 2 * size, member, size}.each(h.num_rows, [&](int64_t r) {
          const float *most = job.most + r * pairs;
          int64_t best = 0;
          bool sound = most[0] == most[0];
          for (int64_t p = 1; p < pairs; p++) {
            sound &= most[p] == most[p];
            if (most[p] > most[best]) best = p;
          }
          h.best[r] = job.place[r * pairs + best];
          h.most[r] = sound ? most[best] : NAN;
        });
      },
      &job, size);
  return 0;
}

int64_t millstream_product_scratch(const MillstreamProduct *p) {
  Arena arena{nullptr};
  arena.rows(p->rows, p->matrix.inputs);
  return arena.used;
}

int millstream_product(const MillstreamProduct *p) {
  struct Job {
    const MillstreamProduct &p;
    int8::Rows rows;
    std::vector<std::atomic<int64_t>> taken;
    pool::Barrier barrier;
  };
  if (p->rows <= 0) return 0;
  if (millstream_product_scratch(p) > p->scratch_bytes) return -2;
  Arena arena{static_cast<char *>(p->scratch)};
  // Waking the team costs more than a small product.
  const uint32_t size = p->rows * p->matrix.inputs * p->matrix.outputs > 200000 ? members(p->num_threads) : 1;
  Job job{*p, arena.rows(p->rows, p->matrix.inputs), std::vector<std::atomic<int64_t>>(2 * size), {}};
  pool::team().run(
      [](void *self, uint32_t member, uint32_t size) {
        const tiles::Scope scope;
        Job &job = *static_cast<Job *>(self);
        const MillstreamProduct &p = job.p;
        const int8::Rows &rows = job.rows;
        pool::Shares{job.taken.data(), member, size}.each(p.rows, [&](int64_t r) {
          int8::quantize_for(p.matrix, p.x + r * p.x_stride, p.matrix.inputs, rows, r);
        });
        job.barrier.wait(size);
        const auto put = [&](int64_t r, int64_t o, int64_t n, const float *y) {
          std::memcpy(p.y + r * p.y_stride + o, y, size_t(n) * sizeof(float));
        };
        const int8::AnyProduct<decltype(put)> multiply{p.matrix, rows, p.rows, put};
        pool::Shares{job.taken.data() + size, member, size}.each(multiply.units(),
                                                                [&](int64_t unit) { multiply.unit(unit); });
      },
      &job, size);
  return 0;
}

// 0, or -1 when a slot lies beyond the pages; nothing is written then. A negative slot is passed over. `bits` 8 or 4.
int millstream_kv_write_codes(const MillstreamWriteCodes *w) {
  for (int64_t t = 0; t < w->num_tokens; t++)
    if (w->slots[t] >= w->num_blocks * w->block_size) return -1;
  for (int64_t t = 0; t < w->num_tokens; t++) {
    if (w->slots[t] < 0) continue;
    for (int64_t h = 0; h < w->kv_heads; h++)
      write_codes(w->pages, w->bits, w->kv_heads, w->dim, w->block_size, w->slots[t], h,
                  w->k + t * w->k_token_stride + h * w->k_head_stride, w->v + t * w->v_token_stride + h * w->v_head_stride);
  }
  return 0;
}

// 0, or -1 when a row needs a block that is not one of the pages, or has fewer tokens than queries.
int millstream_attention8(const MillstreamAttention *a) { return attend<attention::Int8>(*a); }
int millstream_attention4(const MillstreamAttention *a) { return attend<attention::Int4>(*a); }

// Sizes of the argument structs: the caller checks that it sees the same ones.
int64_t millstream_program_abi(int which) {
  const int64_t sizes[] = {sizeof(MillstreamMatrix), sizeof(MillstreamNorm), sizeof(MillstreamGroup),
                           sizeof(MillstreamRope),   sizeof(MillstreamLayer), sizeof(MillstreamStep),
                           sizeof(MillstreamHead),   sizeof(MillstreamProduct), sizeof(MillstreamWriteCodes),
                           sizeof(MillstreamAttention)};
  return which >= 0 && which < 10 ? sizes[which] : -1;
}
}
