// Operations on small arrays of any strides: what an update does between the kernels, without a tensor library's
// bookkeeping, which costs more than they do. blpo_rllib/core/replay.py says which operation each one is.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "functions.h"
#include "vectors.h"

namespace {

// Numbers from which on an operation is shared out between threads.
constexpr int64_t kParallelFrom = 65536;

// Reads up to a whole vector of numbers that stand `stride` apart.
template <class T>
inline Vector<T> read(const T* p, int64_t stride, int64_t count) {
  if (stride == 1 && count >= kLanes<T>) return load<T>(p);
  if (stride == 0) return Vector<T>{} + *p;
  Vector<T> v{};
  for (int64_t i = 0; i < std::min<int64_t>(count, kLanes<T>); ++i) v[i] = p[i * stride];
  return v;
}
template <class T>
inline void write(T* p, int64_t stride, int64_t count, Vector<T> v) {
  if (stride == 1 && count >= kLanes<T>) return store<T>(p, v);
  for (int64_t i = 0; i < std::min<int64_t>(count, kLanes<T>); ++i) p[i * stride] = v[i];
}

// What a pointwise operation runs over: three axes, the last one innermost, with strides of the output and three inputs.
struct Layout {
  int64_t sizes[3], strides[4][3];
  int64_t at(int operand, int64_t i, int64_t j) const { return i * strides[operand][0] + j * strides[operand][1]; }
};

// out = f(a, b, c, s, t) for each element; inputs that the operation does not have are null.
template <class T, class F>
inline void for_each(T* out, const T* a, const T* b, const T* c, const Layout& layout, T s, T t, int threads, F f) {
  const int64_t outer = layout.sizes[0] * layout.sizes[1], n = layout.sizes[2];
  const auto run_row = [&](int64_t row) {
    const int64_t i = row / layout.sizes[1], j = row % layout.sizes[1];
    T* to = out + layout.at(0, i, j);
    const T* from[3] = {a, b, c};
    int64_t step[3] = {};
    for (int k = 0; k < 3; ++k)
      if (from[k]) from[k] += layout.at(k + 1, i, j), step[k] = layout.strides[k + 1][2];
    const int64_t write_step = layout.strides[0][2];
    for (int64_t e = 0; e < n; e += kLanes<T>) {
      Vector<T> x[3] = {};
      for (int k = 0; k < 3; ++k)
        if (from[k]) x[k] = read<T>(from[k] + e * step[k], step[k], n - e);
      write<T>(to + e * write_step, write_step, n - e, f(x[0], x[1], x[2], Vector<T>{} + s, Vector<T>{} + t));
    }
  };
  // Entering a parallel region costs more than a small operation, even with a single thread.
  if (threads == 1 || outer * n < kParallelFrom) {
    for (int64_t row = 0; row < outer; ++row) run_row(row);
    return;
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < outer; ++row) run_row(row);
}

#define POINTWISE(name, expression)                                                                                    \
  template <class T>                                                                                                   \
  void name(T* out, const T* a, const T* b, const T* c, const Layout& layout, double s, double t, int threads) {       \
    using V = Vector<T>;                                                                                               \
    constexpr T infinity = std::numeric_limits<T>::infinity();                                                         \
    (void)infinity;                                                                                                    \
    for_each<T>(out, a, b, c, layout, static_cast<T>(s), static_cast<T>(t), threads,                                   \
                [](V a, V b, V c, V s, V t) -> V {                                                                     \
                  (void)a, (void)b, (void)c, (void)s, (void)t;                                                         \
                  const V zero{}, one = V{} + 1;                                                                       \
                  (void)zero, (void)one;                                                                               \
                  return expression;                                                                                   \
                });                                                                                                    \
  }                                                                                                                    \
  BLPO_FUNCTION(name)

POINTWISE(fill, s)
POINTWISE(copy, a)
POINTWISE(add, a + s * b)
POINTWISE(add_number, a + s)
POINTWISE(subtract_from_number, s - a)
POINTWISE(multiply, a* b)
POINTWISE(multiply_number, a* s)
POINTWISE(divide, a / b)
POINTWISE(divide_number, a / s)
POINTWISE(reciprocal, 1 / a)
POINTWISE(negate, -a)
POINTWISE(exponential, exp_of(a))
POINTWISE(logarithm, each(a, std::log))
POINTWISE(square, a* a)
POINTWISE(square_root, each(a, std::sqrt))
POINTWISE(absolute, a < 0 ? -a : a)
POINTWISE(clamp, a < s ? s : (a > t ? t : a))
POINTWISE(greater_than_number, a > s ? one : zero)
POINTWISE(less_than_number, a < s ? one : zero)
POINTWISE(at_most_number, a <= s ? one : zero)
POINTWISE(at_least_number, a >= s ? one : zero)
POINTWISE(equals_number, a == s ? one : zero)
POINTWISE(differs_from_number, a != s ? one : zero)
POINTWISE(greater_than, a > b ? one : zero)
POINTWISE(less_than, a < b ? one : zero)
POINTWISE(at_most, a <= b ? one : zero)
POINTWISE(equals, a == b ? one : zero)
POINTWISE(negation, 1 - a)
POINTWISE(where, a != 0 ? b : c)
POINTWISE(fill_where, b != 0 ? s : a)
POINTWISE(add_product, a + s * b * c)
POINTWISE(zero_if_not_finite, (a - a) == 0 ? a : zero)

// A sum over two axes for each place of two others.
struct Sums {
  int64_t kept[2], out[2], kept_strides[2], summed[2], strides[2];
};

template <class T>
T sum_of_row(const T* x, int64_t stride, int64_t n) {
  Vector<T> total{};
  for (int64_t i = 0; i < n; i += kLanes<T>) total += read<T>(x + i * stride, stride, n - i);
  if (stride == 0 && n % kLanes<T>) return *x * static_cast<T>(n);
  return lane_sum<T>(total);
}

template <class T>
void sum(T* out, const T* x, const Sums& s, int) {
  for (int64_t i = 0; i < s.kept[0]; ++i) {
    const T* row = x + i * s.kept_strides[0];
    T* to = out + i * s.out[0];
    if (s.kept_strides[1] == 1 && s.kept[1] > 1) {  // a vector of places at a time
      for (int64_t j = 0; j < s.kept[1]; j += kLanes<T>) {
        Vector<T> total{};
        for (int64_t k = 0; k < s.summed[0]; ++k)
          for (int64_t l = 0; l < s.summed[1]; ++l)
            total += read<T>(row + j + k * s.strides[0] + l * s.strides[1], 1, s.kept[1] - j);
        write<T>(to + j * s.out[1], s.out[1], s.kept[1] - j, total);
      }
      continue;
    }
    for (int64_t j = 0; j < s.kept[1]; ++j) {
      T total = 0;
      for (int64_t k = 0; k < s.summed[0]; ++k)
        total += sum_of_row<T>(row + j * s.kept_strides[1] + k * s.strides[0], s.strides[1], s.summed[1]);
      to[j * s.out[1]] = total;
    }
  }
}
BLPO_FUNCTION(sum)

// sum_i a_i b_i; blocks keep the rounding errors of long vectors small.
template <class T>
T dot_of(const T* a, const T* b, int64_t n) {
  constexpr int64_t kBlock = 4096;
  constexpr int kParts = 4;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    Vector<T> parts[kParts] = {};
    int64_t i = begin;
    for (; i + kParts * kLanes<T> <= end; i += kParts * kLanes<T>)
      for (int k = 0; k < kParts; ++k) parts[k] += load<T>(a + i + k * kLanes<T>) * load<T>(b + i + k * kLanes<T>);
    for (; i < end; i += kLanes<T>) parts[0] += read<T>(a + i, 1, end - i) * read<T>(b + i, 1, end - i);
    total += lane_sum<T>((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
  return static_cast<T>(total);
}
template <class T>
void dot(T* out, const T* a, const T* b, int64_t n, int) {
  *out = dot_of<T>(a, b, n);
}
BLPO_FUNCTION(dot)
template <class T>
void norm(T* out, const T* a, int64_t n, int) {
  *out = std::sqrt(dot_of<T>(a, a, n));
}
BLPO_FUNCTION(norm)

// R x C entries of a b^T for rows that stand contiguously.
template <class T, int R, int C>
inline void block_of_rows(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t n, T* out, int64_t out_row,
                          T alpha) {
  Vector<T> acc[R][C] = {};
  for (int64_t k = 0; k < n; k += kLanes<T>) {
    Vector<T> x[R], y[C];
    for (int r = 0; r < R; ++r) x[r] = read<T>(a + r * a_row + k, 1, n - k);
    for (int c = 0; c < C; ++c) y[c] = read<T>(b + c * b_row + k, 1, n - k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += x[r] * y[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r * out_row + c] += alpha * lane_sum<T>(acc[r][c]);
}

// out [m, n] += alpha a b^T for a [m, depth] and b [n, depth].
template <class T>
void add_product_of_rows(T* out, int64_t out_row, const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t m,
                         int64_t n, int64_t depth, double alpha, int threads) {
  const T scale = alpha;
#pragma omp parallel for num_threads(threads) if (m * n * depth >= 16 * kParallelFrom)
  for (int64_t i = 0; i < m; i += 4)
    for (int64_t j = 0; j < n; j += 4) {
      const T *x = a + i * a_row, *y = b + j * b_row;
      T* to = out + i * out_row + j;
      if (i + 4 <= m && j + 4 <= n) {
        block_of_rows<T, 4, 4>(x, a_row, y, b_row, depth, to, out_row, scale);
        continue;
      }
      for (int64_t c = 0; c < std::min<int64_t>(4, n - j); ++c)
        for (int64_t r = 0; r < std::min<int64_t>(4, m - i); ++r)
          block_of_rows<T, 1, 1>(x + r * a_row, 0, y + c * b_row, 0, depth, to + r * out_row + c, 0, scale);
    }
}
BLPO_FUNCTION(add_product_of_rows)

// out [n] += alpha sum_k x_k a[k, :] for the m rows of a.
template <class T>
void add_rows(T* out, const T* a, int64_t a_row, const T* x, int64_t x_stride, int64_t m, int64_t n, double alpha,
              int threads) {
  constexpr int64_t kBlock = 1024;
#pragma omp parallel for num_threads(threads) if (m * n >= kParallelFrom)
  for (int64_t begin = 0; begin < n; begin += kBlock)
    for (int64_t k = 0; k < m; ++k) {
      const Vector<T> weight = Vector<T>{} + static_cast<T>(alpha) * x[k * x_stride];
      const int64_t end = std::min(n, begin + kBlock);
      for (int64_t i = begin; i < end; i += kLanes<T>)
        write<T>(out + i, 1, end - i, read<T>(out + i, 1, end - i) + weight * read<T>(a + k * a_row + i, 1, end - i));
    }
}
BLPO_FUNCTION(add_rows)

// Solves a x = b [n] by Gaussian elimination with partial pivoting; a singular a gives what is not finite.
template <class T>
void solve(T* x, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_stride, int64_t n, int) {
  std::vector<T> work(n * (n + 1));
  std::vector<T*> rows(n);
  for (int64_t i = 0; i < n; ++i) {
    rows[i] = work.data() + i * (n + 1);
    for (int64_t j = 0; j < n; ++j) rows[i][j] = a[i * a_row + j * a_column];
    rows[i][n] = b[i * b_stride];
  }
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (!(std::abs(rows[i][k]) <= std::abs(rows[pivot][k]))) pivot = i;
    std::swap(rows[k], rows[pivot]);
    for (int64_t i = k + 1; i < n; ++i) {
      const T factor = rows[i][k] / rows[k][k];
      for (int64_t j = k + 1; j <= n; ++j) rows[i][j] -= factor * rows[k][j];
    }
  }
  for (int64_t k = n - 1; k >= 0; --k) {
    T value = rows[k][n];
    for (int64_t j = k + 1; j < n; ++j) value -= rows[k][j] * x[j];
    x[k] = value / rows[k][k];
  }
}
BLPO_FUNCTION(solve)

// log-softmax over d numbers `along` apart, for each of n places `across` apart.
template <class T>
void log_softmax(T* out, const T* x, int64_t d, int64_t along, int64_t n, int64_t across, int64_t out_along,
                 int64_t out_across, int) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const auto column = [&](int64_t k) { return read<T>(x + k * along + i * across, across, n - i); };
    Vector<T> largest = column(0), total{};
    for (int64_t k = 1; k < d; ++k) {
      const Vector<T> v = column(k);
      largest = v > largest ? v : largest;
    }
    for (int64_t k = 0; k < d; ++k) total += exp_of(column(k) - largest);
    const Vector<T> shift = largest + each(total, std::log);
    for (int64_t k = 0; k < d; ++k)
      write<T>(out + k * out_along + i * out_across, out_across, n - i, column(k) - shift);
  }
}
BLPO_FUNCTION(log_softmax)

// Where the largest of d numbers `along` apart stands, for each of n places `across` apart; NaN counts as larger.
template <class T>
void argmax(int64_t* out, int64_t out_stride, const T* x, int64_t d, int64_t along, int64_t n, int64_t across, int) {
  for (int64_t i = 0; i < n; ++i) {
    const T* numbers = x + i * across;
    int64_t best = 0;
    for (int64_t k = 1; k < d; ++k) {
      const T own = numbers[k * along], largest = numbers[best * along];
      if (own > largest || (own != own && largest == largest)) best = k;
    }
    out[i * out_stride] = best;
  }
}
BLPO_FUNCTION(argmax)

// Places that an index picks along one axis, which is `along` apart in x; layout.strides are those of the array that
// goes along with the index, of the index, and of x without that axis.
template <class T>
void pick(T* out, const int64_t* index, const T* x, int64_t along, const Layout& layout, int) {
  for (int64_t i = 0; i < layout.sizes[0]; ++i)
    for (int64_t j = 0; j < layout.sizes[1]; ++j)
      for (int64_t k = 0; k < layout.sizes[2]; ++k) {
        const int64_t chosen = index[layout.at(1, i, j) + k * layout.strides[1][2]];
        out[layout.at(0, i, j) + k * layout.strides[0][2]] =
            x[layout.at(2, i, j) + k * layout.strides[2][2] + chosen * along];
      }
}
BLPO_FUNCTION(pick)
template <class T>
void put(T* out, const int64_t* index, double value, int64_t along, const Layout& layout, int) {
  for (int64_t i = 0; i < layout.sizes[0]; ++i)
    for (int64_t j = 0; j < layout.sizes[1]; ++j)
      for (int64_t k = 0; k < layout.sizes[2]; ++k) {
        const int64_t chosen = index[layout.at(1, i, j) + k * layout.strides[1][2]];
        out[layout.at(2, i, j) + k * layout.strides[2][2] + chosen * along] = value;
      }
}
BLPO_FUNCTION(put)

// Rows of `bytes` each, from the array whose address stands at `source`, which may change between two runs.
template <class T>
void take_rows(char* out, const char* const* source, const int64_t* index, int64_t count, int64_t bytes, int) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * bytes, *source + index[i] * bytes, bytes);
}
BLPO_FUNCTION(take_rows)

}  // namespace
