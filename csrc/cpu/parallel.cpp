#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace fastvq {
namespace {

// libgomp's entry point for `#pragma omp parallel`, stable since GCC 4.9. torch loads its own copy of the library;
// calling that copy means one team of threads for torch and for us.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};  // a forked child inherits libgomp's team without its threads: never wait for it

GompParallel find_team() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

}  // namespace

void run_team(int threads, void (*body)(void*), void* argument) {
  if (threads <= 1) return body(argument);
  static const GompParallel team = find_team();
  if (team && !forked) return team(body, argument, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body, argument);
  body(argument);
  for (std::thread& other : others) other.join();
}

#if defined(__SSE2__)
FloatEnvironment::FloatEnvironment() : saved_(_mm_getcsr()) {
  _mm_setcsr(0x1f80);
}
FloatEnvironment::~FloatEnvironment() {
  _mm_setcsr(static_cast<unsigned>(saved_));
}
#elif defined(__aarch64__)
FloatEnvironment::FloatEnvironment() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}));
}
FloatEnvironment::~FloatEnvironment() {
  asm volatile("msr fpcr, %0" : : "r"(saved_));
}
#else
FloatEnvironment::FloatEnvironment() : saved_(0) {}
FloatEnvironment::~FloatEnvironment() = default;
#endif

}  // namespace fastvq
