// The scheduler of the shim: fibers, barriers, meetings of a warp, copies in flight.

#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// The bounds of all static __shared__ variables, which lie in a section of their own; absent where there are none.
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_fastvq_shared[], __stop_fastvq_shared[];

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {

namespace {

// ---- contexts -----------------------------------------------------------------------------------------------------

#if defined(__x86_64__)

using Context = void*;  // the stack pointer; everything else is on the stack

extern "C" void fastvq_shim_switch(Context* from, Context to);
asm(R"(
.text
.globl fastvq_shim_switch
.hidden fastvq_shim_switch
.type fastvq_shim_switch, @function
fastvq_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastvq_shim_switch, .-fastvq_shim_switch
)");

void prepare(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where entry would return to: as at any entry, the stack is 8 below a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}

void change(Context& from, Context& to) {
  fastvq_shim_switch(&from, to);
}

#else

using Context = ucontext_t;

void prepare(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void change(Context& from, Context& to) {
  swapcontext(&from, &to);
}

#endif

// ---- threads ------------------------------------------------------------------------------------------------------

enum class State { kReady, kAtBarrier, kMeeting, kDone };

struct Copy {
  void* target;
  const void* source;
  std::size_t bytes, valid;
};

struct Thread {
  Context context;
  unsigned char* stack = nullptr;
  void* asan_stack = nullptr;
  uint3 index;
  unsigned number;
  State state;
  const char* waits_in;
  int line;
  unsigned mask;
  const void* in;
  void* out;
  void (*finish)(const void* const*, void* const*, unsigned);
  std::vector<std::vector<Copy>> groups;  // committed cp.async groups, oldest first
  std::vector<Copy> open;
};

constexpr std::size_t kStack = 256 * 1024;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kSharedRegion = (kMaxShared + kPage - 1) / kPage * kPage;

std::vector<std::unique_ptr<Thread>> pool;  // made once, used by every block
unsigned live = 0;                          // of them, in the running block
Thread* self = nullptr;
Context scheduler;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_asan_stack = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
#endif
const std::function<void()>* body = nullptr;
int arriving_sum = 0, barrier_sum = 0;       // of what threads bring to the next barrier, and brought to the last
std::map<const void*, std::size_t> allowed;  // dynamic shared memory, by kernel
std::uint64_t random_state = 1;
std::uintptr_t only_stream = 0;

unsigned char* shared_region = nullptr;  // ends where touching memory is fatal
unsigned char* shared_memory = nullptr;

unsigned random_below(unsigned bound) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>((random_state >> 33) % bound);
}

// A walk through 0 .. count - 1 in a random order: start + i * step, the step prime to the count.
struct Order {
  unsigned count, start, step;
  explicit Order(unsigned n) : count(n), start(random_below(n)), step(1) {
    if (n < 3) return;
    const auto common = [](unsigned a, unsigned b) {
      while (b) std::swap(a %= b, b);
      return a;
    };
    do step = 1 + random_below(n - 1);
    while (common(step, n) != 1);
  }
  unsigned operator[](unsigned i) const {
    return static_cast<unsigned>((start + static_cast<std::uint64_t>(i) * step) % count);
  }
};

void leave(bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->asan_stack, scheduler_stack, scheduler_stack_bytes);
#else
  (void)for_good;
#endif
  Thread* me = self;
  change(me->context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->asan_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void start_of_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*body)();
  self->groups.push_back(std::move(self->open));
  for (const auto& group : self->groups) {
    if (!group.empty()) fail("the thread ends with cp.async copies that nothing waits for");
  }
  self->state = State::kDone;
  leave(true);
  std::abort();
}

void resume(Thread& thread) {
  self = &thread;
  threadIdx = thread.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_asan_stack, thread.stack, kStack);
#endif
  change(scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_asan_stack, nullptr, nullptr);
#endif
  self = nullptr;
}

// ---- a block ------------------------------------------------------------------------------------------------------

// Runs the threads of a warp until none of them can go on; whether any ran.
bool run_warp(unsigned warp) {
  const unsigned first = warp * kWarp, count = std::min(kWarp, live - first);
  bool any = false;
  for (bool again = true; again;) {
    again = false;
    const Order lanes(count);
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = *pool[first + lanes[i]];
      if (thread.state != State::kReady) continue;
      resume(thread);
      again = any = true;
    }
  }
  return any;
}

