#include "memory.h"

#include <list>
#include <mutex>
#include <new>

namespace fastvq {
namespace {

constexpr std::int64_t kFewestBytes = 64 << 10;  // below, malloc keeps memory itself
constexpr std::int64_t kMostBytes = std::int64_t{64} << 20;
constexpr std::align_val_t kAlignment{64};

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
  data_ = ::operator new(static_cast<std::size_t>(bytes), kAlignment);
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
        ::operator delete(all.blocks.back().data, kAlignment);
        all.bytes -= all.blocks.back().bytes;
        all.blocks.pop_back();
      }
      return;
    }
  }
  ::operator delete(data_, kAlignment);
}

}  // namespace fastvq
