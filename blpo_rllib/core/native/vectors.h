// Vectors of numbers, as wide as the processor's registers, and functions of them.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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
// Adds lanes D apart, then those half as far apart, and so on: the first lane is their sum.
template <class T, int D, int... L>
inline T folded(Vector<T> v, std::integer_sequence<int, L...> lanes) {
  v += __builtin_shufflevector(v, v, (L ^ D)...);
  if constexpr (D > 1) return folded<T, D / 2>(v, lanes);
  else return v[0];
}
template <class T>
inline T lane_sum(Vector<T> v) {
  return folded<T, kLanes<T> / 2>(v, std::make_integer_sequence<int, kLanes<T>>());
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

// min(a, b) and max(a, b), and b where that is NaN.
inline Vector<float> least(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_min_ps((__m512)a, (__m512)b);  // what GCC 12 does not make of the line below
#else
  return a < b ? a : b;
#endif
}
inline Vector<float> largest(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
// The rational function that Eigen and XLA take for tanh (Eigen/src/Core/MathFunctionsImpl.h): to within 4e-7, both
// absolutely and of the result.
inline Vector<float> tanh_of(Vector<float> z) {
  // Where the function is exactly 1, and nowhere above it before, so that saturated units have no slope.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  constexpr float most = 7.99881172180175781f;
#else
  constexpr float most = 7.90531110763549805f;
#endif
  const Vector<float> y = largest(Vector<float>{} - most, least(Vector<float>{} + most, z));
  const Vector<float> s = y * y;
  Vector<float> p = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * s - 8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  Vector<float> q = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return (y * p) / q;
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
