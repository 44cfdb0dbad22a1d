// Small kernels, each right as it stands and wrong with a fault put in: `faults NAME 0|1 SEED` runs one and compares
// what it computes. The shim must let every right one pass and catch every fault.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// A value that the compiler must not leave unread.
void use(int value) {
  asm volatile("" : : "r"(value));
}

// Each thread takes the value of its mirror image from shared memory.
__global__ void reverse(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  values[threadIdx.x] = in[threadIdx.x];
  if (!fault) __syncthreads();
  out[threadIdx.x] = values[127 - threadIdx.x];
}

// As above, twice through the same memory: the second barrier keeps the first round's readers safe.
__global__ void reverse_twice(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  int value = in[threadIdx.x];
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = value + round;
    __syncthreads();
    value = values[127 - threadIdx.x];
    if (!fault) __syncthreads();
  }
  out[threadIdx.x] = value - 1 + in[127 - threadIdx.x] - in[threadIdx.x];
}

// The same within each warp.
__global__ void reverse_warp(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  values[threadIdx.x] = in[threadIdx.x ^ 96];
  if (!fault) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 31];
}

__global__ void shuffle_outside(const int* in, int* out, bool fault) {
  out[threadIdx.x] = __shfl_xor_sync(fault ? kAll >> 1 : kAll, in[threadIdx.x ^ 96], 31);
}

// Half of the lanes read from the other half, which a narrower mask leaves out.
__global__ void shuffle_from_outside(const int* in, int* out, bool fault) {
  const unsigned half = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_xor_sync(fault ? half : kAll, in[threadIdx.x ^ 96], 31);
}

__global__ void shuffle_after_exit(const int* in, int* out, bool fault) {
  if (fault && threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x ^ 96], 31);
}

__global__ void past_the_end(const int* in, int* out, bool fault) {
  out[threadIdx.x] = in[127 - threadIdx.x];
  use(in[threadIdx.x + (fault ? 1 : 0)]);
}

__global__ void before_the_start(const int* in, int* out, bool fault) {
  const int* last = in + 127;
  out[threadIdx.x] = last[-static_cast<int>(threadIdx.x)];
  use(last[-static_cast<int>(threadIdx.x) - (fault ? 1 : 0)]);
}

#ifdef FASTVQ_CUDA_SHIM
__global__ void copy_in_flight(const int* in, int* out, bool fault) {
  int* values = fastvq::dynamic_shared<int>();
  if (threadIdx.x % 4 == 0) shim::async_copy(values + threadIdx.x, in + threadIdx.x, 16, 16);
  shim::async_commit();
  shim::async_wait(fault ? 1 : 0);
  __syncthreads();
  out[threadIdx.x] = values[127 - threadIdx.x];
  shim::async_wait(0);
}

__global__ void copy_left_behind(const int* in, int* out, bool fault) {
  int* values = fastvq::dynamic_shared<int>();
  shim::async_copy(values + threadIdx.x, in + 127 - threadIdx.x, 4, 4);
  if (!fault) shim::async_commit(), shim::async_wait(0);
  out[threadIdx.x] = in[127 - threadIdx.x];
}

__global__ void copy_misaligned(const int* in, int* out, bool fault) {
  int* values = fastvq::dynamic_shared<int>();
  if (threadIdx.x % 4 == 0 && threadIdx.x < 124) {
    shim::async_copy(values + threadIdx.x, in + threadIdx.x + (fault ? 1 : 0), 16, 16);
  }
  shim::async_commit();
  shim::async_wait(0);
  out[threadIdx.x] = in[127 - threadIdx.x];
}
#endif

__global__ void divergent_barrier(const int* in, int* out, bool fault) {
  if (!fault || threadIdx.x < 70) __syncthreads();
  out[threadIdx.x] = in[127 - threadIdx.x];
}

__global__ void two_barriers(const int* in, int* out, bool fault) {
  if (fault && threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[127 - threadIdx.x];
}

__global__ void uneven_loop(const int* in, int* out, bool fault) {
  for (unsigned i = 0; i < (fault ? threadIdx.x / 64 + 1 : 2); ++i) __syncthreads();
  out[threadIdx.x] = in[127 - threadIdx.x];
}

// One warp writes what another reads.
__global__ void race_between_warps(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  if (threadIdx.x < 32) {
    for (int i = 0; i < 4; ++i) values[i * 32 + threadIdx.x] = in[i * 32 + threadIdx.x];
    __syncwarp();
  }
  if (!fault) __syncthreads();
  out[threadIdx.x] = values[127 - threadIdx.x];
}

// Races that no order of execution shows, since every thread writes the same: two writers,
__global__ void same_value(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  if (fault || threadIdx.x == 0) values[0] = in[0];
  __syncthreads();
  out[threadIdx.x] = in[127 - threadIdx.x] + values[0] - in[0];
}

// a writer after readers, of other warps,
__global__ void written_again(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[127 - threadIdx.x];
  if (!fault) __syncthreads();
  values[threadIdx.x] = in[threadIdx.x];
}

// or of its own warp,
__global__ void written_again_in_a_warp(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  values[threadIdx.x] = in[threadIdx.x ^ 96];
  __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 31];
  if (!fault) __syncwarp();
  values[threadIdx.x] = in[threadIdx.x ^ 96];
}

