// SPDX-License-Identifier: MIT
// Launchers of the int8 product of packed weights (int8_product.h).
#pragma once
#include "../int8_product.h"
#include "device.h"
#include "launch.h"

namespace quantgemm {

// y = x · wᵀ + bias + residual, or silu(x · wᵀ) · (x · upᵀ) by way of args.gate. scratch:
// Int8Layout::bytes(), from a multiple of 256 on. sm_90 and a build with 9.0a only.
cudaError_t launch_int8_packed(const GemmPackedArgs& args, uint8_t* scratch, cudaStream_t stream);

namespace packed_int8 {

// Tiles of kInt8Tokens × kInt8Rows. A cluster's blocks, `mates`, have the same rows and tokens that follow
// each other; clusters take tiles in turn.
struct Schedule {
  int mates, token_sets, row_tiles, tiles, clusters, groups;
  int64_t scale_tokens, scale_rows;  // from one group's scales to the next
};

cudaError_t launch_round_tokens(const GemmPackedArgs&, uint8_t* scratch, const Device&, cudaStream_t);
// `again`: the launch before it uses the memory that this one fills.
cudaError_t launch_round_weights(const GemmPackedArgs&, uint8_t* scratch, bool again, const Device&,
                                 cudaStream_t);

}  // namespace packed_int8
}  // namespace quantgemm
