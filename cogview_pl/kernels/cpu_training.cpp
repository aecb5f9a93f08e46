// Training kernels of a transformer block on a CPU, fp32: LayerNorm with PB-Relax, GELU and causal attention.
// Python calls them through ctypes (kernels/cpu_training.py). Rows and heads are divided among the threads of OpenMP in
// a fixed way, so a number of threads gives the same numbers every time.
//
// Shapes: N rows, D hidden size, B batch, L length, H heads, K head size.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_vectors.h"

namespace {

// c[r, :] = sum over d of a[r, d] · b[d, :], for R rows and V vectors of columns.
template <int R, int V>
inline void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                 int64_t c_row, int64_t depth) {
  Vector sums[R][V] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(b + d * b_row + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const Vector factor = all(a[r * a_row + d * a_column]);
      for (int v = 0; v < V; ++v) sums[r][v] = fused(factor, columns[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * kWidth, sums[r][v]);
}

constexpr int kRows = 4;  // rows of a tile

// `tile` for kRows rows and any number of columns, a multiple of kWidth.
inline void rows_of_product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                            int64_t c_row, int64_t depth, int64_t columns) {
  int64_t at = 0;
  for (; at + 3 * kWidth <= columns; at += 3 * kWidth)
    tile<kRows, 3>(a, a_row, a_column, b + at, b_row, c + at, c_row, depth);
  if (at + 2 * kWidth <= columns) {
    tile<kRows, 2>(a, a_row, a_column, b + at, b_row, c + at, c_row, depth);
    at += 2 * kWidth;
  }
  if (at < columns) tile<kRows, 1>(a, a_row, a_column, b + at, b_row, c + at, c_row, depth);
}

// Buffers for one head of a sequence: rows are padded to kRows, columns to kWidth, and the padding is zero.
struct Head {
  int64_t length, size, rows, columns, width;
  std::vector<float> q, k, v, transposed, probabilities, gradient, product, room;

  Head(int64_t longest, int64_t size) : size(size), width(padded(size)) {
    resize(longest);
    for (auto* rows_of : {&q, &k, &v, &gradient, &room}) rows_of->resize(rows * width);
    for (auto* square : {&probabilities, &product}) square->resize(rows * columns);
    transposed.resize(width * columns);
  }

  void resize(int64_t new_length) {
    length = new_length;
    rows = (length + kRows - 1) / kRows * kRows;
    columns = padded(rows);
  }

  void read(std::vector<float>& to, const float* from, int64_t stride) const {
    for (int64_t row = 0; row < length; ++row)
      std::memcpy(&to[row * width], from + row * stride, size * sizeof(float));
    std::fill(to.begin() + length * width, to.begin() + rows * width, 0.0f);
  }

  // Queries, keys and values, which are `hidden` numbers apart.
  void read_projected(const float* from, int64_t hidden) {
    read(q, from, 3 * hidden);
    read(k, from + hidden, 3 * hidden);
    read(v, from + 2 * hidden, 3 * hidden);
  }

  void write(const std::vector<float>& from, float* to, int64_t stride) const {
    for (int64_t row = 0; row < length; ++row)
      std::memcpy(to + row * stride, &from[row * width], size * sizeof(float));
  }

  void transpose(const std::vector<float>& from) {
    for (int64_t at = 0; at < size; ++at) {
      for (int64_t row = 0; row < rows; ++row) transposed[at * columns + row] = from[row * width + at];
      for (int64_t row = rows; row < columns; ++row) transposed[at * columns + row] = 0;
    }
  }

  // Softmax of scaled scores over earlier positions; later ones get 0.
  void attend() {
    transpose(k);
    const float scale = 1 / std::sqrt(static_cast<float>(size));
    for (int64_t row = 0; row < rows; row += kRows) {
      rows_of_product(&q[row * width], width, 1, transposed.data(), columns, &probabilities[row * columns], columns,
                      size, padded(row + kRows));
      for (int64_t some = row; some < row + kRows; ++some) normalise(&probabilities[some * columns], some + 1, scale);
    }
  }

  void normalise(float* scores, int64_t count, float scale) {
    const Vector factor = all(1 / exponentials(scores, count, scale));
    for (int64_t at = 0; at < count; at += kWidth) store(scores + at, load(scores + at) * factor);
    for (int64_t at = padded(count); at < columns; ++at) scores[at] = 0;
  }
};

}  // namespace

