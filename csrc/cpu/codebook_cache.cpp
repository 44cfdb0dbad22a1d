#include "codebook_cache.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "few_rows.h"
#include "parallel.h"
#include "row_kernel.h"
#include "search_way.h"

namespace fastvq {

struct Kept {
  // Where the codes lay: a new codebook at the same place takes the old one's room; of which `Unchanged` they were; and
  // whether a call has found them again. All only under the lock.
  mutable const void* address;
  mutable std::uint64_t token;
  mutable bool found = false;
  DType dtype;
  bool screened;
  Buffer<char> codes;  // as they were when packed
  std::int64_t code_bytes;
  std::shared_ptr<const PackedCodebook> packed;

  std::int64_t bytes() const { return code_bytes + packed->bytes(); }
};

namespace {

// What kept codebooks may take together.
std::int64_t most_bytes() {
  static const std::int64_t bytes = [] {
    const char* wanted = std::getenv("FASTVQ_CPU_KEPT_MIB");
    if (!wanted || !*wanted) return std::int64_t{384} << 20;
    char* end = nullptr;
    const long long mib = std::strtoll(wanted, &end, 10);
    if (*end || mib < 0 || mib > 1 << 30)
      throw std::invalid_argument("FASTVQ_CPU_KEPT_MIB must be a whole number of MiB, from 0 on; got '" +
                                  std::string(wanted) + "'");
    return static_cast<std::int64_t>(mib) << 20;
  }();
  return bytes;
}

// Of it, what those may take that nobody vouches for and no call has found again: codebooks that live for one step of a
// training are no use to the next.
std::int64_t most_idle_bytes() {
  return most_bytes() / 8;
}

thread_local std::uint64_t unchanged_token = 0;
std::mutex mutex;
std::list<std::shared_ptr<const Kept>> kept;  // the most recently used first

// Whether the codes lie one after another.
bool lie_together(const Rows& codes) {
  return codes.count == 1 || codes.bytes_at(1) - codes.bytes_at(0) == codes.row_bytes();
}

// Calls body(first, count, row) for runs of rows that lie one after another, none longer than kRunBytes.
template <class Body>
void for_each_run(const Rows& codes, int threads, const Body& body) {
  constexpr std::int64_t kRunBytes = 1 << 16;
  const std::int64_t rows = std::max<std::int64_t>(1, kRunBytes / codes.row_bytes());
  const bool together = lie_together(codes);
  parallel((codes.count + rows - 1) / rows, threads, [&](Tasks& tasks) {
    for (std::int64_t task; tasks.next(&task);) {
      const std::int64_t first = task * rows, end = std::min(codes.count, first + rows);
      if (together) {
        body(first, end - first, codes.bytes_at(first));
      } else {
        for (std::int64_t k = first; k < end; ++k) body(k, std::int64_t{1}, codes.bytes_at(k));
      }
    }
  });
}

bool same_kind(const Kept& entry, const Rows& codes, Metric metric, bool screened) {
  const CodebookView& view = entry.packed->view();
  return entry.dtype == codes.dtype && entry.screened == screened && view.metric == metric &&
         view.size == codes.count && view.width == codes.width;
}

bool unchanged(const Kept& entry, const Rows& codes, Metric metric, bool screened) {
  return unchanged_token && entry.token == unchanged_token && entry.address == codes.data &&
         same_kind(entry, codes, metric, screened);
}

// Whether the first and the last of the codes are those of a kept codebook: another one mostly differs there.
bool likely(const Kept& entry, const Rows& codes, Metric metric, bool screened) {
  const std::int64_t bytes = codes.row_bytes(), last = codes.count - 1;
  return same_kind(entry, codes, metric, screened) && std::memcmp(codes.bytes_at(0), entry.codes.get(), bytes) == 0 &&
         std::memcmp(codes.bytes_at(last), entry.codes.get() + last * bytes, bytes) == 0;
}

bool same_codes(const Kept& entry, const Rows& codes, int threads) {
  constexpr std::int64_t kByteWork = 16;  // multiply-adds that reading a byte of both is worth
  const std::int64_t bytes = codes.row_bytes();
  std::atomic<bool> same{true};
  // Waking the others is for the search too, which comes next.
  for_each_run(
      codes, worth_threads(codes.count * bytes * kByteWork, threads),
      [&](std::int64_t k, std::int64_t count, const char* row) {
        if (same.load(std::memory_order_relaxed) && std::memcmp(row, entry.codes.get() + k * bytes, count * bytes) != 0)
          same.store(false, std::memory_order_relaxed);
      });
  return same;
}

// A call has found a kept codebook to be its own.
void found(const Kept& entry, const Rows& codes) {
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock) return;
  entry.found = true;
  if (!unchanged_token) return;
  entry.token = unchanged_token;
  entry.address = codes.data;
}

// The kept codebooks, none while another thread holds the lock, or held it when this process was forked. Where one
// counts as unchanged, that one alone.
std::vector<std::shared_ptr<const Kept>> kept_of(const Rows& codes, Metric metric, bool screened) {
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock) return {};
  for (const auto& entry : kept)
    if (unchanged(*entry, codes, metric, screened)) return {entry};
  return {kept.begin(), kept.end()};
}

