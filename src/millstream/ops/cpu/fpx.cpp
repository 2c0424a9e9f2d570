// y = x W^T + bias for matrices of small floats: a sign, E bits of exponent, M of mantissa, 5 or 6 bits together, and a
// scale for each output (FP6-LLM).
//
// A code is looked up, not computed: every value of such a format is a small whole number of steps, the step being its
// smallest value. Rows of x are whole numbers as well, of 31 bits for each RUN of 64 inputs, in two halves of 16. So a run
// is two exact sums of products of 16 bits, and float32 begins where runs are added up: in one order, run after run. How
// rows and outputs are cut into tiles, and whether codes are multiplied as they are looked up (few rows) or a panel is
// expanded first (many), never changes a bit of a row.
//
// Codes lie in two regions, the low four bits of each and what is above them, both in the order in which they are read.
// Outputs go by WIDE panels of 16 and inputs by runs. A vector of 64 codes is 16 outputs by 4 inputs: of output 4 l + o
// and input 2 h + k it has place 16 l + 8 h + 2 o + k. The low region has for each panel of a run 8 x 64 bytes, each with
// one vector in its low and the next in its high half; the high region likewise, one or two bits a vector.
#include "int8.h"
#include "pool.h"

extern "C" {

// Mirrored in fpx.py. Strides are in floats.
struct MillstreamFpx {
  const uint8_t *low, *high;
  const uint16_t *scale;  // (outputs), half precision
  const int16_t *values;  // (64) steps by code; with fewer codes they are there again
  const float *x;
  const float *bias;      // (outputs), or null
  float *y;
  void *scratch;          // millstream_fpx_scratch bytes
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned); // GOMP_parallel of the process, or null
  int64_t x_stride, y_stride, rows, inputs, outputs, high_bits, num_threads;
  int64_t direct_rows; // up to so many rows are multiplied without expanding a panel
  float step;
  int32_t unused;
};

// Rows `which` of the matrix, (rows, inputs) floats.
struct MillstreamFpxRows {
  const uint8_t *low, *high;
  const uint16_t *scale;
  const int16_t *values;
  const int64_t *which;
  float *y;
  int64_t rows, inputs, outputs, high_bits;
  float step;
  int32_t unused;
};

}

namespace {

using int8::fma;
using int8::Ints;
using int8::IntsAny;
using int8::load;
using int8::splat;
using int8::store;
using int8::Vec;

constexpr int PANEL = 16, WIDE = 2, RUN = 64, VECTORS = RUN / 4, WIDTH = WIDE * PANEL;
// Rows multiplied together: two sums for each panel of each stay in registers.
#if defined(__AVX512F__)
constexpr int TILE = 6, DIRECT = 3;
#else
constexpr int TILE = 2, DIRECT = 1;
#endif
constexpr int64_t ROWS = 96; // rows that pass an expanded run, so that their sums stay in the first-level cache
constexpr int64_t AHEAD = 4096;

inline int64_t runs_of(int64_t inputs) { return (inputs + RUN - 1) / RUN; }
inline int64_t pairs_of(int64_t outputs) { return (outputs + WIDTH - 1) / WIDTH; }

// Adds to each of 16 sums the products of its two signed 16-bit numbers of `w` with those of `x`.
inline Ints dot16(Ints sum, Ints w, Ints x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
  return sum + (Ints)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  __m256i a[2], b[2], sums[2];
  std::memcpy(a, &w, 64), std::memcpy(b, &x, 64), std::memcpy(sums, &sum, 64);
  for (int h = 0; h < 2; h++) sums[h] = _mm256_add_epi32(sums[h], _mm256_madd_epi16(a[h], b[h]));
  std::memcpy(&sum, sums, 64);
  return sum;
#elif defined(__SSE2__)
  __m128i a[4], b[4], sums[4];
  std::memcpy(a, &w, 64), std::memcpy(b, &x, 64), std::memcpy(sums, &sum, 64);
  for (int h = 0; h < 4; h++) sums[h] = _mm_add_epi32(sums[h], _mm_madd_epi16(a[h], b[h]));
  std::memcpy(&sum, sums, 64);
  return sum;
#else
  return sum + ((w << 16) >> 16) * ((x << 16) >> 16) + (w >> 16) * (x >> 16);
#endif
}

// What codes stand for, ready to be looked up: the low and the high bytes of 64 numbers of 16 bits.
struct Lookup {
#if defined(__AVX512VBMI__)
  __m512i low, high;

