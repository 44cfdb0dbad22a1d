// How many rows took each code, counted while other threads count too. Integers: they add up alike in any order.

#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

namespace fastvq {

class CodeCounts {
 public:
  // Counts into `counts` (codes), zeroed here, by up to `threads` threads at once; null counts nothing.
  CodeCounts(std::int64_t* counts, std::int64_t codes, int threads)
      : counts_(counts),
        codes_(codes),
        way_(threads == 1               ? kAlone
             : codes * threads <= kMost ? kApart
                                        : kTogether) {
    if (counts) std::fill_n(counts, codes, 0);
  }

  // One thread's share of the counting; its counts are in the whole when it is gone.
  class Share {
   public:
    explicit Share(CodeCounts& all) : all_(all), at_(all.counts_) {
      if (!at_ || all.way_ != kApart) return;
      own_.resize(all.codes_);
      at_ = own_.data();
    }
    ~Share() {
      if (own_.empty()) return;
      const std::lock_guard<std::mutex> lock(all_.mutex_);
      for (std::int64_t k = 0; k < all_.codes_; ++k) all_.counts_[k] += own_[k];
    }
    Share(const Share&) = delete;
    Share& operator=(const Share&) = delete;

    void add(std::int64_t code) {
      if (!at_) return;
      if (all_.way_ == kTogether) {
        __atomic_fetch_add(at_ + code, 1, __ATOMIC_RELAXED);
      } else {
        ++at_[code];
      }
    }

   private:
    CodeCounts& all_;
    std::int64_t* at_;
    std::vector<std::int64_t> own_;
  };

 private:
  // Threads that count together contend for the codes that many rows take; apart they need memory for all codes each,
  // which a codebook so large that its rows are few a second does not deserve.
  enum Way { kAlone, kApart, kTogether };
  static constexpr std::int64_t kMost = 1 << 19;  // numbers, 4 MiB

  std::int64_t* const counts_;
  const std::int64_t codes_;
  const Way way_;
  std::mutex mutex_;
};

}  // namespace fastvq
