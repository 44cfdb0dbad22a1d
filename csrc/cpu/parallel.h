// Work shared among threads: torch's own OpenMP team where the process has one, so that two pools never fight.

#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace fastvq {

// Hands out the tasks 0 .. count-1, each to one thread.
class Tasks {
 public:
  explicit Tasks(std::int64_t count) : count_(count) {}

  // The next task, or false when none is left.
  bool next(std::int64_t* task) {
    *task = taken_.fetch_add(1, std::memory_order_relaxed);
    return *task < count_;
  }

 private:
  const std::int64_t count_;
  std::atomic<std::int64_t> taken_{0};
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
    Tasks tasks;
    std::mutex mutex;
    std::exception_ptr error;
  } shared{body, Tasks(count), {}, nullptr};
  if (count <= 0) return;
  const auto entry = [](void* argument) {
    auto* s = static_cast<Shared*>(argument);
    const FloatEnvironment environment;
    try {
      s->body(s->tasks);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(s->mutex);
      s->error = std::current_exception();
    }
  };
  run_team(static_cast<int>(count < threads ? count : threads), entry, &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace fastvq