  explicit Lookup(const int16_t *values) {
    alignas(64) uint8_t bytes[2][64];
    for (int i = 0; i < 64; i++) bytes[0][i] = uint8_t(values[i]), bytes[1][i] = uint8_t(values[i] >> 8);
    low = _mm512_load_si512(bytes[0]), high = _mm512_load_si512(bytes[1]);
  }

  // 64 codes to two vectors of 32 numbers: inputs 0 and 1, inputs 2 and 3 of 16 outputs. Bits above the sixth do not count.
  inline void find(Ints codes, Ints &first, Ints &second) const {
    const __m512i a = _mm512_permutexvar_epi8((__m512i)codes, low), b = _mm512_permutexvar_epi8((__m512i)codes, high);
    first = (Ints)_mm512_unpacklo_epi8(a, b), second = (Ints)_mm512_unpackhi_epi8(a, b);
  }
#elif defined(__AVX2__)
  // Sixteen values are looked up at once: four tables of low bytes and of high ones, chosen from by the upper bits.
  __m256i table[2][4];

  explicit Lookup(const int16_t *values) {
    for (int t = 0; t < 4; t++) {
      uint8_t bytes[2][32];
      for (int i = 0; i < 32; i++) {
        bytes[0][i] = uint8_t(values[t * 16 + i % 16]), bytes[1][i] = uint8_t(values[t * 16 + i % 16] >> 8);
      }
      std::memcpy(&table[0][t], bytes[0], 32), std::memcpy(&table[1][t], bytes[1], 32);
    }
  }

  inline void find(Ints codes, Ints &first, Ints &second) const {
    __m256i code[2], found[2][2];
    std::memcpy(code, &codes, 64);
    for (int h = 0; h < 2; h++) {
      const __m256i place = _mm256_and_si256(code[h], _mm256_set1_epi8(15));
      // The top bit of each byte chooses: the fifth bit of the code, then the sixth.
      const __m256i fifth = _mm256_slli_epi16(code[h], 3), sixth = _mm256_slli_epi16(code[h], 2);
      __m256i bytes[2];
      for (int b = 0; b < 2; b++) {
        const __m256i lower = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[b][0], place),
                                                 _mm256_shuffle_epi8(table[b][1], place), fifth);
        const __m256i upper = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[b][2], place),
                                                 _mm256_shuffle_epi8(table[b][3], place), fifth);
        bytes[b] = _mm256_blendv_epi8(lower, upper, sixth);
      }
      found[0][h] = _mm256_unpacklo_epi8(bytes[0], bytes[1]), found[1][h] = _mm256_unpackhi_epi8(bytes[0], bytes[1]);
    }
    std::memcpy(&first, found[0], 64), std::memcpy(&second, found[1], 64);
  }
#else
  const int16_t *values;

  explicit Lookup(const int16_t *of) : values(of) {}

  inline void find(Ints codes, Ints &first, Ints &second) const {
    uint8_t bytes[64];
    int16_t found[2][32];
    std::memcpy(bytes, &codes, 64);
    for (int l = 0; l < 4; l++)
      for (int i = 0; i < 8; i++) {
        found[0][l * 8 + i] = values[bytes[l * 16 + i] & 63];
        found[1][l * 8 + i] = values[bytes[l * 16 + 8 + i] & 63];
      }
    std::memcpy(&first, found[0], 64), std::memcpy(&second, found[1], 64);
  }
#endif
};

// Where one run of WIDE panels lies.
struct Codes {
  const uint8_t *low, *high;
};

constexpr int64_t low_bytes() { return int64_t(VECTORS) / 2 * WIDE * 64; }
constexpr int64_t high_bytes(int64_t bits) { return int64_t(VECTORS) * bits / 8 * WIDE * 64; }

// Vector number `v` of a run, panel `c`: four bits of one region and the rest of the other, stitched together.
template <int BITS> inline Ints stitch(const Codes &from, int v, int c) {
  constexpr int EACH = 8 / BITS; // vectors in one byte of the high region
  const Ints low = *reinterpret_cast<const IntsAny *>(from.low + (v / 2 * WIDE + c) * 64);
  const Ints high = *reinterpret_cast<const IntsAny *>(from.high + (v / EACH * WIDE + c) * 64);
  const int up = 4 - v % EACH * BITS;
  const Ints a = v % 2 ? (low >> 4) : low, b = up >= 0 ? (high << std::max(up, 0)) : (high >> std::max(-up, 0));
  const Ints mask = int8::same(0x0F0F0F0F);
  return (a & mask) | (b & ~mask);
}

