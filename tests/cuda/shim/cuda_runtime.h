// CUDA on the CPU, for tests: found by the kernels' sources in place of NVIDIA's header, it makes g++ compile them and
// runs them with one fiber a CUDA thread, as hostile as the programming model allows:
// - each warp, and in it each lane, runs ahead as far as it can, in an order drawn from a seed (fastvq_shim_seed);
// - shared memory and the targets of cp.async that are not waited for hold NaN;
// - what the model leaves undefined ends the program with a message: divergent barriers, lanes outside the mask,
//   misaligned addresses, shared memory past its size, copies left in flight;
// - and, in sources compiled with -fsanitize=thread, two threads that touch a byte of shared memory, one of them
// writing,
//   with nothing that orders them: races.cpp takes the place of that sanitizer's library.
// The sources see FASTVQ_CUDA_SHIM. Blocks run one after the other, so kernels must not wait for another block.
#pragma once
#define FASTVQ_CUDA_SHIM 1

#include <math.h>

#include <algorithm>
#include <cfenv>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static __attribute__((section("fastvq_shared")))

// ---- vector types -------------------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define FASTVQ_SHIM_VECTOR(T, name)                                 \
  struct alignas(2 * sizeof(T)) name##2 {                           \
    T x, y;                                                         \
  };                                                                \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { \
    T x, y, z, w;                                                   \
  };                                                                \
  inline name##2 make_##name##2(T x, T y) {                         \
    return {x, y};                                                  \
  }                                                                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) {               \
    return {x, y, z, w};                                            \
  }
FASTVQ_SHIM_VECTOR(int, int)
FASTVQ_SHIM_VECTOR(unsigned, uint)
FASTVQ_SHIM_VECTOR(float, float)
FASTVQ_SHIM_VECTOR(unsigned short, ushort)
FASTVQ_SHIM_VECTOR(double, double)
FASTVQ_SHIM_VECTOR(long long, longlong)
FASTVQ_SHIM_VECTOR(unsigned long long, ulonglong)
#undef FASTVQ_SHIM_VECTOR

// ---- the runtime's interface, as far as it is used ----------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct fastvq_shim_stream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

extern "C" __attribute__((visibility("default"))) void fastvq_shim_seed(std::uint64_t seed);
// The only stream that launches may name from now on; at first the null stream.
extern "C" __attribute__((visibility("default"))) void fastvq_shim_stream(std::uintptr_t stream);

namespace shim {

constexpr unsigned kWarp = 32;
constexpr std::size_t kMaxShared = 227 * 1024;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

unsigned lane();
void* dynamic_shared();
void check_stream(const char* what, cudaStream_t stream);
cudaError_t allow_shared(const void* kernel, std::size_t bytes);
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);

// All threads of the block meet; the sum of what they bring.
int barrier(const char* name, int line, int value);

// The lanes of a mask meet; the last to come calls finish(ins, outs, mask) for all of them.
void meet(const char* name, unsigned mask, const void* in, void* out,
          void (*finish)(const void* const* ins, void* const* outs, unsigned mask));

// What the lanes of a mask compute together: f(inputs, lane) -> Out, where inputs[l] is lane l's `in`, nullptr for
// lanes outside the mask. F has no state: all that differs between lanes is in In.
template <class Out, class In, class F>
Out collective(const char* name, unsigned mask, const In& in, F) {
  static_assert(std::is_empty_v<F>, "what a collective needs is passed in `in`");
  Out out;
  meet(name, mask, &in, &out, [](const void* const* ins, void* const* outs, unsigned lanes) {
    const In* inputs[kWarp];
    for (unsigned l = 0; l < kWarp; ++l) inputs[l] = static_cast<const In*>(ins[l]);
    char empty = 0;
    F* f = reinterpret_cast<F*>(&empty);
    for (unsigned l = 0; l < kWarp; ++l) {
      if (lanes >> l & 1)
        *static_cast<Out*>(outs[l]) = (*f)(static_cast<const In* const*>(inputs), static_cast<int>(l));
    }
  });
  return out;
}

