#pragma once

#include <cstdint>

namespace fastvq {

// Adds one to each of `count` floats at a device address, on a stream; nullptr, or what CUDA says went wrong.
const char* add_one(std::uintptr_t values, long long count, std::uintptr_t stream);

// How many devices the driver shows; 0 and *error set where there is no driver.
int device_count(const char** error);

}  // namespace fastvq