inline void fetch(const Codes &from, int64_t bits) {
  for (int64_t i = 0; i < low_bytes(); i += 64) __builtin_prefetch(from.low + AHEAD + i, 0, 3);
  for (int64_t i = 0; i < high_bytes(bits); i += 64) __builtin_prefetch(from.high + AHEAD * bits / 4 + i, 0, 3);
}

// Rows of x as whole numbers: for each pair of inputs two of 16 bits, high and low halves apart; a scale for each run.
struct Digits {
  int32_t *high, *low; // (rows, runs * RUN / 2)
  float *scale;        // (rows, runs)
  int64_t runs;
};

typedef int16_t Shorts __attribute__((vector_size(32)));

inline void take_apart(const float *x, int64_t inputs, int64_t runs, int32_t *high, int32_t *low, float *scale) {
  constexpr int PARTS = RUN / 16;
  for (int64_t g = 0; g < runs; g++) {
    const int64_t n = std::min<int64_t>(RUN, inputs - g * RUN);
    float some[RUN] = {}, lanes[16];
    if (n < RUN) std::memcpy(some, x + g * RUN, size_t(n) * sizeof(float));
    const float *at = n < RUN ? some : x + g * RUN;
    Vec top = {};
    Ints odd = {};
    for (int i = 0; i < PARTS; i++) {
      const Vec v = load(at + i * 16), size = v < 0.0f ? -v : v;
      top = size > top ? size : top;
      odd |= v != v;
    }
    store(lanes, top);
    float most = 0.0f;
    bool sound = true;
    for (int i = 0; i < 16; i++) most = std::max(most, lanes[i]), sound &= odd[i] == 0;
    sound &= most <= 3.4e38f;
    // A power of two, so that only the lowest digits of what is far smaller than the largest are lost, and of what is
    // below 2^-96 anyway.
    int exponent = 0;
    std::frexp(sound ? most : 0.0f, &exponent);
    const float up = std::ldexp(1.0f, std::min(30 - exponent, 126));
    scale[g] = sound ? 1.0f / up : NAN;
    for (int i = 0; i < PARTS; i++) {
      const Ints whole = sound ? __builtin_convertvector(load(at + i * 16) * up, Ints) : Ints{};
      const Ints h = (whole + 32768) >> 16;
      const Shorts upper = __builtin_convertvector(h, Shorts), lower = __builtin_convertvector(whole - (h << 16), Shorts);
      std::memcpy(high + g * RUN / 2 + i * 8, &upper, 32), std::memcpy(low + g * RUN / 2 + i * 8, &lower, 32);
    }
  }
}

// What one run of one panel adds to a row's sums.
inline void add(Ints high, Ints low, float scale, float *y) {
  const Vec total = fma(__builtin_convertvector(high, Vec), splat(65536.0f), __builtin_convertvector(low, Vec));
  store(y, fma(total, splat(scale), load(y)));
}

// R rows times one run, codes looked up on the way.
template <int R, int BITS>
inline void direct(const Lookup &lookup, const Codes &from, const Digits &x, int64_t row, int64_t run, float *y) {
  constexpr int CHAINS = R == 1 ? 2 : 1; // sums that depend on each other would be waited for
  Ints high[R][WIDE][CHAINS] = {}, low[R][WIDE][CHAINS] = {};
  const int32_t *h[R], *l[R];
  for (int r = 0; r < R; r++) {
    h[r] = x.high + ((row + r) * x.runs + run) * (RUN / 2);
    l[r] = x.low + ((row + r) * x.runs + run) * (RUN / 2);
  }
#pragma GCC unroll 16
  for (int v = 0; v < VECTORS; v++) {
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++) {
      Ints w[2];
      lookup.find(stitch<BITS>(from, v, c), w[0], w[1]);
#pragma GCC unroll 3
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          Ints &to_high = high[r][c][i % CHAINS], &to_low = low[r][c][i % CHAINS];
          to_high = dot16(to_high, w[i], int8::same(h[r][2 * v + i]));
          to_low = dot16(to_low, w[i], int8::same(l[r][2 * v + i]));
        }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++) {
      Ints all_high = high[r][c][0], all_low = low[r][c][0];
      if (CHAINS == 2) all_high += high[r][c][CHAINS - 1], all_low += low[r][c][CHAINS - 1];
      add(all_high, all_low, x.scale[(row + r) * x.runs + run], y + (r * WIDE + c) * PANEL);
    }
}

