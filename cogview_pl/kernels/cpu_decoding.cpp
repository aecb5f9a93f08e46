// A decoding step of a transformer on a CPU: one new position of each row, with all layers in one call.
// Python calls it through ctypes (kernels/cpu_decoding.py). A step takes the time of reading the weights, so outputs of
// linear maps are divided among the threads of OpenMP, and everything small is done by every thread for itself.
// Each sum has one order, whatever the numbers of rows and threads, so a row does not depend on them.
//
// Shapes: R rows, D hidden size, H heads, K head size, C capacity of the cache.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu_vectors.h"

typedef uint16_t Halves __attribute__((vector_size(kWidth * sizeof(uint16_t)), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(kWidth), aligned(1)));
typedef uint32_t Words __attribute__((vector_size(kWidth * sizeof(uint32_t))));

struct BFloat16 {
  uint16_t bits;
};

inline Vector load(const BFloat16* from) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}

inline Vector load(const int8_t* from) {
#ifdef __AVX2__  // GCC converts vectors of bytes one by one
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Integers), Vector);
#endif
}

namespace {

// The structs hold pointers in the order of `_pointers` in cpu_decoding.py.
struct Norm {
  const float *weight, *bias;  // null: there is no norm
};

struct Linear {
  const void* weight;   // (outputs, inputs)
  const float* scales;  // of each output; null: 1
  const float* biases;  // null: 0
};

struct Layer {
  Norm attention_in;
  Linear qkv, out;
  Norm attention_branch, mlp_in;
  Linear up, down;
  Norm mlp_branch;
};

enum Kind : int64_t { kFloat, kBFloat16, kInt8 };

// N outputs of R rows.
template <typename Weight, int N, int R>
inline void tile(const Linear& map, int64_t first, int64_t inputs, int64_t outputs, const float* x, float* y) {
  const Weight* weights = static_cast<const Weight*>(map.weight) + first * inputs;
  Vector sums[N][R] = {};
  for (int64_t at = 0; at < inputs; at += kWidth) {
    Vector some[N];
    for (int n = 0; n < N; ++n) {
      some[n] = load(weights + n * inputs + at);
      __builtin_prefetch(weights + (n + N) * inputs + at);
    }
    for (int r = 0; r < R; ++r) {
      const Vector input = load(x + r * inputs + at);
      for (int n = 0; n < N; ++n) sums[n][r] = fused(some[n], input, sums[n][r]);
    }
  }
  for (int n = 0; n < N; ++n) {
    const float scale = map.scales ? map.scales[first + n] : 1.0f, bias = map.biases ? map.biases[first + n] : 0.0f;
    for (int r = 0; r < R; ++r) y[r * outputs + first + n] = sum(sums[n][r]) * scale + bias;
  }
}

// Outputs of a thread, for R rows; tiles of N outputs keep the sums in registers.
template <typename Weight, int N, int R>
void outputs_of(const Linear& map, Part part, int64_t inputs, int64_t outputs, const float* x, float* y) {
  int64_t first = part.begin;
  for (; first + N <= part.end; first += N) tile<Weight, N, R>(map, first, inputs, outputs, x, y);
  for (; first < part.end; ++first) tile<Weight, 1, R>(map, first, inputs, outputs, x, y);
}

constexpr int64_t kRows = 4, kOutputs = 24;  // rows of a tile; outputs whose weights stay in the cache for all rows

template <typename Weight>
void linear_of(const Linear& map, int64_t rows, int64_t inputs, int64_t outputs, const float* x, float* y) {
  const Part all_outputs(outputs);
  if (rows == 1) return outputs_of<Weight, 8, 1>(map, all_outputs, inputs, outputs, x, y);
  if (rows == 2) return outputs_of<Weight, 4, 2>(map, all_outputs, inputs, outputs, x, y);
  Part part = all_outputs;
  for (part.begin = all_outputs.begin; part.begin < all_outputs.end; part.begin = part.end) {
    part.end = std::min(part.begin + kOutputs, all_outputs.end);
    int64_t row = 0;
    const float* some = x;
    float* to = y;
    for (; row + kRows <= rows; row += kRows, some += kRows * inputs, to += kRows * outputs)
      outputs_of<Weight, 3, kRows>(map, part, inputs, outputs, some, to);
    if (rows - row == 3) outputs_of<Weight, 3, 3>(map, part, inputs, outputs, some, to);
    if (rows - row == 2) outputs_of<Weight, 3, 2>(map, part, inputs, outputs, some, to);
    if (rows - row == 1) outputs_of<Weight, 3, 1>(map, part, inputs, outputs, some, to);
  }
}

// y = x · weightᵀ · scale + bias: the outputs of this thread.
void linear(Kind kind, const Linear& map, int64_t rows, int64_t inputs, int64_t outputs, const float* x, float* y) {
  if (kind == kFloat) linear_of<float>(map, rows, inputs, outputs, x, y);
  if (kind == kBFloat16) linear_of<BFloat16>(map, rows, inputs, outputs, x, y);
  if (kind == kInt8) linear_of<int8_t>(map, rows, inputs, outputs, x, y);
}

struct Sizes {
  int64_t layers, rows, hidden, heads, head;
};

// LayerNorm with PB-Relax: of x / max(max|x|, smallest), or of x itself if `smallest` is 0.
struct Normaliser {
  float smallest, eps;

