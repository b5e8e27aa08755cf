// SPDX-License-Identifier: MIT
// A value's rotary embedding, rounded as torch rounds it: products and sum one by one.
#pragma once
#include "memory.cuh"
#include "rms_norm.cuh"

namespace quantgemm {

// other: the value that is half of the channels away, negative for the first half.
template <class T>
__device__ __forceinline__ float turned(float own, float other, float cos, float sin) {
  return __fadd_rn(rms::rounded<T>(__fmul_rn(own, cos)), rms::rounded<T>(__fmul_rn(other, sin)));
}

template <class T>
__device__ __forceinline__ const T* token_of(const RotatedHeads& heads, int64_t sequence, int head,
                                             int token) {
  return static_cast<const T*>(heads.x) + sequence * heads.strides[0] + head * heads.strides[1] +
         token * heads.strides[2];
}

// Vector i of eight values of a token's head.
template <class Real16, int Channels>
__device__ __forceinline__ uint4 turned_vector(const RotaryArgs& args, const RotatedHeads& heads,
                                               int64_t sequence, int head, int token, int i) {
  constexpr int kHalf = Channels / 16;
  const Real16* x = token_of<Real16>(heads, sequence, head, token);
  const int64_t angle = sequence * args.angle_stride + token * Channels + 8 * i;
  float own[8], other[8], cos[8], sin[8];
  load8(own, x + 8 * i), load8(other, x + 8 * (i ^ kHalf));
  load8(cos, static_cast<const Real16*>(args.cos) + angle);
  load8(sin, static_cast<const Real16*>(args.sin) + angle);
#pragma unroll
  for (int j = 0; j < 8; ++j)
    own[j] = turned<Real16>(own[j], i < kHalf ? -other[j] : other[j], cos[j], sin[j]);
  return make_uint4(pack_pair(own[0], own[1], Real16{}), pack_pair(own[2], own[3], Real16{}),
                    pack_pair(own[4], own[5], Real16{}), pack_pair(own[6], own[7], Real16{}));
}

}  // namespace quantgemm
