// What this machine can do at most, in the instructions that the kernels use: how fast memory is read, and how fast
// numbers are multiplied that lie in the first-level cache. `bench ops` holds the kernels against it.
//
// Each function does a stated amount of work on a team of its own and returns nothing but a sum, so that nothing can be
// left out. The caller takes the time.
#include "pool.h"

#include <algorithm>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// One register, and a tile of sums of as many as fit beside their operands: enough to hide how long a product takes.
#if defined(__AVX512F__)
constexpr int WIDTH = 64, ROWS = 12;
#elif defined(__AVX2__)
constexpr int WIDTH = 32, ROWS = 6;
#else
constexpr int WIDTH = 16, ROWS = 6;
#endif
constexpr int COLUMNS = 2, LANES = WIDTH / 4;
// Steps over operands that are gone through again and again: some KB of them.
constexpr int HELD = 64;

typedef float Vec __attribute__((vector_size(WIDTH)));
typedef int32_t Ints __attribute__((vector_size(WIDTH)));
typedef int32_t IntsAny __attribute__((vector_size(WIDTH), aligned(4), may_alias));

struct Reading {
  const char *data;
  int64_t bytes;
  std::atomic<int64_t> sum{0};

  // Each member reads a run of its own, 4 streams of it side by side.
  void work(uint32_t member, uint32_t size) {
    const int64_t lines = bytes / 64 / 4 * 4, from = member * lines / size / 4 * 4, to = (member + 1) * lines / size / 4 * 4;
    const int64_t quarter = (to - from) / 4 * 64;
    const char *at = data + from * 64;
    Ints a = {}, b = {}, c = {}, d = {};
    for (int64_t i = 0; i < quarter; i += WIDTH) {
      a ^= *reinterpret_cast<const IntsAny *>(at + i);
      b ^= *reinterpret_cast<const IntsAny *>(at + quarter + i);
      c ^= *reinterpret_cast<const IntsAny *>(at + 2 * quarter + i);
      d ^= *reinterpret_cast<const IntsAny *>(at + 3 * quarter + i);
    }
    a ^= b ^ c ^ d;
    int32_t all = 0;
    for (int i = 0; i < LANES; i++) all ^= a[i];
    sum.fetch_xor(all, std::memory_order_relaxed);
  }
};

// How a kind of product is made: `Sum` from a vector and one value for all of its lanes.
struct Bytes {
  typedef Ints Sum;
  typedef int32_t One;
  static constexpr int64_t OPS = 2 * WIDTH; // four bytes in each lane
  static One vector_value(int i) { return 0x01020304 * (i % 3); }
  static One row_value(int i) { return 0x01FF02FE ^ i; }
  static Sum multiply(Sum sum, Sum u, One row) {
    const Sum q = row - Sum{};
#if defined(__AVX512VNNI__)
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)q);
#elif defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)u, (__m512i)q);
    return (Sum)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)q);
    return (Sum)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    for (int i = 0; i < 4; i++) sum += ((u >> (8 * i)) & 255) * ((q << (24 - 8 * i)) >> 24);
    return sum;
#endif
  }
};

struct Floats {
  typedef Vec Sum;
  typedef float One;
  static constexpr int64_t OPS = 2 * LANES;
  static One vector_value(int i) { return 1e-3f * float(i % 5); }
  static One row_value(int i) { return 1.0f - 0.03f * float(i); }
  // Contracted to one instruction where the machine has it.
  static Sum multiply(Sum sum, Sum u, One row) { return u * row + sum; }
};

#if defined(__AVX512BF16__)
struct Halves {
  typedef Vec Sum;
  typedef int32_t One;
  static constexpr int64_t OPS = 2 * 32; // two bfloat16 in each of 16 lanes
  static One vector_value(int i) { return 0x3C003C00 + i % 5; }
  static One row_value(int i) { return 0x3F803F80 - i; }
  static Sum multiply(Sum sum, Sum u, One row) {
    return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)u, (__m512bh)_mm512_set1_epi32(row));
  }
};
#endif

template <class Kind> struct Peak {
  typedef typename Kind::Sum Sum;
  int64_t rounds;
  std::atomic<int64_t> sum{0};
  static constexpr int64_t OPS = HELD * ROWS * COLUMNS * Kind::OPS;

  void work(uint32_t member, uint32_t) {
    alignas(64) typename Kind::One vectors[HELD * COLUMNS * LANES], rows[HELD + ROWS];
    for (int i = 0; i < HELD * COLUMNS * LANES; i++) vectors[i] = Kind::vector_value(i + int(member));
    for (int i = 0; i < HELD + ROWS; i++) rows[i] = Kind::row_value(i);
    Sum acc[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < COLUMNS; c++) acc[r][c] = Sum{};
    for (int64_t round = 0; round < rounds; round++)
      for (int k = 0; k < HELD; k++) {
        Sum u[COLUMNS];
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; c++) std::memcpy(&u[c], vectors + (k * COLUMNS + c) * LANES, sizeof(Sum));
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
          for (int c = 0; c < COLUMNS; c++) acc[r][c] = Kind::multiply(acc[r][c], u[c], rows[k + r]);
      }
    double all = 0;
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < COLUMNS; c++)
        for (int i = 0; i < LANES; i++) all += double(acc[r][c][i]);
    sum.fetch_add(int64_t(all), std::memory_order_relaxed);
  }
};

template <class Job> int64_t run(Job &job, int64_t threads) {
  pool::team().run([](void *self, uint32_t member, uint32_t size) { static_cast<Job *>(self)->work(member, size); }, &job,
                   uint32_t(std::max<int64_t>(1, threads)));
  return job.sum.load();
}

} // namespace

extern "C" {

// Reads `bytes` of `data` once.
int64_t millstream_read(const void *data, int64_t bytes, int64_t threads) {
  Reading job{static_cast<const char *>(data), bytes};
  return run(job, threads);
}

// `rounds` times as many operations as `millstream_peak_ops` says, by each thread. Kinds: 0 products of bytes, 1 of
// float32, 2 of bfloat16.
int64_t millstream_peak(int64_t kind, int64_t rounds, int64_t threads) {
  if (kind == 0) {
    Peak<Bytes> job{rounds};
    return run(job, threads);
  }
  if (kind == 1) {
    Peak<Floats> job{rounds};
    return run(job, threads);
  }
#if defined(__AVX512BF16__)
  Peak<Halves> job{rounds};
  return run(job, threads);
#else
  return 0;
#endif
}

// Operations of one round by one thread, multiply and add counted apart; 0 where the machine has no such instruction.
int64_t millstream_peak_ops(int64_t kind) {
  if (kind == 0) return Peak<Bytes>::OPS;
  if (kind == 1) return Peak<Floats>::OPS;
#if defined(__AVX512BF16__)
  return Peak<Halves>::OPS;
#else
  return 0;
#endif
}
}