  void operator()(const Norm& norm, const float* x, float* y, int64_t size) const {
    const Normal normal(x, size, smallest, eps);
    for (int64_t at = 0; at < size; at += kWidth)
      store(y + at, (load(x + at) - normal.mean) * normal.factor * load(norm.weight + at) + load(norm.bias + at));
  }
};

// Keys and values (layers, 2, R, H, C, K); strides in numbers, of all axes but the last two.
struct Cache {
  float* stored;
  const int64_t* lengths;  // stored positions of each row
  int64_t layer, values, row, head;
};

// Attention of the new position of one row and head, which it appends to the cache.
void attend(const float* q, const float* k, const float* v, float* keys, float* values, int64_t length, int64_t size,
            float* scores, float* y) {
  std::copy(k, k + size, keys + length * size);
  std::copy(v, v + size, values + length * size);
  const int64_t count = length + 1;
  for (int64_t at = 0; at < count; ++at) {
    Vector product{};
    for (int64_t d = 0; d < size; d += kWidth) product = fused(load(q + d), load(keys + at * size + d), product);
    scores[at] = sum(product);
  }
  const float factor = 1 / exponentials(scores, count, 1 / std::sqrt(static_cast<float>(size)));
  for (int64_t d = 0; d < size; d += kWidth) {
    Vector mean{};
    for (int64_t at = 0; at < count; ++at) mean = fused(all(scores[at]), load(values + at * size + d), mean);
    store(y + d, mean * factor);
  }
}

// Adds the branch, after its norm if it has one, to x; then the next norm of x.
void close_and_open(const Normaliser& normalise, const Norm& branch_norm, const Norm& next, const float* branch,
                    float* x, float* y, int64_t rows, int64_t size) {
  for (int64_t row = 0; row < rows; ++row, branch += size, x += size, y += size) {
    const float* added = branch;
    if (branch_norm.weight) {
      normalise(branch_norm, branch, y, size);
      added = y;
    }
    for (int64_t at = 0; at < size; at += kWidth) store(x + at, load(x + at) + load(added + at));
    normalise(next, x, y, size);
  }
}

}  // namespace

extern "C" {

// Final normalised hidden states y (R, D) of new positions, whose embeddings are x (R, D).
void decode_step(const Layer* layers, const Norm* final_norm, const Sizes* sizes, const Cache* cache, int64_t kind,
                 float smallest, float eps, const float* x_RD, float* y_RD, int64_t threads) {
  const int64_t rows = sizes->rows, hidden = sizes->hidden, heads = sizes->heads, head = sizes->head;
  const int64_t longest = *std::max_element(cache->lengths, cache->lengths + rows) + 1;
  const Kind weights = static_cast<Kind>(kind);
  const Normaliser normalise{smallest, eps};
  // Every thread writes its part of these, and reads all of them after a barrier.
  const auto shared = [&](int64_t size) { return std::unique_ptr<float[]>(new float[rows * size]); };
  const auto qkv = shared(3 * hidden), attended = shared(hidden), raised = shared(4 * hidden), branch = shared(hidden);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> x(x_RD, x_RD + rows * hidden), opened(rows * hidden), scores(longest + kWidth);
    for (int64_t row = 0; row < rows; ++row)
      normalise(layers->attention_in, &x[row * hidden], &opened[row * hidden], hidden);
    for (int64_t number = 0; number < sizes->layers; ++number) {
      const Layer& layer = layers[number];
      const Norm& next = number + 1 < sizes->layers ? layers[number + 1].attention_in : *final_norm;
      linear(weights, layer.qkv, rows, hidden, 3 * hidden, opened.data(), qkv.get());
#pragma omp barrier
      const Part items(rows * heads);
      for (int64_t item = items.begin; item < items.end; ++item) {
        const int64_t row = item / heads, at = item % heads;
        const float* q = &qkv[row * 3 * hidden + at * head];
        float* keys = cache->stored + number * cache->layer + row * cache->row + at * cache->head;
        attend(q, q + hidden, q + 2 * hidden, keys, keys + cache->values, cache->lengths[row], head, scores.data(),
               &attended[row * hidden + at * head]);
      }
#pragma omp barrier
      linear(weights, layer.out, rows, hidden, hidden, attended.get(), branch.get());
#pragma omp barrier
      close_and_open(normalise, layer.attention_branch, layer.mlp_in, branch.get(), x.data(), opened.data(), rows,
                     hidden);
      linear(weights, layer.up, rows, hidden, 4 * hidden, opened.data(), raised.get());
      const Part outputs(4 * hidden);
      for (int64_t row = 0; row < rows; ++row) {
        float* y = &raised[row * 4 * hidden];
        int64_t at = outputs.begin;
        for (; at + kWidth <= outputs.end; at += kWidth) store(y + at, gelu(load(y + at)));
        for (; at < outputs.end; ++at) y[at] = gelu(all(y[at]))[0];
      }
#pragma omp barrier
      linear(weights, layer.down, rows, 4 * hidden, hidden, raised.get(), branch.get());
#pragma omp barrier
      close_and_open(normalise, layer.mlp_branch, next, branch.get(), x.data(), opened.data(), rows, hidden);
    }
    const Part part(rows * hidden);
    std::copy(opened.begin() + part.begin, opened.begin() + part.end, y_RD + part.begin);
  }
}

// y = x · weightᵀ · scale (R, outputs), such as logits.
void linear_map(const Linear* map, int64_t kind, int64_t rows, int64_t inputs, int64_t outputs, const float* x,
                float* y, int64_t threads) {
#pragma omp parallel num_threads(threads)
  linear(static_cast<Kind>(kind), *map, rows, inputs, outputs, x, y);
}

}  // extern "C"
