// Threads that compute one forward together.
//
// Owns: the threads, how they wait for work and for each other, how they share out the parts of an operator.
// Must not know: what is computed.
// Invariant: every thread of a team calls the same operators in the same order; `barrier` and `share` are
// collective. Where the team has every core it may use, each thread keeps to a core of its own, and whoever waits
// for a thread that has lost its core to another process changes places with it: what the other process takes is
// then lost once. Waiting would lose it once for every thread, and the kernel moves no thread that ran just now.
#pragma once

#include <sched.h>
#include <sys/types.h>

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
  void await(int rank, Signal& signal, Done&& done);

  // Where one thread is, and how far.
  struct alignas(64) Place {
    std::atomic<std::int64_t> barriers{0};  // come to, since the team began
    std::atomic<pid_t> thread{0};
    std::atomic<int> home{0};  // its core
  };
  // Gives the core of `rank`, which waits, to a thread that is late for want of one; false when there is none.
  bool change_places(int rank);
  void settle();  // the caller of `run` is rank 0, and at home where it runs
  void leave();   // it may run anywhere again

  std::vector<Place> places_;
  cpu_set_t allowed_{};
  bool at_home_ = false;
  std::atomic<bool> changing_{false};
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