// One run of WIDE panels as numbers.
struct Expanded {
  alignas(64) Ints w[VECTORS * 2][WIDE];
};

template <int BITS> inline void expand(const Lookup &lookup, const Codes &from, Expanded &to) {
#pragma GCC unroll 16
  for (int v = 0; v < VECTORS; v++)
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++) lookup.find(stitch<BITS>(from, v, c), to.w[2 * v][c], to.w[2 * v + 1][c]);
}

// R rows times a run that was expanded.
template <int R>
inline void multiply(const Expanded &panel, const Digits &x, int64_t row, int64_t run, float *y) {
  Ints high[R][WIDE] = {}, low[R][WIDE] = {};
  const int32_t *h = x.high + (row * x.runs + run) * (RUN / 2), *l = x.low + (row * x.runs + run) * (RUN / 2);
  const int64_t stride = x.runs * (RUN / 2);
  for (int i = 0; i < RUN / 2; i++) {
    Ints w[WIDE];
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++) w[c] = panel.w[i][c];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const Ints a = int8::same(h[r * stride + i]), b = int8::same(l[r * stride + i]);
#pragma GCC unroll 2
      for (int c = 0; c < WIDE; c++) high[r][c] = dot16(high[r][c], w[c], a), low[r][c] = dot16(low[r][c], w[c], b);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int c = 0; c < WIDE; c++)
      add(high[r][c], low[r][c], x.scale[(row + r) * x.runs + run], y + (r * WIDE + c) * PANEL);
}

template <int R>
inline void multiply_rows(int64_t n, const Expanded &panel, const Digits &x, int64_t row, int64_t run, float *y) {
  if constexpr (R > 1)
    if (n < R) return multiply_rows<R - 1>(n, panel, x, row, run, y);
  multiply<R>(panel, x, row, run, y);
}

template <int R, int BITS>
inline void direct_rows(int64_t n, const Lookup &lookup, const Codes &from, const Digits &x, int64_t row, int64_t run,
                        float *y) {
  if constexpr (R > 1)
    if (n < R) return direct_rows<R - 1, BITS>(n, lookup, from, x, row, run, y);
  direct<R, BITS>(lookup, from, x, row, run, y);
}

inline Digits digits_at(void *memory, int64_t rows, int64_t inputs) {
  const int64_t runs = runs_of(inputs);
  int32_t *high = static_cast<int32_t *>(memory), *low = high + rows * runs * (RUN / 2);
  return {high, low, reinterpret_cast<float *>(low + rows * runs * (RUN / 2)), runs};
}

struct Job {
  const MillstreamFpx &a;
  const Digits x;
  const Lookup lookup;
  std::vector<std::atomic<int64_t>> taken;
  std::atomic<uint32_t> arrived{0};
  uint32_t size;

  Job(const MillstreamFpx &args, uint32_t threads)
      : a(args), x(digits_at(args.scratch, args.rows, args.inputs)), lookup(args.values), taken(2 * threads),
        size(threads) {}

  int64_t blocks() const { return (a.rows + ROWS - 1) / ROWS; }

  void take_apart_rows() {
    const uint32_t member = arrived.fetch_add(1) % size;
    pool::Shares{taken.data(), member, size}.each(a.rows, [&](int64_t r) {
      take_apart(a.x + r * a.x_stride, a.inputs, x.runs, x.high + r * x.runs * (RUN / 2), x.low + r * x.runs * (RUN / 2),
                 x.scale + r * x.runs);
    });
  }

  void products() {
    const uint32_t member = arrived.fetch_add(1) % size;
    pool::Shares{taken.data() + size, member, size}.each(pairs_of(a.outputs) * blocks(), [&](int64_t unit) {
      if (a.high_bits == 2) this->unit<2>(unit);
      else this->unit<1>(unit);
    });
  }

