// What a layer does to its rows beside products and attention, each in one pass and one call: RMS norm, rotary
// positions, silu(gate) * up. Float32. A row's result has the same bits whoever shares the call: its numbers are taken
// in one fixed order, and threads take whole rows.

#include "attention.h"

extern "C" {

typedef void (*MillstreamParallel)(void (*)(void *), void *, unsigned, unsigned); // GOMP_parallel of the process, or null

struct MillstreamNormRows {
  const float *x, *weight; // x (outer, inner, width), weight (width)
  float *y;                // (outer * inner, width)
  MillstreamParallel parallel;
  int64_t outer, inner, width, outer_stride, inner_stride, num_threads;
  float eps, offset;
};

struct MillstreamTurn {
  const float *x, *cos, *sin; // x (tokens, heads, dim), cos and sin (tokens, half)
  float *y;                   // (tokens, heads, dim)
  MillstreamParallel parallel;
  int64_t tokens, heads, dim, half, token_stride, head_stride, num_threads;
};

struct MillstreamGate {
  const float *gate, *up; // (rows, width)
  float *y;               // (rows, width)
  MillstreamParallel parallel;
  int64_t rows, width, gate_stride, up_stride, num_threads;
};

}

namespace {

using attention::splat;
using attention::Vec;
constexpr int LANES = attention::LANES;

inline Vec load(const float *p) { return attention::Width16::load(p); }
inline void store(float *p, Vec v) { attention::Width16::store(p, v); }

// So many numbers are done before another thread has come.
constexpr int64_t ALONE = 1 << 16;

// `work(first, last)` over all rows, in runs that threads take as they come.
template <class Work>
void over(int64_t rows, int64_t width, MillstreamParallel parallel, int64_t num_threads, const Work &work) {
  if (!parallel || num_threads < 2 || rows < 2 || rows * width < ALONE) return work(0, rows);
  struct Job {
    const Work &work;
    int64_t rows, each;
    std::atomic<int64_t> next{0};
  } job{work, rows, std::max<int64_t>(1, rows / (4 * num_threads))};
  parallel(
      [](void *self) {
        Job &job = *static_cast<Job *>(self);
        for (int64_t first; (first = job.next.fetch_add(job.each, std::memory_order_relaxed)) < job.rows;)
          job.work(first, std::min(job.rows, first + job.each));
      },
      &job, unsigned(num_threads), 0);
}

inline void norm(const float *x, const float *weight, float *y, int64_t width, float eps, float offset) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) squares += load(x + i) * load(x + i);
  float sum = attention::fold_sum(squares);
  for (; i < width; i++) sum += x[i] * x[i];
  const float by = 1.0f / std::sqrt(sum / float(width) + eps);
  for (i = 0; i + LANES <= width; i += LANES) store(y + i, load(x + i) * by * (load(weight + i) + offset));
  for (; i < width; i++) y[i] = x[i] * by * (weight[i] + offset);
}

inline void turn(const float *x, const float *cos, const float *sin, float *y, int64_t dim, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    const float first = x[i], second = x[i + half];
    y[i] = first * cos[i] - second * sin[i];
    y[i + half] = second * cos[i] + first * sin[i];
  }
  for (int64_t i = 2 * half; i < dim; i++) y[i] = x[i];
}

inline Vec silu_mul(Vec gate, Vec up) {
  // exp_of takes at most 88; below -87 silu is as good as zero, and what is not a number stays so.
  const Vec bounded = gate < -87.0f ? splat(-87.0f) : gate > 87.0f ? splat(87.0f) : gate;
  return gate / (1.0f + attention::exp_of(-bounded)) * up;
}

inline void gate(const float *g, const float *u, float *y, int64_t width) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) store(y + i, silu_mul(load(g + i), load(u + i)));
  if (i == width) return;
  float few[3][LANES] = {};
  for (int64_t j = 0; i + j < width; j++) few[0][j] = g[i + j], few[1][j] = u[i + j];
  store(few[2], silu_mul(load(few[0]), load(few[1])));
  for (int64_t j = 0; i + j < width; j++) y[i + j] = few[2][j];
}

} // namespace

extern "C" {

void millstream_norm_rows(const MillstreamNormRows *a) {
  over(a->outer * a->inner, a->width, a->parallel, a->num_threads, [a](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float *x = a->x + row / a->inner * a->outer_stride + row % a->inner * a->inner_stride;
      norm(x, a->weight, a->y + row * a->width, a->width, a->eps, a->offset);
    }
  });
}

void millstream_turn(const MillstreamTurn *a) {
  over(a->tokens, a->heads * a->dim, a->parallel, a->num_threads, [a](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++)
      for (int64_t h = 0; h < a->heads; h++)
        turn(a->x + t * a->token_stride + h * a->head_stride, a->cos + t * a->half, a->sin + t * a->half,
             a->y + (t * a->heads + h) * a->dim, a->dim, a->half);
  });
}

void millstream_gate(const MillstreamGate *a) {
  over(a->rows, a->width, a->parallel, a->num_threads, [a](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
      gate(a->gate + row * a->gate_stride, a->up + row * a->up_stride, a->y + row * a->width, a->width);
  });
}

int64_t millstream_elementwise_abi(int which) {
  return which == 0 ? sizeof(MillstreamNormRows) : which == 1 ? sizeof(MillstreamTurn) : sizeof(MillstreamGate);
}
}
