// Work shared among threads: torch's own OpenMP team where the process has one, so that two pools never fight.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace fastvq {

// Hands out the tasks 0 .. count-1, each to one thread: neighbours to the same one, since memory that is read on and on
// comes sooner, and ever fewer of them at a time, so that the threads end together.
class TaskQueue {
 public:
  TaskQueue(std::int64_t count, int threads) : count_(count), share_(4 * std::int64_t{threads}) {}

  // Takes the tasks first .. end-1; none is left when there are none.
  void take(std::int64_t* first, std::int64_t* end) {
    constexpr std::int64_t kMost = 16;
    std::int64_t taken = taken_.load(std::memory_order_relaxed), run;
    do {
      run = std::clamp<std::int64_t>((count_ - taken) / share_, 1, kMost);
    } while (taken < count_ && !taken_.compare_exchange_weak(taken, taken + run, std::memory_order_relaxed));
    *first = taken;
    *end = std::min(count_, taken + run);
  }

 private:
  const std::int64_t count_, share_;
  std::atomic<std::int64_t> taken_{0};
};

// The tasks of one thread.
class Tasks {
 public:
  explicit Tasks(TaskQueue& queue) : queue_(queue) {}

  // The next task, or false when none is left.
  bool next(std::int64_t* task) {
    if (next_ == end_) queue_.take(&next_, &end_);
    if (next_ >= end_) return false;
    *task = next_++;
    return true;
  }

 private:
  TaskQueue& queue_;
  std::int64_t next_ = 0, end_ = 0;
};

// Runs body(argument) on up to `threads` threads, the caller's among them, and returns when all are done.
void run_team(int threads, void (*body)(void*), void* argument);

// Default rounding, no flushing of subnormals, while it lives; torch.set_flush_denormal changes a thread for good.
class FloatEnvironment {
 public:
  FloatEnvironment();
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  std::uint64_t saved_;
};

// How many threads some work is worth: waking one costs what two million multiply-adds do.
inline int worth_threads(std::int64_t multiply_adds, int threads) {
  constexpr std::int64_t kThreadWork = std::int64_t{1} << 21;
  return multiply_adds / kThreadWork + 1 < threads ? static_cast<int>(multiply_adds / kThreadWork + 1) : threads;
}

// Calls body(tasks) on each thread; the body allocates its scratch once and then asks for tasks until none is left.
// An exception in a thread is rethrown here.
template <class Body>
void parallel(std::int64_t count, int threads, const Body& body) {
  struct Shared {
    const Body& body;
    TaskQueue queue;
    std::mutex mutex;
    std::exception_ptr error;
  } shared{body, {count, threads}, {}, nullptr};
  if (count <= 0) return;
  const auto entry = [](void* argument) {
    auto* s = static_cast<Shared*>(argument);
    const FloatEnvironment environment;
    Tasks tasks(s->queue);
    try {
      s->body(tasks);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(s->mutex);
      s->error = std::current_exception();
    }
  };
  run_team(static_cast<int>(count < threads ? count : threads), entry, &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace fastvq
