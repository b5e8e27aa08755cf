// SPDX-License-Identifier: MIT
// Types that files give to q (and k) and to v of one layer: products of both are one launch.
#pragma once
#include "gguf_formats.h"

namespace quantgemm {

template <class A, class B>
struct FormatPair {
  using First = A;
  using Second = B;
};

using MixedPairs = FormatList<FormatPair<Q4_K, Q6_K>, FormatPair<Q5_K, Q6_K>, FormatPair<Q4_K, Q5_K>>;

}  // namespace quantgemm
