// Vectors of 64 bytes, and exp and tanh on them.  Needs GCC's vector extensions (GCC or Clang); the
// compiler splits a vector where registers are narrower.
//
// Everything lives in an unnamed namespace: the file is compiled once for each instruction set, and
// the linker must never merge those copies.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

template <typename T>
struct Traits;

template <>
struct Traits<float> {
  typedef float Vector __attribute__((vector_size(64)));
  typedef int32_t Integers __attribute__((vector_size(64)));
  using Integer = int32_t;
  static constexpr int lanes = 16;
  static constexpr float log2e = 1.44269504088896341f;
  // ln 2 in two parts: the product of the first with any exponent is exact.
  static constexpr float ln2_high = 0.693359375f;
  static constexpr float ln2_low = -2.12194440054690583e-4f;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23
  static constexpr float least_exponent = -87.0f;    // below it exp counts as 0
  static constexpr int exponent_bias = 127;
  static constexpr int mantissa_bits = 23;
  static constexpr int degree = 7;  // Taylor remainder at ln(2)/2: 5e-9
};

template <>
struct Traits<double> {
  typedef double Vector __attribute__((vector_size(64)));
  typedef int64_t Integers __attribute__((vector_size(64)));
  using Integer = int64_t;
  static constexpr int lanes = 8;
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_high = 0.693145751953125;
  static constexpr double ln2_low = 1.42860682030941723212e-6;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double least_exponent = -708.0;
  static constexpr int exponent_bias = 1023;
  static constexpr int mantissa_bits = 52;
  static constexpr int degree = 13;  // Taylor remainder at ln(2)/2: 4e-18
};

template <typename T>
using Vector = typename Traits<T>::Vector;

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Loads count < lanes values; the remaining lanes hold `fill`.
template <typename T>
inline Vector<T> load_some(const T* from, int64_t count, T fill) {
  T buffer[Traits<T>::lanes];
  for (int lane = 0; lane < Traits<T>::lanes; ++lane) buffer[lane] = lane < count ? from[lane] : fill;
  return load<T>(buffer);
}

template <typename T>
inline void store(T* to, Vector<T> vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

template <typename T>
inline void store_some(T* to, Vector<T> vector, int64_t count) {
  std::memcpy(to, &vector, static_cast<size_t>(count) * sizeof(T));
}

template <typename T>
inline Vector<T> splat(T value) {
  return value - Vector<T>{};
}

// Sums lanes as a balanced tree, so that the order is the same on every instruction set.
template <typename T>
inline T sum_lanes(Vector<T> vector) {
  T lanes[Traits<T>::lanes];
  store<T>(lanes, vector);
  for (int width = Traits<T>::lanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// exp(x) = scale + scale * rest, where scale is a power of two and rest = exp(r) - 1, |r| <= ln(2)/2.
template <typename T>
struct Exponential {
  Vector<T> scale;
  Vector<T> rest;
};

template <typename T>
inline Exponential<T> split_exp(Vector<T> x) {
  using Tr = Traits<T>;
  using Integers = typename Tr::Integers;
  const Vector<T> shifted = x * Tr::log2e + Tr::round_magic;
  const Vector<T> n = shifted - Tr::round_magic;
  Vector<T> r = x - n * Tr::ln2_high;
  r = r - n * Tr::ln2_low;
  T factorial = 1;
  T coefficients[Tr::degree + 1];
  for (int k = 1; k <= Tr::degree; ++k) {
    factorial *= static_cast<T>(k);
    coefficients[k] = T(1) / factorial;
  }
  Vector<T> polynomial = splat<T>(coefficients[Tr::degree]);
  for (int k = Tr::degree - 1; k >= 1; --k) polynomial = polynomial * r + coefficients[k];
  Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  T magic = Tr::round_magic;
  typename Tr::Integer magic_bits;
  std::memcpy(&magic_bits, &magic, sizeof(magic_bits));
  bits = (bits - magic_bits + Tr::exponent_bias) << Tr::mantissa_bits;
  Exponential<T> result;
  std::memcpy(&result.scale, &bits, sizeof(bits));
  result.rest = polynomial * r;
  return result;
}

// exp of x up to the largest exponent; NaN stays NaN, and results below the normal range are 0.
template <typename T>
inline Vector<T> exp_of(Vector<T> x) {
  const Exponential<T> parts = split_exp<T>(x);
  const Vector<T> value = parts.scale + parts.scale * parts.rest;
  return x < Traits<T>::least_exponent ? Vector<T>{} : value;
}

template <typename T>
inline Vector<T> tanh_of(Vector<T> x) {
  // With t = exp(-2|x|) - 1, computed without cancellation: tanh|x| = -t / (t + 2).
  const Vector<T> minus_twice = x < 0 ? x + x : -(x + x);
  const Exponential<T> parts = split_exp<T>(minus_twice);
  const Vector<T> near = (parts.scale - T(1)) + parts.scale * parts.rest;
  const Vector<T> t = minus_twice < Traits<T>::least_exponent ? splat<T>(-1) : near;
  const Vector<T> magnitude = -t / (t + T(2));
  return x < 0 ? -magnitude : magnitude;
}

}  // namespace
