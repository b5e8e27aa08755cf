// SPDX-License-Identifier: MIT
// RMS norm and rotary embedding, as torch's own formulas give them.
#include <cmath>

#include "cpu.h"
#include "vectorized.h"

namespace quantgemm {
namespace {

template <class T>
float rounded(float x) {
  T stored;
  store_real(&stored, x);
  return load_real(&stored);
}

}  // namespace

void rms_norm_cpu(const RmsNormArgs& args, int64_t first_row, int64_t last_row) {
  visit_real(args.type, [&]<class T>(T) {
    const T* weight = static_cast<const T*>(args.weight);
    for (int64_t row = first_row; row < last_row; ++row) {
      const T* x = static_cast<const T*>(args.x) + row * args.cols;
      T* out = static_cast<T*>(args.out) + row * args.cols;
      double sum = 0;
      for (int64_t i = 0; i < args.cols; ++i) sum += static_cast<double>(load_real(x + i)) * load_real(x + i);
      const float mean = static_cast<float>(sum / static_cast<double>(args.cols));
      const float factor = 1.0f / std::sqrt(mean + args.eps);
      for (int64_t i = 0; i < args.cols; ++i)
        store_real(out + i, load_real(weight + i) * rounded<T>(load_real(x + i) * factor));
    }
  });
}

void rotary_cpu(const RotaryArgs& args, int64_t first_token, int64_t last_token) {
  visit_real(args.type, [&]<class T>(T) {
    const int64_t half = args.channels / 2;
    for (int64_t both = first_token; both < last_token; ++both) {
      const int64_t b = both / args.tokens, t = both % args.tokens;
      const int64_t angle = b * args.angle_stride + t * args.channels;
      const T *cos = static_cast<const T*>(args.cos) + angle, *sin = static_cast<const T*>(args.sin) + angle;
      for (const RotatedHeads& side : args.sides)
        for (int64_t h = 0; h < side.heads; ++h) {
          const T* x =
              static_cast<const T*>(side.x) + b * side.strides[0] + h * side.strides[1] + t * side.strides[2];
          T* out = static_cast<T*>(side.out) + ((b * side.heads + h) * args.tokens + t) * args.channels;
          for (int64_t i = 0; i < args.channels; ++i) {
            const float other = i < half ? -load_real(x + i + half) : load_real(x + i - half);
            store_real(out + i, rounded<T>(load_real(x + i) * load_real(cos + i)) +
                                    rounded<T>(other * load_real(sin + i)));
          }
        }
    }
  });
}

}  // namespace quantgemm
