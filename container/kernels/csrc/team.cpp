#include "team.hpp"

#include <chrono>

namespace strongroom {
namespace {

constexpr int SPIN_US = 50;    // longer than any operator's tail; then the thread sleeps or yields its core
constexpr int POLLS = 64;      // between two looks at the clock

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Polls until `done`; after SPIN_US calls `yield` once per round of polls.
template <class Done, class Yield>
void spin(Done&& done, Yield&& yield) {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::microseconds(SPIN_US);
  for (;;) {
    for (int poll = 0; poll < POLLS; ++poll) {
      if (done()) return;
      relax();
    }
    if (std::chrono::steady_clock::now() >= limit && !yield()) return;
  }
}

}  // namespace

void Member::barrier() {
  Team& team = team_;
  if (team.size_ == 1) return;
  const auto generation = team.generation_.value.load(std::memory_order_acquire);
  if (team.arrived_.value.fetch_add(1, std::memory_order_acq_rel) == team.size_ - 1) {
    team.arrived_.value.store(0, std::memory_order_relaxed);
    team.generation_.value.store(generation + 1, std::memory_order_release);
    return;
  }
  // The one waited for may have lost its core, perhaps to us.
  spin([&] { return team.generation_.value.load(std::memory_order_acquire) != generation; },
       [] { std::this_thread::yield(); return true; });
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
    spin([&] { return finished_.value.load(std::memory_order_acquire) == size_ - 1; },
         [] { std::this_thread::yield(); return true; });
  }
  body_ = nullptr;
}

void Team::work(int rank) {
  std::int64_t seen = 0;
  for (;;) {
    // A step follows the last one within microseconds while requests run: look for it before sleeping.
    spin([&] { return started_.value.load(std::memory_order_acquire) != seen; }, [] { return false; });
    if (started_.value.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return started_.value.load(std::memory_order_acquire) != seen; });
    }
    seen = started_.value.load(std::memory_order_acquire);
    if (ending_.load(std::memory_order_acquire)) return;
    Member member(*this, rank);
    (*body_)(member);
    finished_.value.fetch_add(1, std::memory_order_release);
  }
}

}  // namespace strongroom
