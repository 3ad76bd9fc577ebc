// One step of Adam (Kingma & Ba 2015, algorithm 1) on flat vectors of n numbers, or none; see blpo_rllib/core/adam.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "functions.h"

namespace {

// Numbers that one thread takes at a time; sums are formed block by block, whatever the number of threads.
constexpr int64_t kBlock = 16384;

template <class T>
double norm_of(const T* x, int64_t n, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> sums(blocks);
#pragma omp parallel for num_threads(threads) if (blocks > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    constexpr int kParts = 16;
    T parts[kParts] = {};
    const int64_t begin = block * kBlock, end = std::min(n, begin + kBlock);
    int64_t i = begin;
    for (; i + kParts <= end; i += kParts)
      for (int k = 0; k < kParts; ++k) parts[k] += x[i + k] * x[i + k];
    for (; i < end; ++i) parts[0] += x[i] * x[i];
    for (int k = 0; k < kParts; ++k) sums[block] += parts[k];
  }
  double total = 0;
  for (double sum : sums) total += sum;
  return std::sqrt(total);
}

// Writes to `skipped` 1 and changes nothing if the gradient's norm is not finite, else 0. Scales the gradient down to
// max_norm if that is not negative.
template <class T>
void adam(T* parameters, const T* gradient, T* first, T* second, int64_t n, float* step, const double& lr, double beta1,
          double beta2, double epsilon, double max_norm, T* skipped, int threads) {
  const double norm = norm_of(gradient, n, threads);
  *skipped = std::isfinite(norm) ? 0.0f : 1.0f;
  if (!std::isfinite(norm)) return;
  *step += 1;
  const T scale = max_norm >= 0 && norm > max_norm ? max_norm / norm : 1;
  const T rate = lr / (1 - std::pow(beta1, *step)), correction = 1 / std::sqrt(1 - std::pow(beta2, *step));
  const T keep1 = beta1, take1 = 1 - beta1, keep2 = beta2, take2 = 1 - beta2, eps = epsilon;
#pragma omp parallel for simd num_threads(threads) if (parallel : n > kBlock) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const T g = scale * gradient[i];
    first[i] = keep1 * first[i] + take1 * g;
    second[i] = keep2 * second[i] + take2 * g * g;
    parameters[i] -= rate * first[i] / (std::sqrt(second[i]) * correction + eps);
  }
}

BLPO_FUNCTION(adam)

}  // namespace
