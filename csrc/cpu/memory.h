// Memory for large outputs.
#pragma once

#include <cstdint>

#include "../tensors.h"

namespace atlas {

// Call before the outputs of one operator call are allocated, with their size in all: that much
// freed memory, and no more, is kept for the next call.
void expect_outputs(int64_t bytes);

// An uninitialised contiguous tensor like `like`. A large one lies in huge pages, and in the memory
// of an earlier output of its size if one has been freed: having the system map and clear fresh
// pages took 5 to 8 times as long as composing one task vector into them (Linux 6.18 guest, 2
// cores).
Tensor empty_output(TensorRef like);

}  // namespace atlas