// What stands in the way, in the words of the first two threads that differ.
[[noreturn]] void stuck() {
  const Thread *waiting = nullptr, *other = nullptr;
  for (unsigned t = 0; t < live; ++t) {
    if (!waiting && pool[t]->state != State::kDone) waiting = pool[t].get();
  }
  for (unsigned t = 0; t < live; ++t) {
    const Thread& thread = *pool[t];
    const bool same = thread.state == waiting->state && thread.waits_in == waiting->waits_in &&
                      thread.line == waiting->line && thread.mask == waiting->mask;
    // Of a meeting of lanes, what lanes of the same warp do says more.
    const bool near = waiting->state != State::kMeeting || thread.number / kWarp == waiting->number / kWarp;
    if (!same && (!other || (near && other->number / kWarp != waiting->number / kWarp))) other = &thread;
  }
  const char* verb = other && other->state == State::kDone ? "has ended" : "waits in ";
  fail("divergent: thread %u waits in %s (line %d, mask %08x), thread %u %s%s (line %d, mask %08x)", waiting->number,
       waiting->waits_in, waiting->line, waiting->mask, other ? other->number : 0, verb,
       other && other->state != State::kDone ? other->waits_in : "", other ? other->line : 0, other ? other->mask : 0);
}

void release_barrier() {
  for (unsigned t = 0; t < live; ++t) {
    const Thread& thread = *pool[t];
    if (thread.state != State::kAtBarrier || thread.line != pool[0]->line || thread.waits_in != pool[0]->waits_in)
      stuck();
  }
  for (unsigned t = 0; t < live; ++t) pool[t]->state = State::kReady;
  order_block();
  barrier_sum = std::exchange(arriving_sum, 0);
}

void run_block() {
  const dim3 dim = blockDim;
  live = dim.x * dim.y * dim.z;
  while (pool.size() < live) {
    pool.push_back(std::make_unique<Thread>());
    void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) fail("no memory for a stack");
    pool.back()->stack = static_cast<unsigned char*>(memory) + kPage;
  }
  for (unsigned t = 0; t < live; ++t) {
    Thread& thread = *pool[t];
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack, kStack);  // a fiber ends without leaving its functions
#endif
    prepare(thread.context, thread.stack, kStack, start_of_fiber);
    thread.index = {t % dim.x, t / dim.x % dim.y, t / dim.x / dim.y};
    thread.number = t;
    thread.state = State::kReady;
    thread.groups.clear();
    thread.open.clear();
  }
  const unsigned warps = (live + kWarp - 1) / kWarp;
  for (;;) {
    bool any = false;
    const Order order(warps);
    for (unsigned i = 0; i < warps; ++i) any |= run_warp(order[i]);
    if (any) continue;
    bool done = true;
    for (unsigned t = 0; t < live; ++t) done &= pool[t]->state == State::kDone;
    if (done) return;
    release_barrier();
  }
}

#if !defined(__SANITIZE_ADDRESS__)
void past_shared_memory(int, siginfo_t* info, void*) {
  const auto* at = static_cast<const unsigned char*>(info->si_addr);
  if (self && at >= shared_region + kSharedRegion && at < shared_region + kSharedRegion + 2 * kPage) {
    fail("shared memory past its size, by %td bytes", at - (shared_region + kSharedRegion));
  }
  std::signal(SIGSEGV, SIG_DFL);  // the access is tried again, and is fatal
}
#endif

void make_shared_region() {
  void* memory = mmap(nullptr, kSharedRegion + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("no memory to be shared");
  shared_region = static_cast<unsigned char*>(memory);
  if (mprotect(shared_region + kSharedRegion, 2 * kPage, PROT_NONE)) fail("no guard behind shared memory");
}

// Not by memset, which the sanitizer watches: between static variables lie its own forbidden zones.
__attribute__((no_sanitize("address"))) void poison(void* target, std::size_t bytes) {
  volatile unsigned char* at = static_cast<unsigned char*>(target);
  for (std::size_t i = 0; i < bytes; ++i) at[i] = 0xff;
}

void forbid([[maybe_unused]] const Copy& copy, [[maybe_unused]] bool forbidden) {
#if defined(__SANITIZE_ADDRESS__)
  if (forbidden) {
    __asan_poison_memory_region(copy.target, copy.bytes);
  } else {
    __asan_unpoison_memory_region(copy.target, copy.bytes);
  }
#endif
}

}  // namespace

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "fastvq shim: ");
  std::fprintf(stderr, "block (%u, %u, %u), ", blockIdx.x, blockIdx.y, blockIdx.z);
  if (self) std::fprintf(stderr, "thread (%u, %u, %u): ", threadIdx.x, threadIdx.y, threadIdx.z);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  std::abort();
}

unsigned lane() {
  return self->number % kWarp;
}

void* dynamic_shared() {
  return shared_memory;
}

void check_stream(const char* what, cudaStream_t stream) {
  if (reinterpret_cast<std::uintptr_t>(stream) != only_stream) fail("%s on another stream than the call's", what);
}

