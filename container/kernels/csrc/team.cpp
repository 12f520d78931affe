#include "team.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>

namespace strongroom {
namespace {

constexpr int SPIN_US = 50;  // longer than the tail of most operators
constexpr int POLLS = 64;    // between two looks at the clock

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Polls until `done`, for SPIN_US at most; false when it is not.
template <class Done>
bool spin(Done&& done) {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::microseconds(SPIN_US);
  for (;;) {
    for (int poll = 0; poll < POLLS; ++poll) {
      if (done()) return true;
      relax();
    }
    if (std::chrono::steady_clock::now() >= limit) return false;
  }
}

void sleep_while(std::atomic<std::uint32_t>& word, std::uint32_t value) {
  static_assert(sizeof word == sizeof value, "the kernel reads the word itself");
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

void Team::raise(Signal& signal, std::uint32_t value) {
  signal.value.store(value, std::memory_order_seq_cst);
  // Whoever counts itself as a sleeper after this sees the new value and does not sleep.
  if (signal.sleepers.load(std::memory_order_seq_cst) != 0) wake_all(signal.value);
}

template <class Done>
void Team::await(Signal& signal, Done&& done) {
  if (spin([&] { return done(signal.value.load(std::memory_order_acquire)); })) return;
  signal.sleepers.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const auto value = signal.value.load(std::memory_order_seq_cst);
    if (done(value)) break;
    sleep_while(signal.value, value);
  }
  signal.sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

void Member::barrier() {
  Team& team = team_;
  if (team.size_ == 1) return;
  const auto generation = team.generation_.value.load(std::memory_order_acquire);
  if (team.arrived_.value.fetch_add(1, std::memory_order_acq_rel) == team.size_ - 1) {
    team.arrived_.value.store(0, std::memory_order_relaxed);
    Team::raise(team.generation_, generation + 1);
    return;
  }
  Team::await(team.generation_, [&](std::uint32_t now) { return now != generation; });
}

Team::Team(int threads) : size_(threads < 1 ? 1 : threads) {
  for (int rank = 1; rank < size_; ++rank) threads_.emplace_back([this, rank] { work(rank); });
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ending_.store(true, std::memory_order_release);
    started_.value.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(Member&)>& body) {
  for (auto& next : next_) next.value.store(0, std::memory_order_relaxed);
  finished_.value.store(0, std::memory_order_relaxed);
  body_ = &body;
  if (size_ > 1) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      started_.value.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }
  Member first(*this, 0);
  body(first);
  if (size_ > 1) {
    const auto others = static_cast<std::uint32_t>(size_ - 1);
    await(finished_, [&](std::uint32_t now) { return now == others; });
  }
  body_ = nullptr;
}

void Team::work(int rank) {
  std::int64_t seen = 0;
  for (;;) {
    // A step follows the last one within microseconds while requests run: look for it before sleeping.
    if (!spin([&] { return started_.value.load(std::memory_order_acquire) != seen; })) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return started_.value.load(std::memory_order_acquire) != seen; });
    }
    seen = started_.value.load(std::memory_order_acquire);
    if (ending_.load(std::memory_order_acquire)) return;
    Member member(*this, rank);
    (*body_)(member);
    std::lock_guard<std::mutex> lock(mutex_);
    raise(finished_, finished_.value.load(std::memory_order_relaxed) + 1);
  }
}

}  // namespace strongroom
