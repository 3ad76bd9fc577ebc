// Running normalisation of observations; see Normalizer in blpo_rllib/sampling/acting.py.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "functions.h"

namespace {

// Each of the n rows of x [n, d] in turn: Welford's step for mean and sum of squared deviations, the row counted
// `weight` times on top of *count, then the row normalised by them. As in RLlib's filter the variance is float32;
// `clip` 0 is none.
template <class T>
void normalise(const T* x, int64_t n, int64_t d, double* mean, double* squares, double* count, double weight,
               int64_t demean, int64_t destd, double clip, double epsilon, T* out, int) {
  for (int64_t i = 0; i < n; ++i) {
    *count += weight;
    const double share = weight / *count, degrees = std::max(*count - 1, 1.0);
    for (int64_t j = 0; j < d; ++j) {
      const double number = x[i * d + j], centred = number - mean[j];
      mean[j] += share * centred;
      squares[j] += weight * centred * (number - mean[j]);
      const float variance = static_cast<float>(squares[j] / degrees);
      double value = demean ? number - mean[j] : number;
      if (destd) value /= std::sqrt(std::max(0.0f, variance)) + static_cast<float>(epsilon);
      if (clip > 0) value = std::clamp(value, -clip, clip);
      out[i * d + j] = static_cast<T>(value);
    }
  }
}

BLPO_FUNCTION(normalise)

}  // namespace