inline void check_aligned(const void* address, std::size_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes)
    fail("%s: %p is not aligned to %zu bytes", what, address, bytes);
}

// cp.async: the target holds poison until its group is waited for; bytes past `valid` become zero.
void async_copy(void* target, const void* source, std::size_t bytes, std::size_t valid);
void async_commit();
void async_wait(unsigned newest_groups_left);

// Who has touched shared memory since when (races.cpp). `forget` begins a block, `order_block` and `order_warp` are
// what barriers do; a byte that a copy is in flight to may not be touched by anyone.
struct SharedRange {
  const unsigned char* begin;
  std::size_t bytes;
};
void watch(SharedRange dynamic, SharedRange variables);
void order_block();
void order_warp(unsigned warp);
enum class Touch { kRead, kWrite, kAtomic };
void touch(const void* address, std::size_t bytes, Touch how);
void fly(const void* target, std::size_t bytes, bool flying);
bool running(unsigned* thread);  // whether a thread of a block is, and its number

}  // namespace shim

inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "invalid configuration argument";
  }
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  return shim::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<std::size_t>(bytes));
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const std::tuple<P...> values(std::forward<A>(arguments)...);
  return shim::run(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, values); });
}

// ---- what a thread sees -------------------------------------------------------------------------------------------

// Of the running thread; set when a fiber goes on.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline void __syncthreads(int line = __builtin_LINE()) {
  shim::barrier("__syncthreads", line, 0);
}
inline int __syncthreads_count(int value, int line = __builtin_LINE()) {
  return shim::barrier("__syncthreads_count", line, value != 0);
}
inline int __syncthreads_or(int value, int line = __builtin_LINE()) {
  return shim::barrier("__syncthreads_or", line, value != 0) != 0;
}
inline int __syncthreads_and(int value, int line = __builtin_LINE()) {
  return shim::barrier("__syncthreads_and", line, value == 0) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() {
  shim::fail("__trap");
}
inline unsigned __activemask() {
  return 1u << shim::lane();  // no more may be relied on
}

namespace shim {

struct Nothing {};

template <class T>
struct Shuffle {
  T value;
  int source;
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "what a shuffle can carry");
  if (!(mask >> source & 1)) fail("%s: lane %d, which is read, is outside the mask %08x", name, source, mask);
  return collective<T>(name, mask, Shuffle<T>{value, source},
                       [](const Shuffle<T>* const* in, int lane) { return in[in[lane]->source]->value; });
}

template <class T, class F>
T reduce(const char* name, unsigned mask, T value, F) {
  return collective<T>(name, mask, value, [](const T* const* in, int) {
    char empty = 0;
    F* f = reinterpret_cast<F*>(&empty);
    bool any = false;
    T total{};
    for (unsigned l = 0; l < kWarp; ++l) {
      if (in[l]) total = any ? (*f)(total, *in[l]) : *in[l], any = true;
    }
    return total;
  });
}

}  // namespace shim

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  shim::collective<shim::Nothing>("__syncwarp", mask, shim::Nothing{},
                                  [](const shim::Nothing* const*, int) { return shim::Nothing{}; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = static_cast<int>(shim::lane()) & ~(width - 1);
  return shim::shuffle("__shfl_sync", mask, value, base | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = static_cast<int>(shim::lane()), source = lane ^ bits;
  return shim::shuffle("__shfl_xor_sync", mask, value, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(shim::lane()), source = lane + static_cast<int>(delta);
  return shim::shuffle("__shfl_down_sync", mask, value, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(shim::lane()), source = lane - static_cast<int>(delta);
  return shim::shuffle("__shfl_up_sync", mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return shim::collective<unsigned>("__ballot_sync", mask, predicate, [](const int* const* in, int) {
    unsigned votes = 0;
    for (unsigned l = 0; l < shim::kWarp; ++l) votes |= (in[l] && *in[l] ? 1u : 0u) << l;
    return votes;
  });
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return shim::collective<unsigned>("__match_any_sync", mask, value, [](const T* const* in, int lane) {
    unsigned same = 0;
    for (unsigned l = 0; l < shim::kWarp; ++l) same |= (in[l] && *in[l] == *in[lane] ? 1u : 0u) << l;
    return same;
  });
}
#define FASTVQ_SHIM_REDUCE(name, T, expression)                                        \
  inline T name(unsigned mask, T value) {                                              \
    return shim::reduce(#name, mask, value, [](T a, T b) -> T { return expression; }); \
  }
FASTVQ_SHIM_REDUCE(__reduce_add_sync, unsigned, a + b)
FASTVQ_SHIM_REDUCE(__reduce_add_sync, int, a + b)
FASTVQ_SHIM_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
FASTVQ_SHIM_REDUCE(__reduce_min_sync, int, a < b ? a : b)
FASTVQ_SHIM_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
FASTVQ_SHIM_REDUCE(__reduce_max_sync, int, a > b ? a : b)
FASTVQ_SHIM_REDUCE(__reduce_or_sync, unsigned, a | b)
FASTVQ_SHIM_REDUCE(__reduce_and_sync, unsigned, a& b)
#undef FASTVQ_SHIM_REDUCE

// ---- atomics: one fiber runs at a time; their own accesses are not announced as reads and writes -------------------

#define FASTVQ_SHIM_UNANNOUNCED __attribute__((noinline, no_sanitize_thread))
#define FASTVQ_SHIM_ATOMIC(name, expression)                                \
  template <class T>                                                        \
  FASTVQ_SHIM_UNANNOUNCED T name(T* address, std::common_type_t<T> value) { \
    shim::check_aligned(address, sizeof(T), #name);                         \
    shim::touch(address, sizeof(T), shim::Touch::kAtomic);                  \
    const T old = *address;                                                 \
    *address = static_cast<T>(expression);                                  \
    return old;                                                             \
  }
FASTVQ_SHIM_ATOMIC(atomicAdd, old + value)
FASTVQ_SHIM_ATOMIC(atomicMin, value < old ? value : old)
FASTVQ_SHIM_ATOMIC(atomicMax, value > old ? value : old)
FASTVQ_SHIM_ATOMIC(atomicOr, old | value)
FASTVQ_SHIM_ATOMIC(atomicAnd, old& value)
FASTVQ_SHIM_ATOMIC(atomicExch, value)
#undef FASTVQ_SHIM_ATOMIC
template <class T>
FASTVQ_SHIM_UNANNOUNCED T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  shim::check_aligned(address, sizeof(T), "atomicCAS");
  shim::touch(address, sizeof(T), shim::Touch::kAtomic);
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}
#undef FASTVQ_SHIM_UNANNOUNCED

// ---- arithmetic by name --------------------------------------------------------------------------------------------

template <class To, class From>
To fastvq_shim_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float v) {
  return fastvq_shim_bits<int>(v);
}
inline unsigned __float_as_uint(float v) {
  return fastvq_shim_bits<unsigned>(v);
}
inline float __int_as_float(int v) {
  return fastvq_shim_bits<float>(v);
}
inline float __uint_as_float(unsigned v) {
  return fastvq_shim_bits<float>(v);
}
inline long long __double_as_longlong(double v) {
  return fastvq_shim_bits<long long>(v);
}
inline double __longlong_as_double(long long v) {
  return fastvq_shim_bits<double>(v);
}
inline int __popc(unsigned v) {
  return __builtin_popcount(v);
}
inline int __ffs(unsigned v) {
  return __builtin_ffs(static_cast<int>(v));
}
inline int __clz(unsigned v) {
  return v ? __builtin_clz(v) : 32;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

namespace shim {

// An operation under one of the rounding modes; volatile keeps the compiler from computing it elsewhere.
template <class T, class F>
T rounded(int mode, F f) {
  const int before = std::fegetround();
  std::fesetround(mode);
  const volatile T result = f();
  std::fesetround(before);
  return result;
}

}  // namespace shim

#define FASTVQ_SHIM_ROUNDED(T, name, suffix, mode)                               \
  inline T __##name##add_##suffix(T a, T b) {                                    \
    volatile T x = a, y = b;                                                     \
    return shim::rounded<T>(mode, [&] { return x + y; });                        \
  }                                                                              \
  inline T __##name##sub_##suffix(T a, T b) {                                    \
    volatile T x = a, y = b;                                                     \
    return shim::rounded<T>(mode, [&] { return x - y; });                        \
  }                                                                              \
  inline T __##name##mul_##suffix(T a, T b) {                                    \
    volatile T x = a, y = b;                                                     \
    return shim::rounded<T>(mode, [&] { return x * y; });                        \
  }                                                                              \
  inline T __##name##div_##suffix(T a, T b) {                                    \
    volatile T x = a, y = b;                                                     \
    return shim::rounded<T>(mode, [&] { return x / y; });                        \
  }                                                                              \
  inline T __##name##sqrt_##suffix(T a) {                                        \
    volatile T x = a;                                                            \
    return shim::rounded<T>(mode, [&] { return std::sqrt(static_cast<T>(x)); }); \
  }
#define FASTVQ_SHIM_MODES(suffix, mode)                                                        \
  FASTVQ_SHIM_ROUNDED(float, f, suffix, mode)                                                  \
  FASTVQ_SHIM_ROUNDED(double, d, suffix, mode)                                                 \
  inline float __double2float_##suffix(double a) {                                             \
    volatile double x = a;                                                                     \
    return shim::rounded<float>(mode, [&] { return static_cast<float>(x); });                  \
  }                                                                                            \
  inline float __fmaf_##suffix(float a, float b, float c) {                                    \
    volatile float x = a, y = b, z = c;                                                        \
    return shim::rounded<float>(mode, [&] { return std::fma(float(x), float(y), float(z)); }); \
  }
