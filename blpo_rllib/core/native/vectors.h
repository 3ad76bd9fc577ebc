// Vectors of numbers, as wide as the processor's registers, and functions of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int Bytes>
struct VectorOf;
template <int Bytes>
struct VectorOf<float, Bytes> {
  typedef float type __attribute__((vector_size(Bytes), aligned(4), may_alias));
};
template <int Bytes>
struct VectorOf<double, Bytes> {
  typedef double type __attribute__((vector_size(Bytes), aligned(8), may_alias));
};
template <class T>
using Vector = typename VectorOf<T, kVectorBytes>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}
template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<Vector<T>*>(p) = v;
}
template <class T>
inline T lane_sum(Vector<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

// exp y for |y| <= 87, by Cody and Waite's reduction and a polynomial; to within rounding of the result.
inline Vector<float> bounded_exp(Vector<float> y) {
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  const Vector<float> magic = Vector<float>{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> shifted = y * 1.44269504088896341f + magic;
  const Vector<float> count = shifted - magic;
  const Vector<float> r = (y - count * 0.693359375f) + count * 2.12194440e-4f;
  Vector<float> e = Vector<float>{} + 1.9875691500e-4f;
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.0f;
  const Integers exponent = ((Integers)shifted - 0x4B400000 + 127) << 23;  // the same bits, read as integers
  return e * (Vector<float>)exponent;
}
// Beyond what float32 holds to full precision: 0 below, infinity above. NaN stays.
inline Vector<float> exp_of(Vector<float> z) {
  Vector<float> y = z > 88.7f ? Vector<float>{} + 88.7f : z;
  y = y < -87.0f ? Vector<float>{} - 87.0f : y;
  // Two factors, so that neither overflows near the largest number.
  const Vector<float> half = bounded_exp(0.5f * y);
  Vector<float> e = bounded_exp(y - 0.5f * y) * half;
  e = z > 88.72283f ? Vector<float>{} + std::numeric_limits<float>::infinity() : e;
  return z < -87.33f ? Vector<float>{} : e;
}
inline Vector<double> exp_of(Vector<double> z) {
  for (int i = 0; i < kLanes<double>; ++i) z[i] = std::exp(z[i]);
  return z;
}

// tanh z = 1 - 2 / (exp(2 z) + 1), to within rounding of 1.
inline Vector<float> tanh_of(Vector<float> z) {
  Vector<float> y = 2 * z;
  y = y > 20.0f ? Vector<float>{} + 20.0f : y;
  y = y < -20.0f ? Vector<float>{} - 20.0f : y;
  return 1.0f - 2.0f / (bounded_exp(y) + 1.0f);
}
inline Vector<double> tanh_of(Vector<double> z) {
  for (int i = 0; i < kLanes<double>; ++i) z[i] = std::tanh(z[i]);
  return z;
}

template <class V>
inline V each(V z, double (*function)(double)) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(z[0]); ++i) z[i] = function(z[i]);
  return z;
}

}  // namespace
