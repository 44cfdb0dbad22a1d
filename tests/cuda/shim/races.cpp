// Races for shared memory, found by what orders two accesses and not by what came out: each byte remembers its last
// writer, its readers and those who change it by atomics, with the barriers of block and warp that had passed by then.
//
// -fsanitize=thread makes the compiler announce each access by a call; here these calls end up, and the sanitizer's own
// library is never linked.

#include <vector>

#include "cuda_runtime.h"

namespace shim {

namespace {

constexpr unsigned kMany = ~0u;

struct Access {
  std::uint64_t block = 0, warp = 0;  // barriers that had passed
  unsigned thread = 0;                // kMany: several of a warp
  unsigned of_warp = 0;               // kMany: threads of several warps
};
struct Byte {
  Access write, read, atomic;
  bool flying = false;
};

SharedRange ranges[2];
std::vector<Byte> bytes_of[2];
std::uint64_t block_barriers = 1, warp_barriers[kWarp];

// Whether nothing orders an earlier access before one that thread `me` makes now.
bool races(const Access& earlier, unsigned me) {
  const unsigned warp = me / kWarp;
  if (earlier.block != block_barriers || earlier.thread == me) return false;
  return earlier.of_warp != warp || earlier.warp == warp_barriers[warp];
}

void note(Access& last, unsigned me) {
  const unsigned warp = me / kWarp;
  const Access now = {block_barriers, warp_barriers[warp], me, warp};
  if (last.block != now.block || (last.of_warp == warp && last.warp != now.warp)) {
    last = now;
  } else if (last.of_warp != warp) {
    last.of_warp = last.thread = kMany;
  } else if (last.thread != me) {
    last.thread = kMany;
  }
}

template <class F>
void for_bytes(const void* address, std::size_t count, F f) {
  const auto* at = static_cast<const unsigned char*>(address);
  for (int r = 0; r < 2; ++r) {
    if (at < ranges[r].begin || at >= ranges[r].begin + ranges[r].bytes) continue;
    const auto first = static_cast<std::size_t>(at - ranges[r].begin);
    for (std::size_t i = first; i < std::min(first + count, ranges[r].bytes); ++i) f(bytes_of[r][i]);
  }
}

}  // namespace

void watch(SharedRange dynamic, SharedRange variables) {
  const SharedRange given[2] = {dynamic, variables};
  for (int r = 0; r < 2; ++r) {
    ranges[r] = given[r];
    bytes_of[r].assign(given[r].bytes, Byte());
  }
}

void order_block() {
  ++block_barriers;
}

void order_warp(unsigned warp) {
  ++warp_barriers[warp];
}

// Atomics race with what reads and writes, not with each other.
void touch(const void* address, std::size_t bytes, Touch how) {
  unsigned me;
  if (!running(&me)) return;
  for_bytes(address, bytes, [&](Byte& byte) {
    const char* verb = how == Touch::kRead ? "reads" : how == Touch::kWrite ? "writes" : "changes by an atomic";
    if (byte.flying) fail("race: it %s shared memory that a copy is in flight to", verb);
    if (races(byte.write, me)) fail("race: it %s shared memory that thread %u writes", verb, byte.write.thread);
    if (how != Touch::kRead && races(byte.read, me)) fail("race: it %s shared memory that another thread reads", verb);
    if (how != Touch::kAtomic && races(byte.atomic, me))
      fail("race: it %s what another thread changes by an atomic", verb);
    if (how == Touch::kWrite) {
      byte.write = {block_barriers, warp_barriers[me / kWarp], me, me / kWarp};
    } else {
      note(how == Touch::kRead ? byte.read : byte.atomic, me);
    }
  });
}

void fly(const void* target, std::size_t bytes, bool flying) {
  for_bytes(target, bytes, [&](Byte& byte) { byte.flying = flying; });
}

}  // namespace shim

#define FASTVQ_SHIM_ANNOUNCED(size)                  \
  void __tsan_read##size(void* address) {            \
    shim::touch(address, size, shim::Touch::kRead);  \
  }                                                  \
  void __tsan_write##size(void* address) {           \
    shim::touch(address, size, shim::Touch::kWrite); \
  }                                                  \
  void __tsan_unaligned_read##size(void* address) {  \
    shim::touch(address, size, shim::Touch::kRead);  \
  }                                                  \
  void __tsan_unaligned_write##size(void* address) { \
    shim::touch(address, size, shim::Touch::kWrite); \
  }
extern "C" {
FASTVQ_SHIM_ANNOUNCED(1)
FASTVQ_SHIM_ANNOUNCED(2)
FASTVQ_SHIM_ANNOUNCED(4)
FASTVQ_SHIM_ANNOUNCED(8)
FASTVQ_SHIM_ANNOUNCED(16)
void __tsan_read_range(void* address, std::size_t bytes) {
  shim::touch(address, bytes, shim::Touch::kRead);
}
void __tsan_write_range(void* address, std::size_t bytes) {
  shim::touch(address, bytes, shim::Touch::kWrite);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
}
#undef FASTVQ_SHIM_ANNOUNCED