  template <int BITS> void unit(int64_t number) const {
    const int64_t pair = number % pairs_of(a.outputs), block = number / pairs_of(a.outputs);
    const int64_t first = block * a.rows / blocks(), n = (block + 1) * a.rows / blocks() - first;
    const int64_t tile = n <= a.direct_rows ? DIRECT : TILE, tiles = (n + tile - 1) / tile;
    alignas(64) static thread_local float y[(ROWS + 1) * WIDTH];
    static thread_local Expanded panel;
    std::memset(y, 0, size_t(n * WIDTH) * sizeof(float));
    for (int64_t g = 0; g < x.runs; g++) {
      const Codes from{a.low + (pair * x.runs + g) * low_bytes(), a.high + (pair * x.runs + g) * high_bytes(BITS)};
      fetch(from, BITS);
      if (n > a.direct_rows) expand<BITS>(lookup, from, panel);
      for (int64_t t = 0; t < tiles; t++) {
        // Tiles of even height.
        const int64_t row = t * n / tiles, height = (t + 1) * n / tiles - row;
        if (n > a.direct_rows) multiply_rows<TILE>(height, panel, x, first + row, g, y + row * WIDTH);
        else direct_rows<DIRECT, BITS>(height, lookup, from, x, first + row, g, y + row * WIDTH);
      }
    }
    const int64_t output = pair * WIDTH, count = std::min<int64_t>(WIDTH, a.outputs - output);
    alignas(64) float by[WIDTH] = {}, bias[WIDTH] = {};
    for (int64_t o = 0; o < count; o++) by[o] = int8::half_to_float(a.scale[output + o]) * a.step;
    if (a.bias) std::memcpy(bias, a.bias + output, size_t(count) * sizeof(float));
    for (int64_t r = 0; r < n; r++) {
      float *sums = y + r * WIDTH;
      for (int o = 0; o < WIDTH; o += PANEL) store(sums + o, fma(load(sums + o), load(by + o), load(bias + o)));
      std::memcpy(a.y + (first + r) * a.y_stride + output, sums, size_t(count) * sizeof(float));
    }
  }
};

} // namespace

extern "C" {

int64_t millstream_fpx_scratch(int64_t rows, int64_t inputs) {
  return rows * runs_of(inputs) * (2 * RUN / 2 * int64_t(sizeof(int32_t)) + int64_t(sizeof(float)));
}

void millstream_fpx(const MillstreamFpx *a) {
  if (a->rows <= 0) return;
  // Waking a team costs more than a small product.
  const bool alone = !a->parallel || a->num_threads <= 1 || a->rows * a->inputs * a->outputs <= 200000;
  Job job{*a, alone ? 1u : uint32_t(a->num_threads)};
  const bool few = alone || a->rows * a->inputs <= 16384;
  if (few) job.take_apart_rows();
  else a->parallel([](void *self) { static_cast<Job *>(self)->take_apart_rows(); }, &job, job.size, 0);
  job.arrived = 0;
  if (alone) job.products();
  else a->parallel([](void *self) { static_cast<Job *>(self)->products(); }, &job, job.size, 0);
}

// 0, or -1 when one of them is beyond the matrix; nothing is written then.
int millstream_fpx_rows(const MillstreamFpxRows *a) {
  for (int64_t r = 0; r < a->rows; r++)
    if (a->which[r] < 0 || a->which[r] >= a->outputs) return -1;
  const int64_t runs = runs_of(a->inputs), each = 8 / a->high_bits;
  for (int64_t r = 0; r < a->rows; r++) {
    const int64_t output = a->which[r], pair = output / WIDTH, c = output % WIDTH / PANEL, lane = output % PANEL;
    const float by = int8::half_to_float(a->scale[output]) * a->step;
    for (int64_t i = 0; i < a->inputs; i++) {
      const int64_t g = pair * runs + i / RUN, v = i % RUN / 4;
      const int64_t place = lane / 4 * 16 + i % 4 / 2 * 8 + lane % 4 * 2 + i % 2;
      const uint8_t low = a->low[g * low_bytes() + (v / 2 * WIDE + c) * 64 + place];
      const uint8_t high = a->high[g * high_bytes(a->high_bits) + (v / each * WIDE + c) * 64 + place];
      const int code = (low >> (v % 2 * 4) & 15) | (high >> (v % each * a->high_bits) & ((1 << a->high_bits) - 1)) << 4;
      a->y[r * a->inputs + i] = float(a->values[code]) * by;
    }
  }
  return 0;
}

int64_t millstream_fpx_abi(int which) { return which == 0 ? sizeof(MillstreamFpx) : sizeof(MillstreamFpxRows); }
}
