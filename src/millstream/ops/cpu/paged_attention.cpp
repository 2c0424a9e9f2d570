// Paged attention over plain pages, and the write of new keys and values into them.
#include "attention.h"

namespace {

using namespace attention;

template <class E> int attend(const Args &a) {
  static thread_local Scratch kept;
  Plain<E> plain(a, kept);
  if (plain.plan() != 0) return -1;
  plain.run();
  return 0;
}

} // namespace

extern "C" {

struct MillstreamWrite {
  void *k_pages;
  void *v_pages;
  const int64_t *slots;
  const float *k;
  const float *v;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int64_t num_tokens, num_blocks, block_size, kv_heads, dim, num_threads, page_bits;
};

}

namespace {

template <class E> struct Write {
  const MillstreamWrite &a;
  std::atomic<int64_t> next{0};

  void work() {
    const int64_t runs = (a.num_tokens + LANES - 1) / LANES;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < runs * a.kv_heads;) {
      const int64_t head = i % a.kv_heads, stop = std::min(a.num_tokens, (i / a.kv_heads + 1) * LANES);
      int64_t token = i / a.kv_heads * LANES;
      while (token < stop) {
        const int64_t slot = a.slots[token];
        int64_t n = 1;
        if (slot >= 0) {
          // Neighbouring slots of one block: their keys lie side by side in every dimension.
          while (token + n < stop && a.slots[token + n] == slot + n && (slot + n) % a.block_size) n++;
          put(head, token, n, slot);
        }
        token += n;
      }
    }
  }

  void put(int64_t head, int64_t token, int64_t n, int64_t slot) const {
    const int64_t base = (slot / a.block_size * a.kv_heads + head) * a.block_size * a.dim, offset = slot % a.block_size;
    const float *k = a.k + token * a.k_token_stride + head * a.k_head_stride;
    const float *v = a.v + token * a.v_token_stride + head * a.v_head_stride;
    E *k_to = static_cast<E *>(a.k_pages) + base + offset;
    E *v_to = static_cast<E *>(a.v_pages) + base + offset * a.dim;
    for (int64_t d = 0; d < a.dim; d++)
      for (int64_t j = 0; j < n; j++) keep(k_to + d * a.block_size + j, k[j * a.k_token_stride + d]);
    for (int64_t j = 0; j < n; j++)
      for (int64_t d = 0; d < a.dim; d++) keep(v_to + j * a.dim + d, v[j * a.v_token_stride + d]);
  }
};

template <class E> int write(const MillstreamWrite &a) {
  for (int64_t t = 0; t < a.num_tokens; t++)
    if (a.slots[t] >= a.num_blocks * a.block_size) return -1;
  Write<E> job{a};
  // Waking a team costs more than storing a few thousand elements.
  if (a.parallel && a.num_threads > 1 && a.num_tokens * a.kv_heads * a.dim > 16384)
    a.parallel([](void *self) { static_cast<Write<E> *>(self)->work(); }, &job, unsigned(a.num_threads), 0);
  else
    job.work();
  return 0;
}

} // namespace

extern "C" {

// 0, or -1 when a row needs a block that is not one of the pages, or has fewer tokens than queries.
int millstream_paged_attention(const MillstreamAttention *a) {
  return a->page_bits == 16 ? attend<uint16_t>(*a) : attend<float>(*a);
}

// 0, or -1 when a slot lies beyond the pages; nothing is written then. A negative slot is passed over.
int millstream_kv_write(const MillstreamWrite *a) {
  return a->page_bits == 16 ? write<uint16_t>(*a) : write<float>(*a);
}

// The branches of a step, for whoever wants to know what is walked together: from, to, wave, depth, number of rows and
// the rows of each, one after the other. Returns how many numbers that are and writes as many as there is `room` for;
// -1 as above.
int64_t millstream_branches(const MillstreamAttention *a, int32_t *out, int64_t room) {
  Scratch kept;
  Plain<float> plain(*a, kept);
  if (plain.plan() != 0) return -1;
  int64_t used = 0;
  const auto put = [&](int32_t x) {
    if (used++ < room) out[used - 1] = x;
  };
  for (const Branch &b : plain.branches) {
    for (const int32_t x : {b.from, b.to, b.wave, b.depth, b.count}) put(x);
    for (int32_t i = 0; i < b.count; i++) put(plain.members[size_t(b.first + i)]);
  }
  return used;
}

// Sizes of the argument structs: the caller checks that it sees the same ones.
int64_t millstream_abi(int which) { return which == 0 ? sizeof(MillstreamAttention) : sizeof(MillstreamWrite); }
}
