// Memory that is kept for reuse: pages fresh from the kernel cost more than much of what is written to them.

#pragma once

#include <cstdint>

namespace fastvq {

// A block of at least that many bytes, aligned for vectors; throws std::bad_alloc. Large ones come from what was given
// back, 64 MiB of which at most are kept.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::int64_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
    other.bytes_ = 0;
  }
  Memory& operator=(Memory&& other) noexcept {
    void* const data = data_;
    const std::int64_t bytes = bytes_;
    data_ = other.data_;
    bytes_ = other.bytes_;
    other.data_ = data;
    other.bytes_ = bytes;
    return *this;
  }

  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

// Room for values of T, not initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t count) : memory_(count * static_cast<std::int64_t>(sizeof(T))) {}

  T* get() const { return static_cast<T*>(memory_.data()); }
  T& operator[](std::int64_t i) const { return get()[i]; }
  explicit operator bool() const { return memory_.data() != nullptr; }

 private:
  Memory memory_;
};

}  // namespace fastvq
