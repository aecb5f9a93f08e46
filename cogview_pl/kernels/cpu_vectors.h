// What the kernels of a CPU share: vectors of floats, e^x, GELU, softmax, LayerNorm of a row, and the part of the work
// that a thread does.

#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <omp.h>

constexpr int kWidth = 8;  // floats of a vector
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(kWidth * sizeof(float)), aligned(4)));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Vector all(float value) { return Vector{} + value; }
inline Vector largest(Vector a, Vector b) { return b > a ? b : a; }  // a where it is NaN
inline Vector smallest(Vector a, Vector b) { return b < a ? b : a; }

// a · b + c, rounded once where the processor can.
inline Vector fused(Vector a, Vector b, Vector c) {
#if defined(__AVX2__) && defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline float sum(Vector v) {
  float total = 0;
  for (int lane = 0; lane < kWidth; ++lane) total += v[lane];
  return total;
}

inline float maximum(Vector v) {
  float found = v[0];
  for (int lane = 1; lane < kWidth; ++lane) found = v[lane] > found ? v[lane] : found;
  return found;
}

// e^x to about 1e-7 relative: 2^n · e^r with |r| <= ln 2 / 2, e^r by its Taylor series. NaN stays NaN.
inline Vector exponential(Vector x) {
  const Vector bounded = smallest(largest(x, all(-87.0f)), all(88.0f));
  const Vector shift = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to whole numbers
  const Vector rounded = bounded * 1.44269504f + shift;
  const Vector n = rounded - shift;
  const Vector r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vector series = all(1.0f / 5040);
  for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = fused(series, r, all(coefficient));
  const Integers exponent = ((Integers)rounded - 0x4B400000 + 127) << 23;  // casts of vectors keep the bits
  return series * (Vector)exponent;
}

// The number of floats in whole vectors.
inline int64_t padded(int64_t count) { return (count + kWidth - 1) / kWidth * kWidth; }

// Numerators of a softmax, in place: e^(scale · (x - the largest x)) of the first `count` numbers, 0 in the rest of the
// last vector. Returns their sum.
inline float exponentials(float* x, int64_t count, float scale) {
  const int64_t end = padded(count);
  for (int64_t at = count; at < end; ++at) x[at] = -INFINITY;
  Vector most = load(x);
  for (int64_t at = kWidth; at < end; at += kWidth) most = largest(most, load(x + at));
  const Vector top = all(maximum(most));
  for (int64_t at = 0; at < end; at += kWidth) store(x + at, exponential((load(x + at) - top) * scale));
  for (int64_t at = count; at < end; ++at) x[at] = 0;  // `exponential` is never less than e^-87
  Vector total{};
  for (int64_t at = 0; at < end; at += kWidth) total += load(x + at);
  return sum(total);
}

// LayerNorm of x / max(max|x|, smallest), or of x itself if `smallest` is 0: (x - mean) · factor.
struct Normal {
  float mean, factor;

  Normal(const float* x, int64_t size, float smallest, float eps) {
    Vector most{}, totals{};
    int64_t at = 0;
    for (; at + kWidth <= size; at += kWidth) {
      const Vector some = load(x + at);
      most = largest(most, largest(some, -some));
      totals += some;
    }
    float top = maximum(most), total = sum(totals);
    for (; at < size; ++at) {
      top = std::fabs(x[at]) > top ? std::fabs(x[at]) : top;
      total += x[at];
    }
    const float inverse = smallest > 0 ? 1 / (top > smallest ? top : smallest) : 1.0f;
    mean = total / size;
    Vector squares{};
    for (at = 0; at + kWidth <= size; at += kWidth) {
      const Vector centred = (load(x + at) - mean) * inverse;
      squares += centred * centred;
    }
    float variance = sum(squares);
    for (; at < size; ++at) variance += (x[at] - mean) * inverse * ((x[at] - mean) * inverse);
    factor = inverse / std::sqrt(variance / size + eps);
  }
};

// A part of `count` items for each thread, in order.
struct Part {
  int64_t begin, end;
  explicit Part(int64_t count) {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    begin = count * thread / threads;
    end = count * (thread + 1) / threads;
  }
};

// GELU in its tanh form: x / (1 + e^-p(x)) with p(x) = sqrt(8 / pi) · (x + 0.044715 x³).
constexpr float kGeluLinear = 1.5957691216f, kGeluCubic = 1.5957691216f * 0.044715f;

inline Vector gelu(Vector x) {
  return x / (exponential(-x * (kGeluLinear + kGeluCubic * x * x)) + 1.0f);
}