FASTVQ_SHIM_MODES(ru, FE_UPWARD)
FASTVQ_SHIM_MODES(rd, FE_DOWNWARD)
#undef FASTVQ_SHIM_MODES
#undef FASTVQ_SHIM_ROUNDED

inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fsqrt_rn(float a) {
  return std::sqrt(a);
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double __dsub_rn(double a, double b) {
  return a - b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline double __ddiv_rn(double a, double b) {
  return a / b;
}
inline double __dsqrt_rn(double a) {
  return std::sqrt(a);
}
inline double __fma_rn(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline float __double2float_rn(double a) {
  return static_cast<float>(a);
}

#define FASTVQ_SHIM_MIN_MAX(T) \
  inline T min(T a, T b) {     \
    return b < a ? b : a;      \
  }                            \
  inline T max(T a, T b) {     \
    return a < b ? b : a;      \
  }
FASTVQ_SHIM_MIN_MAX(int)
FASTVQ_SHIM_MIN_MAX(unsigned)
FASTVQ_SHIM_MIN_MAX(long)
FASTVQ_SHIM_MIN_MAX(unsigned long)
FASTVQ_SHIM_MIN_MAX(long long)
FASTVQ_SHIM_MIN_MAX(unsigned long long)
#undef FASTVQ_SHIM_MIN_MAX
inline float min(float a, float b) {
  return std::fmin(a, b);
}
inline float max(float a, float b) {
  return std::fmax(a, b);
}
inline double min(double a, double b) {
  return std::fmin(a, b);
}
inline double max(double a, double b) {
  return std::fmax(a, b);
}
