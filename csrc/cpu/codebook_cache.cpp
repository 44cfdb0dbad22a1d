#include "codebook_cache.h"

#include <cstring>
#include <list>
#include <mutex>
#include <vector>

#include "row_kernel.h"

namespace fastvq {
namespace {

constexpr std::int64_t kMostBytes = std::int64_t{32} << 20;

struct Kept {
  const void* address;  // where the codes lay: a new codebook at the same place takes the old one's room
  DType dtype;
  bool screened;
  std::vector<char> codes;  // as they were when packed
  std::shared_ptr<const PackedCodebook> packed;

  std::int64_t bytes() const { return static_cast<std::int64_t>(codes.size()) + packed->bytes(); }
};

std::mutex mutex;
std::list<std::shared_ptr<const Kept>> kept;  // the most recently used first

std::int64_t row_bytes(const Rows& codes) {
  return codes.width * element_bytes(codes.dtype);
}

bool same_codes(const Kept& entry, const Rows& codes) {
  const char* copy = entry.codes.data();
  const std::int64_t bytes = row_bytes(codes);
  for (std::int64_t k = 0; k < codes.count; ++k) {
    const char* row = static_cast<const char*>(codes.data) + codes.offset(k) * element_bytes(codes.dtype);
    if (std::memcmp(row, copy + k * bytes, bytes) != 0) return false;
  }
  return true;
}

bool same_kind(const Kept& entry, const Rows& codes, Metric metric, bool screened) {
  const CodebookView& view = entry.packed->view();
  return entry.dtype == codes.dtype && entry.screened == screened && view.metric == metric &&
         view.size == codes.count && view.width == codes.width;
}

std::shared_ptr<const PackedCodebook> find(const Rows& codes, Metric metric, bool screened) {
  std::vector<std::shared_ptr<const Kept>> entries;
  {
    // Another thread may hold the lock, or have held it when this process was forked: then the codebook is packed anew.
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (!lock) return nullptr;
    entries.assign(kept.begin(), kept.end());
  }
  for (const auto& entry : entries)
    if (same_kind(*entry, codes, metric, screened) && same_codes(*entry, codes)) return entry->packed;
  return nullptr;
}

void keep(const Rows& codes, bool screened, const std::shared_ptr<const PackedCodebook>& packed) {
  const std::int64_t bytes = row_bytes(codes);
  if (codes.count * bytes + packed->bytes() > kMostBytes / 2) return;
  auto entry = std::make_shared<Kept>();
  entry->address = codes.data;
  entry->dtype = codes.dtype;
  entry->screened = screened;
  entry->codes.resize(codes.count * bytes);
  for (std::int64_t k = 0; k < codes.count; ++k) {
    const char* row = static_cast<const char*>(codes.data) + codes.offset(k) * element_bytes(codes.dtype);
    std::memcpy(entry->codes.data() + k * bytes, row, bytes);
  }
  entry->packed = packed;
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock) return;
  kept.remove_if([&](const auto& old) { return old->address == codes.data; });
  kept.push_front(std::move(entry));
  std::int64_t total = 0;
  for (auto it = kept.begin(); it != kept.end();) {
    total += (*it)->bytes();
    it = total > kMostBytes ? kept.erase(it) : std::next(it);
  }
}

}  // namespace

std::shared_ptr<const PackedCodebook> packed_codebook(const Rows& codes, Metric metric, bool screened, int threads) {
  if (codes.step == 1) {
    if (auto found = find(codes, metric, screened)) return found;
  }
  auto packed = std::make_shared<const PackedCodebook>(codes, metric, screened, row_kernel().int8, threads);
  if (codes.step == 1) keep(codes, screened, packed);
  return packed;
}

}  // namespace fastvq
