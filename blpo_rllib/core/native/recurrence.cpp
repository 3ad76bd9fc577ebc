// Generalised advantage estimation and its transpose as recurrences over time; see blpo_rllib/core/gae.py.
// Arrays are [rows, width], one segment a row: step and next = gamma (1 - d) as masks of D, decay = gamma lambda c.

#include <cstdint>

#include "functions.h"

namespace {

// Rows are shared out between threads where there is enough work to pay for it.
constexpr int64_t kParallelFrom = 65536;

// A (rewards + D V), from the last step to the first; without rewards A D V.
template <class T>
void advantages(const T* rewards, const T* values, const T* step, const T* next, const T* decay, int64_t rows,
                int64_t width, T* out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width >= kParallelFrom)
  for (int64_t row = 0; row < rows; ++row) {
    T running = 0, following = 0;
    for (int64_t t = (row + 1) * width - 1; t >= row * width; --t) {
      const T own = rewards ? rewards[t] - values[t] : -values[t];
      running = step[t] * own + next[t] * following + decay[t] * running;
      following = values[t];
      out[t] = running;
    }
  }
}

// D^T A^T y, from the first step to the last.
template <class T>
void adjoint(const T* y, const T* step, const T* next, const T* decay, int64_t rows, int64_t width, T* out,
             int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width >= kParallelFrom)
  for (int64_t row = 0; row < rows; ++row) {
    T carried = 0, passed = 0;
    for (int64_t t = row * width; t < (row + 1) * width; ++t) {
      const T z = y[t] + carried;
      out[t] = passed - step[t] * z;
      passed = next[t] * z;
      carried = decay[t] * z;
    }
  }
}

BLPO_FUNCTION(advantages)
BLPO_FUNCTION(adjoint)

}  // namespace
