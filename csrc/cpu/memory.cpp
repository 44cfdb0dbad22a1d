#include "memory.h"

#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastvq {
namespace {

constexpr std::int64_t kFewestBytes = 64 << 10;  // below, malloc keeps memory itself
constexpr std::int64_t kMostBytes = std::int64_t{64} << 20;
constexpr std::int64_t kHugePage = 2 << 20;
constexpr std::int64_t kHugeBytes = 2 * kHugePage;  // from here on in huge pages: few faults, few misses of the TLB

struct Block {
  void* data;
  std::int64_t bytes;
};

// Never destroyed: blocks may come back when the process ends.
struct Kept {
  std::mutex mutex;
  std::list<Block> blocks;  // those given back last first
  std::int64_t bytes = 0;
};
Kept& kept() {
  static Kept* const the_one = new Kept;
  return *the_one;
}

std::align_val_t alignment_of(std::int64_t bytes) {
  return std::align_val_t{static_cast<std::size_t>(bytes >= kHugeBytes ? kHugePage : 64)};
}

void* allocate(std::int64_t bytes) {
  void* const data = ::operator new(static_cast<std::size_t>(bytes), alignment_of(bytes));
#if defined(MADV_HUGEPAGE)
  // Advice: where it is not taken, only speed is lost.
  if (bytes >= kHugeBytes) madvise(data, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
#endif
  return data;
}

void release(const Block& block) {
  ::operator delete(block.data, alignment_of(block.bytes));
}

// Whether a block serves without wasting more than an eighth.
bool serves(const Block& block, std::int64_t bytes) {
  return block.bytes >= bytes && block.bytes - bytes <= bytes / 8;
}

}  // namespace

Memory::Memory(std::int64_t bytes) : bytes_(bytes) {
  if (bytes >= kFewestBytes) {
    Kept& all = kept();
    // Another thread may hold the lock, or have held it when this process was forked.
    const std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
    if (lock) {
      for (auto block = all.blocks.begin(); block != all.blocks.end(); ++block) {
        if (!serves(*block, bytes)) continue;
        data_ = block->data;
        bytes_ = block->bytes;
        all.bytes -= bytes_;
        all.blocks.erase(block);
        return;
      }
    }
  }
  data_ = allocate(bytes);
}

Memory::~Memory() {
  if (!data_) return;
  if (bytes_ >= kFewestBytes && bytes_ <= kMostBytes) {
    Kept& all = kept();
    const std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
    if (lock) {
      all.blocks.push_front({data_, bytes_});
      all.bytes += bytes_;
      while (all.bytes > kMostBytes) {
        release(all.blocks.back());
        all.bytes -= all.blocks.back().bytes;
        all.blocks.pop_back();
      }
      return;
    }
  }
  release({data_, bytes_});
}

}  // namespace fastvq
