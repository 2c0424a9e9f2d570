// A team of threads that stays: it spins for a while after each job, then sleeps. One per process, for all kernels.
//
// A job is one function run by all members at once, so that a job may have barriers of its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <ctime>
#include <pthread.h>
#include <sched.h>
#include <thread>
#include <unistd.h>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace pool {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleeps while `word` has the value `seen`. May return early.
inline void sleep_on(std::atomic<uint32_t> &word, uint32_t seen) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
  timespec nap{0, 50000};
  if (word.load(std::memory_order_acquire) == seen) nanosleep(&nap, nullptr);
#endif
}

inline void wake(std::atomic<uint32_t> &word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

// All of `size` threads pass when the last has come. After SPINS looks the core is offered to others: what one waits for
// may need it, if something else runs on this machine.
struct Barrier {
  static constexpr int SPINS = 4096;
  alignas(64) std::atomic<uint32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> round{0};

  void wait(uint32_t size) {
    if (size <= 1) return;
    const uint32_t now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; round.load(std::memory_order_acquire) == now; i++) {
      if (i < SPINS) relax();
      else sched_yield();
    }
  }
};

// What members share out among themselves: each has a run of its own, for long runs of memory, and then helps the others.
// `taken` has a zero for every member.
struct Shares {
  std::atomic<int64_t> *taken;
  uint32_t member, size;

  template <class Each> void each(int64_t total, const Each &work) const {
    for (uint32_t k = 0; k < size; k++) {
      const int64_t owner = (member + k) % size, from = owner * total / size, to = (owner + 1) * total / size;
      for (int64_t i; (i = from + taken[owner].fetch_add(1, std::memory_order_relaxed)) < to;) work(i);
    }
  }
};

typedef void (*Work)(void *job, uint32_t member, uint32_t size);

class Team {
public:
  // Runs `work` on `size` threads, the caller among them as member 0; returns when all are done. One job at a time.
  void run(Work work, void *job, uint32_t size) {
    if (size <= 1) return work(job, 0, 1);
    while (busy_.exchange(true, std::memory_order_acquire)) sched_yield();
    while (members_.size() + 1 < size) {
      const uint32_t member = uint32_t(members_.size()) + 1;
      members_.emplace_back([this, member, seen = round_.load()] { serve(member, seen); });
      members_.back().detach();
    }
    work_ = work, job_ = job, size_ = size;
    left_.store(uint32_t(members_.size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) wake(round_);
    work(job, 0, size);
    for (int i = 0; left_.load(std::memory_order_acquire); i++) {
      if (i < Barrier::SPINS) relax();
      else sched_yield();
    }
    busy_.store(false, std::memory_order_release);
  }

  void spin_for(int64_t looks) { spins_.store(looks, std::memory_order_relaxed); }

private:
  void serve(uint32_t member, uint32_t seen) {
    for (;;) {
      uint32_t now;
      int64_t looks = 0;
      while ((now = round_.load(std::memory_order_acquire)) == seen) {
        if (looks++ < spins_.load(std::memory_order_relaxed)) {
          relax();
          continue;
        }
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        sleep_on(round_, seen);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = now;
      if (member < size_) work_(job_, member, size_);
      left_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::vector<std::thread> members_;
  std::atomic<bool> busy_{false};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> left_{0};
  std::atomic<uint32_t> sleeping_{0};
  std::atomic<int64_t> spins_{2000};
  Work work_ = nullptr;
  void *job_ = nullptr;
  uint32_t size_ = 0;
};

// Never destroyed: its threads may outlive whatever a process destroys on its way out. A forked child has none of them
// and makes its own.
inline Team *&current() {
  static Team *team = new Team();
  return team;
}

inline Team &team() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current() = new Team(); });
  (void)registered;
  return *current();
}

} // namespace pool