// where a barrier of the warp is not enough,
__global__ void barrier_of_a_warp(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[127 - threadIdx.x];
  if (fault) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  values[threadIdx.x] = in[threadIdx.x];
}

// and where an exchange between lanes is taken for a barrier.
__global__ void exchange_for_barrier(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  values[threadIdx.x] = in[threadIdx.x ^ 96];
  const unsigned all = __ballot_sync(kAll, 1);
  if (!fault) __syncwarp();
  out[threadIdx.x] = all == kAll ? values[threadIdx.x ^ 31] : 0;
}

// Atomics of many threads on one number are no race; reading it before a barrier is.
__global__ void atomic_read_at_once(const int* in, int* out, bool fault) {
  __shared__ int together;
  if (threadIdx.x == 0) together = 0;
  __syncthreads();
  atomicOr(&together, 1 << threadIdx.x % 8);
  if (!fault) __syncthreads();
  out[threadIdx.x] = in[127 - threadIdx.x] + (together > 0 ? 0 : 1);
}

__global__ void not_cleared(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  if (!fault) values[threadIdx.x] = 0;
  values[threadIdx.x] += in[127 - threadIdx.x];
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void dynamic_past_its_size(const int* in, int* out, bool fault) {
  int* values = fastvq::dynamic_shared<int>();
  values[threadIdx.x] = in[127 - threadIdx.x];
  out[threadIdx.x] = values[threadIdx.x];
  use(values[threadIdx.x + (fault ? 1 : 0)]);
}

__global__ void static_past_its_size(const int* in, int* out, bool fault) {
  __shared__ int values[128];
  values[threadIdx.x] = in[127 - threadIdx.x];
  out[threadIdx.x] = values[threadIdx.x];
  use(values[threadIdx.x + (fault ? 1 : 0)]);
}

__global__ void misaligned_vector(const int* in, int* out, bool fault) {
  const int from = threadIdx.x < 31 ? 4 * threadIdx.x + (fault ? 1 : 0) : 0;
  const int4 four = *reinterpret_cast<const int4*>(in + from);
  out[threadIdx.x] = in[127 - threadIdx.x];
  use(four.x);
}

// The block that comes first sets what the others build upon.
__global__ void order_of_blocks(const int* in, int* out, bool fault) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  if (!fault || blockIdx.x == 0) {
    out[i] = in[127 - i];
  } else {
    out[i] = out[i - 32] + in[127 - i] - in[127 - i + 32];
  }
}

using Kernel = void (*)(const int*, int*, bool);
struct Case {
  const char* name;
  Kernel kernel;
  unsigned blocks = 1, threads = 128;
};
const Case kCases[] = {
    {"reverse", reverse},
    {"reverse_twice", reverse_twice},
    {"reverse_warp", reverse_warp},
    {"shuffle_outside", shuffle_outside},
    {"shuffle_from_outside", shuffle_from_outside},
    {"shuffle_after_exit", shuffle_after_exit},
    {"past_the_end", past_the_end},
    {"before_the_start", before_the_start},
#ifdef FASTVQ_CUDA_SHIM
    {"copy_in_flight", copy_in_flight},
    {"copy_left_behind", copy_left_behind},
    {"copy_misaligned", copy_misaligned},
#endif
    {"divergent_barrier", divergent_barrier},
    {"two_barriers", two_barriers},
    {"uneven_loop", uneven_loop},
    {"race_between_warps", race_between_warps},
    {"same_value", same_value},
    {"written_again", written_again},
    {"written_again_in_a_warp", written_again_in_a_warp},
    {"barrier_of_a_warp", barrier_of_a_warp},
    {"exchange_for_barrier", exchange_for_barrier},
    {"atomic_read_at_once", atomic_read_at_once},
    {"not_cleared", not_cleared},
    {"dynamic_past_its_size", dynamic_past_its_size},
    {"static_past_its_size", static_past_its_size},
    {"misaligned_vector", misaligned_vector},
    {"order_of_blocks", order_of_blocks, 4, 32},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  fastvq_shim_seed(std::strtoull(argv[3], nullptr, 10));
  for (const Case& c : kCases) {
    if (std::strcmp(c.name, argv[1])) continue;
    std::vector<int> in(128), out(128);
    for (int i = 0; i < 128; ++i) in[i] = 1000 + i * i;
    fastvq::launch(c.kernel, c.blocks, c.threads, 128 * sizeof(int), nullptr, in.data(), out.data(), argv[2][0] == '1');
    for (int i = 0; i < 128; ++i) {
      if (out[i] != in[127 - i]) {
        std::printf("wrong result at %d: %d\n", i, out[i]);
        return 1;
      }
    }
    return 0;
  }
  return 2;
}