cudaError_t allow_shared(const void* kernel, std::size_t bytes) {
  if (bytes > kMaxShared) return cudaErrorInvalidValue;
  allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const auto entry = allowed.find(kernel);
  const std::size_t limit = entry == allowed.end() ? 48 * 1024 : std::max<std::size_t>(entry->second, 48 * 1024);
  const std::uint64_t threads = static_cast<std::uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.x > INT_MAX || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  check_stream("a launch", config.stream);
  if (!shared_region) make_shared_region();
#if !defined(__SANITIZE_ADDRESS__)
  struct sigaction mine = {}, before;
  mine.sa_sigaction = past_shared_memory;
  mine.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &mine, &before);
#endif
  const std::size_t room = (config.dynamicSmemBytes + 127) / 128 * 128;
  shared_memory = shared_region + kSharedRegion - room;
  const auto variables =
      __start_fastvq_shared ? static_cast<std::size_t>(__stop_fastvq_shared - __start_fastvq_shared) : 0;
  watch({shared_memory, room}, {__start_fastvq_shared, variables});
  body = &thread;
  gridDim = grid;
  blockDim = block;
  const std::uint64_t blocks = static_cast<std::uint64_t>(grid.x) * grid.y * grid.z;
  const Order order(static_cast<unsigned>(std::min<std::uint64_t>(blocks, UINT_MAX)));
  for (std::uint64_t i = 0; i < blocks; ++i) {
    const std::uint64_t b = blocks <= UINT_MAX ? order[static_cast<unsigned>(i)] : i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    poison(shared_memory, room);
    if (__start_fastvq_shared) {
      poison(__start_fastvq_shared, static_cast<std::size_t>(__stop_fastvq_shared - __start_fastvq_shared));
    }
    order_block();
    run_block();
    for (std::size_t extra = config.dynamicSmemBytes; extra < room; ++extra) {
      if (shared_memory[extra] != 0xff)
        fail("shared memory past its size of %zu bytes was written", config.dynamicSmemBytes);
    }
  }
#if !defined(__SANITIZE_ADDRESS__)
  sigaction(SIGSEGV, &before, nullptr);
#endif
  return cudaSuccess;
}

int barrier(const char* name, int line, int value) {
  self->waits_in = name;
  self->line = line;
  self->mask = 0;
  self->state = State::kAtBarrier;
  arriving_sum += value;
  leave(false);
  return barrier_sum;  // all read it before the next barrier is released, which takes all
}

void meet(const char* name, unsigned mask, const void* in, void* out,
          void (*finish)(const void* const*, void* const*, unsigned)) {
  const unsigned me = lane(), first = self->number - me;
  if (!(mask >> me & 1)) fail("%s: lane %u is outside the mask %08x that it passes", name, me, mask);
  if (first + kWarp > live && mask >> (live - first))
    fail("%s: the mask %08x names lanes that do not exist", name, mask);
  self->waits_in = name;
  self->line = 0;
  self->mask = mask;
  self->in = in;
  self->out = out;
  self->finish = finish;
  self->state = State::kMeeting;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    const Thread& other = *pool[first + l];
    if (other.state != State::kMeeting || other.mask != mask || other.finish != finish) {
      leave(false);
      return;
    }
  }
  const void* ins[kWarp] = {};
  void* outs[kWarp] = {};
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    ins[l] = pool[first + l]->in;
    outs[l] = pool[first + l]->out;
    pool[first + l]->state = State::kReady;
  }
  finish(ins, outs, mask);
  const unsigned all = live - first < kWarp ? (1u << (live - first)) - 1 : ~0u;
  if (mask == all && !std::strcmp(name, "__syncwarp")) order_warp(first / kWarp);
}

bool running(unsigned* thread) {
  if (self) *thread = self->number;
  return self != nullptr;
}

void async_copy(void* target, const void* source, std::size_t bytes, std::size_t valid) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %zu bytes", bytes);
  if (valid > bytes) fail("cp.async of %zu bytes, %zu of them valid", bytes, valid);
  check_aligned(target, bytes, "cp.async, target");
  check_aligned(source, bytes, "cp.async, source");
  const Copy copy = {target, source, bytes, valid};
  touch(target, bytes, Touch::kWrite);
  fly(target, bytes, true);
  poison(target, bytes);
  forbid(copy, true);
  self->open.push_back(copy);
}

void async_commit() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

void async_wait(unsigned newest_groups_left) {
  auto& groups = self->groups;
  while (groups.size() > newest_groups_left) {
    for (const Copy& copy : groups.front()) {
      forbid(copy, false);
      fly(copy.target, copy.bytes, false);
      touch(copy.target, copy.bytes, Touch::kWrite);
      std::memset(copy.target, 0, copy.bytes);
      std::memcpy(copy.target, copy.source, copy.valid);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace shim

void fastvq_shim_seed(std::uint64_t seed) {
  shim::random_state = 2 * seed + 1;
}

void fastvq_shim_stream(std::uintptr_t stream) {
  shim::only_stream = stream;
}
