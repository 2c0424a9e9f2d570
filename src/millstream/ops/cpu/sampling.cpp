// One token for each of some rows of logits: temperature, top-k, min-p, top-p, and a race decided by counter-based noise.
//
// Arithmetic is in double. A token's key in the race is its logprob minus log(-log(u)), where u is a function of (seed,
// index, position, token) alone: ops/ref/random.py. Since -log(u) >= 1 - u, a token can only win while 1 - u is less than
// exp(logprob - best so far), and logarithms are taken of those few.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" {

struct MillstreamAsk {
  uint64_t state; // after (seed, index, position)
  double temperature, top_p, min_p;
  int64_t top_k, row;
};

struct MillstreamSampling {
  const float *logits; // (rows, vocabulary), stride in floats
  const MillstreamAsk *asks;
  int64_t *tokens;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned); // GOMP_parallel of the process, or null
  int64_t stride, vocabulary, num_asks, num_threads;
};

}

namespace {

constexpr int LANES = 8;
typedef double Vec __attribute__((vector_size(64)));
typedef double VecAny __attribute__((vector_size(64), aligned(8), may_alias));
typedef uint64_t Words __attribute__((vector_size(64)));
typedef int64_t Ints __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32)));

inline Vec splat(double x) { return x - Vec{}; }

// exp(x) for x <= 0, relative error below 1e-15; below -700 it is zero.
inline Vec exp_of(Vec x) {
  const Ints gone = x < -700.0;
  x = gone ? splat(-700.0) : x;
  const Vec magic = splat(6755399441055744.0); // 1.5 * 2^52: adding it rounds to an integer in the low mantissa bits
  const Vec shifted = x * 1.4426950408889634 + magic, n = shifted - magic;
  const Vec r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  Vec p = splat(1.0 / 6227020800.0);
  const double terms[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                          1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0,
                          0.5,               1.0,              1.0};
  for (const double term : terms) p = p * r + term;
  const Vec out = (Vec)((Ints)p + (((Ints)shifted - (Ints)magic) << 52));
  return gone ? Vec{} : out;
}

inline Words mix(Words z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The numbers in [0, 1) of LANES tokens that follow each other.
inline Vec uniform(uint64_t state, int64_t first) {
  const Words token = Words{0, 1, 2, 3, 4, 5, 6, 7} + uint64_t(first);
  const Ints bits = (Ints)(mix((token ^ state) + 0x9e3779b97f4a7c15u) >> 11);
  return __builtin_convertvector(bits, Vec) * 0x1p-53;
}

int64_t sample(const float *logits, int64_t vocabulary, const MillstreamAsk &ask) {
  static thread_local std::vector<double> weights, kept;
  static thread_local std::vector<float> ordered;
  const int64_t padded = (vocabulary + LANES - 1) / LANES * LANES;
  weights.resize(size_t(padded));
  float most = logits[0];
  for (int64_t i = 1; i < vocabulary; i++) most = logits[i] > most ? logits[i] : most;
  // Weights: probabilities but for a factor, the likeliest token's is 1.
  for (int64_t i = 0; i < padded; i += LANES) {
    Half some = Half{} - INFINITY;
    std::memcpy(&some, logits + i, size_t(std::min<int64_t>(LANES, vocabulary - i)) * sizeof(float));
    const Vec x = (__builtin_convertvector(some, Vec) - double(most)) / ask.temperature;
    *reinterpret_cast<VecAny *>(&weights[size_t(i)]) = exp_of(x);
  }
  float least_logit = -INFINITY; // top-k, by logits: which of equals is cut must not depend on a sort
  if (ask.top_k > 0 && ask.top_k < vocabulary) {
    ordered.assign(logits, logits + vocabulary);
    std::nth_element(ordered.begin(), ordered.begin() + (ask.top_k - 1), ordered.end(), std::greater<float>());
    least_logit = ordered[size_t(ask.top_k - 1)];
    for (int64_t i = 0; i < vocabulary; i++)
      if (logits[i] < least_logit) weights[size_t(i)] = 0.0;
  }
  double least = ask.min_p > 0.0 ? ask.min_p : 0.0;
  if (ask.top_p < 1.0) {
    double sum = 0.0;
    for (int64_t i = 0; i < vocabulary; i++) sum += weights[size_t(i)] >= least ? weights[size_t(i)] : 0.0;
    const double wanted = ask.top_p * sum;
    // Most sets are found among the likely tokens; the whole vocabulary is sorted only when they do not reach it.
    for (double floor = 1e-3;; floor *= 1e-3) {
      const double from = floor < 1e-12 ? 0.0 : floor;
      kept.clear();
      double held = 0.0;
      for (int64_t i = 0; i < vocabulary; i++) {
        const double w = weights[size_t(i)];
        if (w >= from && w >= least && w > 0.0) kept.push_back(w), held += w;
      }
      if (held < wanted && from > 0.0) continue;
      std::sort(kept.begin(), kept.end(), std::greater<double>());
      double reached = 0.0;
      size_t last = 0;
      for (; last + 1 < kept.size(); last++)
        if ((reached += kept[last]) >= wanted) break;
      if (!kept.empty()) least = std::max(least, kept[last]);
      break;
    }
  }
  int64_t best = -1;
  double key = -INFINITY, reach = INFINITY; // reach: exp(-key), what times a weight bounds 1 - u
  for (int64_t i = 0; i < padded; i += LANES) {
    const Vec w = *reinterpret_cast<const VecAny *>(&weights[size_t(i)]);
    const Vec left = 1.0 - uniform(ask.state, i);
    const Ints may = (w >= least) & (w > 0.0) & (left <= w * reach);
    bool any = false;
    for (int j = 0; j < LANES; j++) any |= may[j] != 0;
    if (!any) continue;
    for (int j = 0; j < LANES; j++) {
      if (!may[j] || i + j >= vocabulary) continue;
      // u may be 0, and then its key is less than any other.
      const double mine = (double(logits[i + j]) - double(most)) / ask.temperature - std::log(-std::log(1.0 - left[j]));
      if (best < 0 || mine > key) {
        best = i + j, key = mine;
        // A little more, so that rounding shuts nobody out.
        reach = std::exp(-key) * (1.0 + 1e-9);
      }
    }
  }
  return best;
}

struct Job {
  const MillstreamSampling &a;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < a.num_asks;)
      a.tokens[i] = sample(a.logits + a.asks[i].row * a.stride, a.vocabulary, a.asks[i]);
  }
};

} // namespace

extern "C" {

void millstream_sample(const MillstreamSampling *a) {
  Job job{*a};
  if (a->parallel && a->num_threads > 1 && a->num_asks > 1)
    a->parallel([](void *self) { static_cast<Job *>(self)->work(); }, &job, unsigned(a->num_threads), 0);
  else
    job.work();
}

int64_t millstream_sampling_abi(int which) { return which == 0 ? sizeof(MillstreamAsk) : sizeof(MillstreamSampling); }
}
