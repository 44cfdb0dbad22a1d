// Strided tensors as torch lays them out, and the four floating types they hold.

#pragma once

#include <cstdint>
#include <cstring>

namespace fastvq {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

inline std::int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

namespace {  // per translation unit: files for different instruction sets must not share code

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(float v) {
  return v;
}
inline double widen(double v) {
  return v;
}
inline float widen(BFloat16 v) {
  return bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16);
}
inline float widen(Float16 v) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(v.bits & 0x7fff) << 13;
  // The exponent bias differs by 112; the product is exact, subnormals too. Infinity and NaN keep an exponent of ones.
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000) << 16;
  return bit_cast<float>(bit_cast<std::uint32_t>(scaled) | special | sign);
}

template <class T>
T narrow(double v);
template <>
inline double narrow<double>(double v) {
  return v;
}
template <>
inline float narrow<float>(double v) {
  return static_cast<float>(v);
}
template <>
inline BFloat16 narrow<BFloat16>(double v) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(static_cast<float>(v));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((bits >> 16) | 0x40)};  // stays NaN
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};                  // to even
}
template <>
inline Float16 narrow<Float16>(double v) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(static_cast<float>(v));
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded significand in the low bits
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(shifted) - 0x3f000000u))};
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace

constexpr int kMaxDims = 12;

// Rows of D elements under any leading shape: row n of a tensor (..., D), strides in elements.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t count = 0;  // N, the product of the leading sizes
  std::int64_t width = 0;  // D
  std::int64_t step = 1;   // stride of the last dimension
  int dims = 0;            // leading dimensions, merged where one stride serves two
  std::int64_t sizes[kMaxDims] = {};
  std::int64_t strides[kMaxDims] = {};

  std::int64_t offset(std::int64_t n) const {
    if (dims == 1) return n * strides[0];
    std::int64_t total = 0;
    for (int i = dims - 1; i >= 0; --i) {
      total += n % sizes[i] * strides[i];
      n /= sizes[i];
    }
    return total;
  }

  template <class T>
  T* row(std::int64_t n) const {
    return static_cast<T*>(data) + offset(n);
  }

  std::int64_t row_bytes() const { return width * element_bytes(dtype); }
  const char* bytes_at(std::int64_t n) const {
    return static_cast<const char*>(data) + offset(n) * element_bytes(dtype);
  }
  // Rows whose elements lie side by side, to where they belong in `out`, which has all rows one after another.
  void copy_bytes(std::int64_t first, std::int64_t count, char* out) const {
    const std::int64_t bytes = row_bytes();
    for (std::int64_t n = first; n < first + count; ++n) std::memcpy(out + n * bytes, bytes_at(n), bytes);
  }

  // out[i] = row first + i, for i below `count`.
  template <class T>
  void rows_from(std::int64_t first, int count, const T** out) const {
    if (dims == 1) {
      const T* row = static_cast<const T*>(data) + first * strides[0];
      for (int i = 0; i < count; ++i, row += strides[0]) out[i] = row;
    } else {
      for (int i = 0; i < count; ++i) out[i] = row<T>(first + i);
    }
  }
};

// Rows of float or double that lie one after another.
template <class Working>
inline Rows dense_rows(Working* data, std::int64_t count, std::int64_t width) {
  Rows r;
  r.data = data;
  r.dtype = sizeof(Working) == 8 ? DType::kFloat64 : DType::kFloat32;
  r.count = count;
  r.width = width;
  r.dims = 1;
  r.sizes[0] = count;
  r.strides[0] = width;
  return r;
}

// A tensor as it comes from torch.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int dims = 0;
  std::int64_t sizes[kMaxDims] = {};
  std::int64_t strides[kMaxDims] = {};

  // Index i of dimension `dim`, which goes.
  Tensor select(int dim, std::int64_t i) const {
    Tensor part = *this;
    part.data = static_cast<char*>(data) + i * strides[dim] * element_bytes(dtype);
    part.dims = dims - 1;
    for (int d = dim; d < part.dims; ++d) {
      part.sizes[d] = sizes[d + 1];
      part.strides[d] = strides[d + 1];
    }
    return part;
  }

  // The same under a leading dimension of one.
  Tensor under_head() const {
    Tensor whole = *this;
    whole.dims = dims + 1;
    whole.sizes[0] = 1;
    whole.strides[0] = 0;
    for (int d = 0; d < dims; ++d) {
      whole.sizes[d + 1] = sizes[d];
      whole.strides[d + 1] = strides[d];
    }
    return whole;
  }

  Rows rows() const {
    Rows r;
    r.data = data;
    r.dtype = dtype;
    r.width = sizes[dims - 1];
    r.step = strides[dims - 1];
    r.count = 1;
    for (int d = 0; d < dims - 1; ++d) {
      r.count *= sizes[d];
      if (sizes[d] == 1) continue;
      if (r.dims > 0 && r.strides[r.dims - 1] == strides[d] * sizes[d]) {
        r.sizes[r.dims - 1] *= sizes[d];
        r.strides[r.dims - 1] = strides[d];
      } else {
        r.sizes[r.dims] = sizes[d];
        r.strides[r.dims++] = strides[d];
      }
    }
    return r;
  }
};

// Calls f with a null pointer of the element type that dtype stands for.
template <class F>
inline void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
  }
}

// Calls f with null pointers of two element types.
template <class F>
void dispatch_pair(DType first, DType second, const F& f) {
  dispatch(first, [&](auto* first_type) { dispatch(second, [&](auto* second_type) { f(first_type, second_type); }); });
}

}  // namespace fastvq