std::shared_ptr<const PackedCodebook> find(const Rows& codes, Metric metric, bool screened, int threads) {
  for (const auto& entry : kept_of(codes, metric, screened)) {
    if (unchanged(*entry, codes, metric, screened)) return entry->packed;
    if (!likely(*entry, codes, metric, screened) || !same_codes(*entry, codes, threads)) continue;
    found(*entry, codes);
    return entry->packed;
  }
  return nullptr;
}

// Whether a few rows too should be searched in packed codes: they need not be compared, and are or can be kept.
bool better_packed(const Rows& codes, Metric metric) {
  if (!unchanged_token) return false;
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock) return false;
  std::int64_t total = 2 * codes.count * codes.row_bytes();  // about what one takes
  for (const auto& entry : kept) {
    if (unchanged(*entry, codes, metric, true)) return true;
    total += entry->bytes();
  }
  return total <= most_bytes();
}

// Lets go of what was packed of a codebook at this address: it has changed, and its room is wanted.
void forget(const Rows& codes) {
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (lock) kept.remove_if([&](const auto& old) { return old->address == codes.data; });
}

void keep(const Rows& codes, bool screened, Buffer<char> copy, const std::shared_ptr<const PackedCodebook>& packed) {
  const std::int64_t bytes = codes.count * codes.row_bytes();
  if (bytes + packed->bytes() > most_bytes()) return;
  auto entry = std::make_shared<Kept>();
  entry->address = codes.data;
  entry->token = unchanged_token;
  entry->dtype = codes.dtype;
  entry->screened = screened;
  entry->codes = std::move(copy);
  entry->code_bytes = bytes;
  entry->packed = packed;
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock) return;
  kept.push_front(std::move(entry));
  std::int64_t total = 0, idle = 0;
  for (auto it = kept.begin(); it != kept.end();) {
    const std::int64_t size = (*it)->bytes();
    const bool is_idle = !(*it)->found && !(*it)->token;
    const bool goes = total + size > most_bytes() || (is_idle && idle > 0 && idle + size > most_idle_bytes());
    total += goes ? 0 : size;
    idle += is_idle && !goes ? size : 0;
    it = goes ? kept.erase(it) : std::next(it);
  }
}

}  // namespace

Unchanged::Unchanged(std::uint64_t token) : before_(unchanged_token) {
  unchanged_token = token;
}

Unchanged::~Unchanged() {
  unchanged_token = before_;
}

std::shared_ptr<const PackedCodebook> packed_codebook(const Rows& codes, Metric metric, bool screened, int threads) {
  if (codes.step == 1) {
    if (auto found = find(codes, metric, screened, threads)) return found;
    forget(codes);
  }
  const bool int8 = row_kernel().int8 && search_way(codes.count, codes.width).int8;
  const std::int64_t bytes = codes.count * codes.row_bytes();
  Buffer<char> copy;
  if (codes.step == 1 && bytes <= most_bytes()) copy = Buffer<char>(bytes);
  auto packed = std::make_shared<const PackedCodebook>(codes, metric, screened, int8, copy.get(), threads);
  if (copy) keep(codes, screened, std::move(copy), packed);
  return packed;
}

LikelyCodebook::LikelyCodebook(const Rows& codes, Metric metric, bool screened, std::int64_t row_count)
    : codes_(codes) {
  if (codes.step != 1 || !lie_together(codes) || unchanged_token) return;
  if (screened && few_rows(row_count, codes, metric)) return;
  for (const auto& entry : kept_of(codes, metric, screened)) {
    if (entry_ && entry->address != codes.data) continue;
    if (likely(*entry, codes, metric, screened)) entry_ = entry;
  }
}

SearchCodes LikelyCodebook::codes() const {
  return {codes_, entry_->packed, entry_->packed->view(codes_)};
}

Twins LikelyCodebook::twins(std::int64_t block, std::int64_t blocks) const {
  const std::int64_t lines = entry_->code_bytes / 64, first = lines * block / blocks * 64;
  const std::int64_t end = block + 1 == blocks ? entry_->code_bytes : lines * (block + 1) / blocks * 64;
  return {codes_.bytes_at(0) + first, entry_->codes.get() + first, end - first};
}

void LikelyCodebook::compared(const Twins& twins) {
  if (!twins.same || std::memcmp(twins.one, twins.other, twins.bytes) != 0)
    same_.store(false, std::memory_order_relaxed);
}

bool LikelyCodebook::found_same() const {
  if (same_) found(*entry_, codes_);
  return same_;
}

SearchCodes search_codes(const Rows& codes, Metric metric, bool screened, std::int64_t row_count, int threads) {
  if (screened && few_rows(row_count, codes, metric) && !better_packed(codes, metric)) return {codes, nullptr, {}};
  auto packed = packed_codebook(codes, metric, screened, threads);
  const CodebookView view = packed->view(codes);
  return {codes, std::move(packed), view};
}

}  // namespace fastvq
