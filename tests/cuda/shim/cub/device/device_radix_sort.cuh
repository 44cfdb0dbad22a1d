// cub::DeviceRadixSort on the CPU: found in place of CUB's header, it sorts at once, and promises no more than CUB
// does:
// - scratch is asked for with a null pointer, must be as large as was said, and is overwritten;
// - which of two buffers the sorted items lie in depends on how many passes they take; the other holds poison.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace cub {

template <class T>
struct DoubleBuffer {
  T* d_buffers[2] = {};
  int selector = 0;

  DoubleBuffer() = default;
  DoubleBuffer(T* current, T* alternate) : d_buffers{current, alternate} {}
  T* Current() { return d_buffers[selector]; }
  T* Alternate() { return d_buffers[selector ^ 1]; }
};

struct DeviceRadixSort {
  template <class Key, class Value, class Count>
  static cudaError_t SortPairs(void* scratch, std::size_t& scratch_bytes, DoubleBuffer<Key>& keys,
                               DoubleBuffer<Value>& values, Count count, int begin_bit, int end_bit,
                               cudaStream_t stream) {
    constexpr int kDigit = 8;
    constexpr Count kTile = 16;  // so few are sorted in one pass, whatever their bits
    if (begin_bit < 0 || begin_bit > end_bit || end_bit > static_cast<int>(8 * sizeof(Key)))
      shim::fail("a sort by the bits %d to %d of keys of %zu bytes", begin_bit, end_bit, sizeof(Key));
    const int bits = end_bit - begin_bit, passes = count <= kTile ? 1 : (bits + kDigit - 1) / kDigit;
    const std::size_t needed = count <= kTile ? 1 : (passes << kDigit) * sizeof(Count);
    if (!scratch) {
      scratch_bytes = needed;
      return cudaSuccess;
    }
    if (scratch_bytes < needed) return cudaErrorInvalidValue;
    shim::check_stream("a sort", stream);
    shim::check_aligned(keys.Current(), sizeof(Key), "the keys of a sort");
    shim::check_aligned(values.Current(), sizeof(Value), "the values of a sort");
    if (count == 0 || bits == 0) return cudaSuccess;
    std::vector<std::pair<Key, Value>> items(count);
    for (Count i = 0; i < count; ++i) items[i] = {keys.Current()[i], values.Current()[i]};
    std::stable_sort(items.begin(), items.end(), [&](const auto& a, const auto& b) {
      const auto digits = [&](Key key) { return key >> begin_bit & ((std::uint64_t{1} << bits) - 1); };
      return digits(a.first) < digits(b.first);
    });
    std::memset(scratch, 0xff, needed);
    keys.selector ^= passes & 1;
    values.selector ^= passes & 1;
    for (Count i = 0; i < count; ++i) keys.Current()[i] = items[i].first, values.Current()[i] = items[i].second;
    std::memset(keys.Alternate(), 0xff, count * sizeof(Key));
    std::memset(values.Alternate(), 0xff, count * sizeof(Value));
    return cudaSuccess;
  }
};

}  // namespace cub
