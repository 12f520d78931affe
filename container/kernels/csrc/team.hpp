// Threads that compute one forward together.
//
// Owns: the threads, how they wait for work and for each other, how they share out the parts of an operator.
// Must not know: what is computed.
// Invariant: every thread of a team calls the same operators in the same order; `barrier` and `share` are
// collective. Whoever waits longer than SPIN_US sleeps: its core is then free for the thread it waits for, which may
// have lost its own to another process.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace strongroom {

class Team;

// One thread's view of the team.
class Member {
 public:
  Member(Team& team, int rank) : team_(team), rank_(rank) {}

  int rank() const { return rank_; }
  int size() const;

  // Waits until every thread of the team has come here; what was written before is seen after.
  void barrier();

  // Calls work(part) for the parts 0..count-1 that fall to this thread. Parts go to whoever is free, so that a
  // thread that lost its core for a while does not hold up the others. `barrier` must follow before
  // the results of other threads are read, and before the next call of `share`.
  template <class Work>
  void share(int count, Work&& work);

 private:
  Team& team_;
  const int rank_;
  int turn_ = 0;
};

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Runs `body` on every thread, the caller's among them; returns when all have returned. One call at a time.
  void run(const std::function<void(Member&)>& body);

 private:
  friend class Member;
  void work(int rank);

  // A cache line each: what one thread polls must not move when another counts.
  struct alignas(64) Line {
    std::atomic<std::int64_t> value{0};
  };
  static constexpr int TURNS = 4;  // part counters in use at once: a barrier lies between uses of the same one

  const int size_;
  struct alignas(64) Signal {
    std::atomic<std::uint32_t> value{0};  // what is waited for to change
    std::atomic<int> sleepers{0};
  };
  static void raise(Signal& signal, std::uint32_t value);
  template <class Done>
  static void await(Signal& signal, Done&& done);

  Line arrived_;
  Signal generation_, finished_;
  Line next_[TURNS];
  Line started_;
  std::atomic<bool> ending_{false};
  const std::function<void(Member&)>* body_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

inline int Member::size() const { return team_.size_; }

template <class Work>
void Member::share(int count, Work&& work) {
  if (team_.size_ == 1) {
    for (int part = 0; part < count; ++part) work(part);
    return;
  }
  // The counter after next is cleared by whoever gets there first: nobody can be two barriers ahead.
  auto& next = team_.next_[turn_].value;
  team_.next_[(turn_ + 2) % Team::TURNS].value.store(0, std::memory_order_relaxed);
  turn_ = (turn_ + 1) % Team::TURNS;
  for (;;) {
    const auto part = next.fetch_add(1, std::memory_order_relaxed);
    if (part >= count) return;
    work(static_cast<int>(part));
  }
}

}  // namespace strongroom
