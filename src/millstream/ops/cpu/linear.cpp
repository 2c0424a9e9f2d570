// y = x W^T + bias over row-major float32 matrices: x (rows, inputs), W (outputs, inputs), y (rows, outputs).
//
// Every output is the sum of LANES interleaved partial sums over the inputs, each in rising order, folded in one fixed
// way. How rows and outputs are cut into tiles, and which thread takes which, only decides when a sum is made and never
// how: a row's result has the same bits whoever shares the batch.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

extern "C" {

struct MillstreamLinear {
  const float *x;
  const float *weight;
  const float *bias; // (outputs), or null
  float *y;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned); // GOMP_parallel of the process, or null
  int64_t x_stride, weight_stride, y_stride; // floats from one row to the next
  int64_t rows, inputs, outputs, num_threads;
};

}

namespace {

// Wide vectors where they are one register; the tile is what fits the registers beside one row of operands.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 6;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 3;
#else
constexpr int LANES = 4, TILE_ROWS = 3;
#endif
constexpr int TILE_OUTPUTS = 4;
// Outputs that one thread takes at a time: few enough that their weights stay in the second-level cache while all rows
// pass, many enough that the rows are not fetched too often.
constexpr int64_t CHUNK = 32;
// Floats of the inputs that are kept at hand meanwhile.
constexpr int64_t CACHED = 64 * 1024;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float VecAny __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));

inline Vec load(const float *p) { return *reinterpret_cast<const VecAny *>(p); }

// Keeps a loaded vector in a register: GCC would rather read it from memory again for each product.
#if defined(__AVX512F__)
#define HELD(v) asm("" : "+v"(v))
#elif defined(__x86_64__)
#define HELD(v) asm("" : "+x"(v))
#elif defined(__aarch64__)
#define HELD(v) asm("" : "+w"(v))
#else
#define HELD(v)
#endif

inline Vec load_some(const float *p, int64_t n) {
  float held[LANES] = {};
  std::memcpy(held, p, size_t(n) * sizeof(float));
  return load(held);
}

// One step of folding two vectors into one. Each holds groups of `group` lanes that are to be summed; the halves of every
// group are added, those of `a` going below, those of `b` above.
template <int group> inline Vec halve(Vec a, Vec b) {
  IntVec low, high;
  for (int i = 0; i < LANES; i++) {
    const int lane = i % (LANES / 2), from = (i < LANES / 2 ? 0 : LANES) + lane / (group / 2) * group + lane % (group / 2);
    low[i] = from, high[i] = from + group / 2;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// The four outputs of a row to one vector, a quarter of its lanes to each.
inline Vec fold(const Vec *acc) { return halve<LANES / 2>(halve<LANES>(acc[0], acc[1]), halve<LANES>(acc[2], acc[3])); }

// The sums of four rows of four outputs, from what `fold` left of each row.
inline void finish(const Vec *rows, float *sums) {
#if defined(__AVX512F__)
  const Vec all = halve<2>(halve<4>(rows[0], rows[1]), halve<4>(rows[2], rows[3]));
  std::memcpy(sums, &all, sizeof all);
#elif defined(__AVX__)
  for (int r = 0; r < 4; r += 2) {
    const Vec two = halve<2>(rows[r], rows[r + 1]);
    std::memcpy(sums + r * 4, &two, sizeof two);
  }
#else
  std::memcpy(sums, rows, 4 * sizeof(Vec));
#endif
}

template <int R>
inline void tile(const MillstreamLinear &a, int64_t row, int64_t output, int num_outputs) {
  const float *x[R], *w[TILE_OUTPUTS];
  for (int r = 0; r < R; r++) x[r] = a.x + (row + r) * a.x_stride;
  // Outputs beyond the last are computed as copies of it and not stored.
  for (int o = 0; o < TILE_OUTPUTS; o++) w[o] = a.weight + (output + std::min(o, num_outputs - 1)) * a.weight_stride;
  // The weights of the next outputs: the hardware sees short runs only.
  const int64_t ahead = 2 * TILE_OUTPUTS * a.weight_stride;
  Vec acc[R][TILE_OUTPUTS] = {};
  int64_t i = 0;
  for (; i + LANES <= a.inputs; i += LANES) {
    Vec wide[TILE_OUTPUTS];
#pragma GCC unroll 4
    for (int o = 0; o < TILE_OUTPUTS; o++) {
      wide[o] = load(w[o] + i);
      HELD(wide[o]);
      __builtin_prefetch(w[o] + i + ahead);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      Vec v = load(x[r] + i);
      HELD(v);
#pragma GCC unroll 4
      for (int o = 0; o < TILE_OUTPUTS; o++) acc[r][o] += v * wide[o];
    }
  }
  if (i < a.inputs) {
    const int64_t n = a.inputs - i;
    Vec wide[TILE_OUTPUTS];
    for (int o = 0; o < TILE_OUTPUTS; o++) wide[o] = load_some(w[o] + i, n);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const Vec v = load_some(x[r] + i, n);
#pragma GCC unroll 4
      for (int o = 0; o < TILE_OUTPUTS; o++) acc[r][o] += v * wide[o];
    }
  }
  Vec folded[(R + 3) / 4 * 4] = {};
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) folded[r] = fold(acc[r]);
  for (int r = 0; r < R; r += 4) {
    float sums[16];
    finish(folded + r, sums);
    for (int i = r; i < std::min(R, r + 4); i++) {
      float *y = a.y + (row + i) * a.y_stride + output, *sum = sums + (i - r) * TILE_OUTPUTS;
      if (a.bias)
        for (int o = 0; o < num_outputs; o++) sum[o] += a.bias[output + o];
      if (num_outputs == TILE_OUTPUTS) std::memcpy(y, sum, TILE_OUTPUTS * sizeof(float));
      else std::memcpy(y, sum, size_t(num_outputs) * sizeof(float));
    }
  }
}