extern "C" {

// y = LayerNorm(x / max(max|x|, smallest_maximum)) · weight + bias. For the backward pass of a row its factors a and c:
// normalised x = a · x - c.
void norm_forward(const float* x_ND, const float* weight_D, const float* bias_D, float* y_ND, float* factors_N2,
                  int64_t rows, int64_t size, float smallest_maximum, float eps) {
#pragma omp parallel
  {
    const Part part(rows);
    for (int64_t row = part.begin; row < part.end; ++row) {
      const float* x = x_ND + row * size;
      float* y = y_ND + row * size;
      const Normal normal(x, size, smallest_maximum, eps);
      const float a = normal.factor, c = a * normal.mean;
      factors_N2[2 * row] = a;
      factors_N2[2 * row + 1] = c;
      for (int64_t at = 0; at < size; ++at) y[at] = a * (x[at] - normal.mean) * weight_D[at] + bias_D[at];
    }
  }
}

// Gradients of `norm_forward`; those of weight and bias are sums over rows, `(2, D)`.
void norm_backward(const float* gradient_ND, const float* x_ND, const float* weight_D, const float* factors_N2,
                   float* x_gradient_ND, float* vectors_gradient_2D, int64_t rows, int64_t size) {
  const int64_t most_threads = omp_get_max_threads();
  std::vector<float> sums(most_threads * 2 * size);
#pragma omp parallel
  {
    const Part part(rows);
    float* weight_sum = &sums[omp_get_thread_num() * 2 * size];
    float* bias_sum = weight_sum + size;
    for (int64_t row = part.begin; row < part.end; ++row) {
      const float *gradient = gradient_ND + row * size, *x = x_ND + row * size;
      const float a = factors_N2[2 * row], c = factors_N2[2 * row + 1];
      Vector plain{}, along{};
      int64_t at = 0;
      for (; at + kWidth <= size; at += kWidth) {
        const Vector g = load(gradient + at), normalised = load(x + at) * a - c, weighted = g * load(weight_D + at);
        plain += weighted;
        along += weighted * normalised;
        store(weight_sum + at, load(weight_sum + at) + g * normalised);
        store(bias_sum + at, load(bias_sum + at) + g);
      }
      float mean = sum(plain), slope = sum(along);
      for (; at < size; ++at) {
        const float normalised = x[at] * a - c, weighted = gradient[at] * weight_D[at];
        mean += weighted;
        slope += weighted * normalised;
        weight_sum[at] += gradient[at] * normalised;
        bias_sum[at] += gradient[at];
      }
      mean /= size;
      slope /= size;
      for (at = 0; at < size; ++at)
        x_gradient_ND[row * size + at] = a * (gradient[at] * weight_D[at] - mean - (x[at] * a - c) * slope);
    }
  }
  std::memset(vectors_gradient_2D, 0, 2 * size * sizeof(float));
  for (int64_t thread = 0; thread < most_threads; ++thread)
    for (int64_t at = 0; at < 2 * size; ++at) vectors_gradient_2D[at] += sums[thread * 2 * size + at];
}

void gelu_forward(const float* x, float* y, int64_t count) {
  const int64_t vectors = count / kWidth;
#pragma omp parallel
  {
    const Part part(vectors);
    for (int64_t at = part.begin * kWidth; at < part.end * kWidth; at += kWidth) store(y + at, gelu(load(x + at)));
  }
  for (int64_t at = vectors * kWidth; at < count; ++at) y[at] = gelu(all(x[at]))[0];
}

void gelu_backward(const float* gradient, const float* x, float* x_gradient, int64_t count) {
  constexpr float one = kGeluLinear, three = kGeluCubic;
  const int64_t vectors = count / kWidth;
#pragma omp parallel
  {
    const Part part(vectors);
    for (int64_t at = part.begin * kWidth; at < part.end * kWidth; at += kWidth) {
      const Vector some = load(x + at), square = some * some;
      const Vector power = exponential(-some * (one + three * square)), gate = 1.0f / (power + 1.0f);
      const Vector slope = gate + some * gate * (power * gate) * (one + 3 * three * square);
      store(x_gradient + at, load(gradient + at) * slope);
    }
  }
  for (int64_t at = vectors * kWidth; at < count; ++at) {
    const float square = x[at] * x[at];
    const float power = exponential(all(-x[at] * (one + three * square)))[0], gate = 1.0f / (power + 1.0f);
    x_gradient[at] = gradient[at] * (gate + x[at] * gate * (power * gate) * (one + 3 * three * square));
  }
}

// Causal attention inside sequences that follow each other: (N, 3, H, K) -> (N, H, K). Sequence b has the rows from
// starts[b] to starts[b + 1]; queries, keys and values are consecutive in a row.
void attention_forward(const float* qkv, const int64_t* starts, float* y, int64_t batch, int64_t longest, int64_t heads,
                       int64_t size) {
  const int64_t hidden = heads * size;
#pragma omp parallel
  {
    const Part part(batch * heads);
    Head head(longest, size);
    for (int64_t item = part.begin; item < part.end; ++item) {
      const int64_t row = starts[item / heads], offset = item % heads * size;
      head.resize(starts[item / heads + 1] - row);
      const float* from = qkv + row * 3 * hidden + offset;
      head.read_projected(from, hidden);
      head.attend();
      for (int64_t some = 0; some < head.rows; some += kRows)
        rows_of_product(&head.probabilities[some * head.columns], head.columns, 1, head.v.data(), head.width,
                        &head.room[some * head.width], head.width, some + kRows, head.width);
      head.write(head.room, y + row * hidden + offset, hidden);
    }
  }
}

// Gradient of `attention_forward`; it computes the probabilities again.
void attention_backward(const float* gradient, const float* qkv, const int64_t* starts, float* qkv_gradient,
                        int64_t batch, int64_t longest, int64_t heads, int64_t size) {
  const int64_t hidden = heads * size;
  const float scale = 1 / std::sqrt(static_cast<float>(size));
#pragma omp parallel
  {
    const Part part(batch * heads);
    Head head(longest, size);
    for (int64_t item = part.begin; item < part.end; ++item) {
      const int64_t row = starts[item / heads], offset = item % heads * size;
      head.resize(starts[item / heads + 1] - row);
      const int64_t width = head.width, columns = head.columns, rows = head.rows;
      const float* from = qkv + row * 3 * hidden + offset;
      float* to = qkv_gradient + row * 3 * hidden + offset;
      head.read_projected(from, hidden);
      head.read(head.gradient, gradient + row * hidden + offset, hidden);
      head.attend();
      for (int64_t some = 0; some < rows; some += kRows)  // of values: sum over later queries of p · gradient
        rows_of_product(&head.probabilities[some * columns + some], 1, columns, &head.gradient[some * width], width,
                        &head.room[some * width], width, rows - some, width);
      head.write(head.room, to + 2 * hidden, 3 * hidden);
      head.transpose(head.v);
      for (int64_t some = 0; some < rows; some += kRows) {
        float* product = &head.product[some * columns];
        rows_of_product(&head.gradient[some * width], width, 1, head.transposed.data(), columns, product, columns, size,
                        padded(some + kRows));
        for (int64_t one = some; one < some + kRows; ++one) {  // of scores: p · (product - sum of p · product)
          const float* p = &head.probabilities[one * columns];
          float* slopes = &head.product[one * columns];
          const int64_t end = padded(some + kRows);
          Vector total{};
          for (int64_t at = 0; at < end; at += kWidth) total += load(p + at) * load(slopes + at);
          const Vector mean = all(sum(total));
          for (int64_t at = 0; at < end; at += kWidth)
            store(slopes + at, load(p + at) * (load(slopes + at) - mean) * scale);
        }
        rows_of_product(product, columns, 1, head.k.data(), width, &head.room[some * width], width, some + kRows,
                        width);
      }
      head.write(head.room, to, 3 * hidden);
      for (int64_t some = 0; some < rows; some += kRows)  // of keys: sum over later queries
        rows_of_product(&head.product[some * columns + some], 1, columns, &head.q[some * width], width,
                        &head.room[some * width], width, rows - some, width);
      head.write(head.room, to + hidden, 3 * hidden);
    }
  }
}

}  // extern "C"
