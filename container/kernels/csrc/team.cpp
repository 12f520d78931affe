#include "team.hpp"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <climits>

namespace strongroom {
namespace {

constexpr int SPIN_US = 50;  // longer than the tail of most operators
constexpr int GLANCE_US = 5;  // when who has not come is still running, it comes soon
constexpr int POLLS = 64;     // between two looks at the clock

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Polls until `done`, for `us` at most; false when it is not.
template <class Done>
bool spin(int us, Done&& done) {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::microseconds(us);
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

pid_t own_id() { return static_cast<pid_t>(syscall(SYS_gettid)); }

// Nanoseconds the thread has run, -1 when they cannot be told.
std::int64_t ran_ns(pid_t thread) {
  const auto clock = static_cast<clockid_t>((~static_cast<unsigned>(thread) << 3) | 6);  // as pthread_getcpuclockid
  timespec ran{};
  if (clock_gettime(clock, &ran) != 0) return -1;
  return std::int64_t{ran.tv_sec} * 1'000'000'000 + ran.tv_nsec;
}

// Whether the thread has a core now.
bool runs(pid_t thread) {
  const auto before = ran_ns(thread);
  for (int poll = 0; poll < POLLS; ++poll) relax();
  return before < 0 || ran_ns(thread) != before;
}

// Lets the thread, 0 for the caller, run on `core` alone; it is moved there at once. Refused, it stays where it is.
void move(pid_t thread, int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  sched_setaffinity(thread, sizeof set, &set);
}

}  // namespace

void Team::raise(Signal& signal, std::uint32_t value) {
  signal.value.store(value, std::memory_order_seq_cst);
  // Whoever counts itself as a sleeper after this sees the new value and does not sleep.
  if (signal.sleepers.load(std::memory_order_seq_cst) != 0) wake_all(signal.value);
}

template <class Done>
void Team::await(int rank, Signal& signal, Done&& done) {
  const auto over = [&] { return done(signal.value.load(std::memory_order_acquire)); };
  if (spin(GLANCE_US, over)) return;
  if (!change_places(rank) && spin(SPIN_US, over)) return;
  change_places(rank);
  signal.sleepers.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const auto value = signal.value.load(std::memory_order_seq_cst);
    if (done(value)) break;
    sleep_while(signal.value, value);
  }
  signal.sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

bool Team::change_places(int rank) {
  if (!at_home_) return false;
  Place& own = places_[rank];
  const auto passed = own.barriers.load(std::memory_order_relaxed);
  for (Place& other : places_) {
    if (other.barriers.load(std::memory_order_relaxed) >= passed) continue;  // it is here, or this is the caller
    const pid_t late = other.thread.load(std::memory_order_relaxed);
    if (runs(late) || changing_.exchange(true)) return false;
    const int core = own.home.exchange(other.home.load());
    other.home.store(core);
    move(late, core);
    changing_.store(false);
    // From here on the caller has its core back only when the process that took the other's leaves it. Meanwhile
    // another thread may change places with the caller: its home is then one more.
    for (int home = -1; home != own.home.load();) move(0, home = own.home.load());
    return true;
  }
  return false;
}

void Team::settle() {
  Place& own = places_[0];
  own.thread.store(own_id(), std::memory_order_relaxed);
  if (!at_home_) return;
  const int core = sched_getcpu();
  for (Place& other : places_) {
    if (&other == &own || other.home.load() != core) continue;
    other.home.store(own.home.exchange(core));
    if (const pid_t thread = other.thread.load(); thread != 0) move(thread, other.home.load());
  }
  move(0, own.home.load());
}

void Team::leave() {
  if (at_home_) sched_setaffinity(0, sizeof allowed_, &allowed_);
}

void Member::barrier() {
  Team& team = team_;
  if (team.size_ == 1) return;
  team.places_[rank_].barriers.fetch_add(1, std::memory_order_relaxed);
  const auto generation = team.generation_.value.load(std::memory_order_acquire);
  if (team.arrived_.value.fetch_add(1, std::memory_order_acq_rel) == team.size_ - 1) {
    team.arrived_.value.store(0, std::memory_order_relaxed);
    Team::raise(team.generation_, generation + 1);
    return;
  }
  team.await(rank_, team.generation_, [&](std::uint32_t now) { return now != generation; });
}

Team::Team(int threads) : size_(threads < 1 ? 1 : threads), places_(static_cast<std::size_t>(size_)) {
  sched_getaffinity(0, sizeof allowed_, &allowed_);
  at_home_ = size_ > 1 && CPU_COUNT(&allowed_) == size_;
  for (int core = 0, rank = 0; at_home_ && rank < size_; ++core)
    if (CPU_ISSET(core, &allowed_)) places_[rank++].home.store(core);
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
  settle();
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
    await(0, finished_, [&](std::uint32_t now) { return now == others; });
  }
  leave();
  body_ = nullptr;
}

void Team::work(int rank) {
  places_[rank].thread.store(own_id(), std::memory_order_relaxed);
  if (at_home_) move(0, places_[rank].home.load());
  std::int64_t seen = 0;
  for (;;) {
    // A step follows the last one within microseconds while requests run: look for it before sleeping.
    if (!spin(SPIN_US, [&] { return started_.value.load(std::memory_order_acquire) != seen; })) {
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