struct Job {
  const MillstreamLinear &a;
  std::atomic<int64_t> next{0};

  void work() {
    // Rows that pass at a time: their inputs stay in the second-level cache beside the weights of a chunk.
    const int64_t block = std::max<int64_t>(TILE_ROWS, CACHED / std::max<int64_t>(1, a.inputs) / TILE_ROWS * TILE_ROWS);
    const int64_t chunks = (a.outputs + CHUNK - 1) / CHUNK, blocks = (a.rows + block - 1) / block;
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < chunks * blocks;) {
      const int64_t from = unit % chunks * CHUNK, to = std::min(a.outputs, from + CHUNK);
      const int64_t first = unit / chunks * block, count = std::min(block, a.rows - first);
      const int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
      for (int64_t t = 0; t < tiles; t++) {
        // Tiles of even height: six and two rows would cost more than four and four.
        const int64_t row = t * count / tiles, n = (t + 1) * count / tiles - row;
        for (int64_t o = from; o < to; o += TILE_OUTPUTS)
          rows(n, first + row, o, int(std::min<int64_t>(TILE_OUTPUTS, to - o)));
      }
    }
  }

  void rows(int64_t n, int64_t row, int64_t output, int num_outputs) const {
    switch (n) {
    case 1: return tile<1>(a, row, output, num_outputs);
    case 2: return tile<2>(a, row, output, num_outputs);
    case 3: return tile<3>(a, row, output, num_outputs);
#if defined(__AVX512F__)
    case 4: return tile<4>(a, row, output, num_outputs);
    case 5: return tile<5>(a, row, output, num_outputs);
    default: return tile<6>(a, row, output, num_outputs);
#endif
    }
  }
};

} // namespace

extern "C" {

void millstream_linear(const MillstreamLinear *a) {
  Job job{*a};
  // Waking a team costs more than a small product.
  if (a->parallel && a->num_threads > 1 && a->rows * a->inputs * a->outputs > 200000)
    a->parallel([](void *self) { static_cast<Job *>(self)->work(); }, &job, unsigned(a->num_threads), 0);
  else
    job.work();
}

int64_t millstream_linear_abi() { return sizeof(MillstreamLinear); }
}
