// Kernels of the training step on CPU, called by MindSpore's Custom operation (kernels.py). The matrix products are
// those of the oneDNN that MindSpore brings along. Arrays are dense float32 in row order.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <thread>
#include <unistd.h>
#include <vector>

using std::int64_t;
template <class T, class I = int64_t>
using Gemm = int(char, char, I, I, I, float, const T *, I, const T *, I, float, float *, I);
extern "C" Gemm<float> dnnl_sgemm;
extern "C" Gemm<uint16_t> dnnl_gemm_bf16bf16f32;

// A kernel: it gets arrays, inputs first, then outputs. One runs at a time.
#define KERNEL(name)                                                                                                  \
  static void name##_(const Arrays &a);                                                                               \
  extern "C" int name(int count, void **data, int *ranks, int64_t **shapes, const char **, void *, void *) {          \
    std::lock_guard<std::mutex> turn(Pool::get().turn);                                                               \
    name##_({count, data, ranks, shapes});                                                                            \
    return 0;                                                                                                         \
  }                                                                                                                   \
  static void name##_(const Arrays &a)
#define SIMD(...) _Pragma(#__VA_ARGS__)
namespace {
struct Arrays {
  int count;
  void **data;
  const int *ranks;
  int64_t **shapes;
  const float *in(int64_t i) const { return static_cast<const float *>(data[i]); }
  const int32_t *whole(int64_t i) const { return static_cast<const int32_t *>(data[i]); }
  float *out(int64_t i) const { return static_cast<float *>(data[i]); }
  int64_t dim(int i, int axis) const { return shapes[i][axis]; }
  int64_t size(int64_t i) const {
    return std::accumulate(shapes[i], shapes[i] + ranks[i], int64_t{1}, std::multiplies<int64_t>());
  }
};

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
// Threads of this process: each takes the next piece of the work until none is left.
struct Pool {
  explicit Pool(int count) : threads(count) {}
  static Pool &get() {
    if (owner != getpid()) renew(current ? current->threads : 1);  // a forked process has no threads of its parent
    return *current;
  }
  static void renew(int threads) { current = new Pool(threads), owner = getpid(); }  // the old one's threads sleep
  void run(int64_t pieces, const std::function<void(int64_t)> &work) {
    const bool alone = pieces < 2 || threads < 2;
    while (!alone && started < threads - 1) std::thread(&Pool::serve, this, round.load()).detach(), started++;
    std::unique_lock<std::mutex> lock(sleep);
    todo = &work, count = pieces, next = 0, busy = alone ? 0 : started;
    if (!alone) round++;
    lock.unlock();
    if (!alone) wake.notify_all();
    for (int64_t i; (i = next++) < count;) work(i);
    wait([this] { return busy == 0; }, 1000);
  }
  template <class Done>
  void wait(Done done, int microseconds) {  // busy for a while, then asleep
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    while (std::chrono::steady_clock::now() < end)
      if (done()) return;
    std::unique_lock<std::mutex> lock(sleep);
    wake.wait(lock, done);
  }
  void serve(int seen) {
    for (;; seen++) {
      wait([this, seen] { return round != seen; }, 50);
      for (int64_t i; (i = next++) < count;) (*todo)(i);
      std::lock_guard<std::mutex> lock(sleep);
      if (--busy == 0) wake.notify_all();
    }
  }
  static inline Pool *current = nullptr;
  static inline pid_t owner = 0;
  const int threads;
  std::mutex turn, sleep;  // turn: of the kernels
  std::condition_variable wake;
  const std::function<void(int64_t)> *todo = nullptr;
  int64_t count = 0;
  int started = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int> round{0}, busy{0};
};

// work(begin, end) over n items, `each` at a time
template <class F>
void parallel(int64_t n, int64_t each, F work) {
  Pool::get().run((n + each - 1) / each, [&](int64_t i) { work(i * each, std::min(n, (i + 1) * each)); });
}

// Sums over pieces of n items, `each` at a time, in the same order whatever the number of threads:
// work(begin, end, sums) adds to `width` numbers.
template <class T, class F>
std::vector<T> sums_of(int64_t n, int64_t each, int64_t width, F work) {
  const int64_t pieces = std::max<int64_t>(1, (n + each - 1) / each);
  std::vector<T> sums(pieces * width);
  parallel(n, each, [&](int64_t from, int64_t to) { work(from, to, sums.data() + from / each * width); });
  for (int64_t i = 1; i < pieces; i++)
    for (int64_t j = 0; j < width; j++) sums[j] += sums[i * width + j];
  sums.resize(width);
  return sums;
}

void add(int64_t n, const float *x, float *y) {
  SIMD(omp simd) for (int64_t j = 0; j < n; j++) y[j] += x[j];
}
template <class F>
float total(int64_t n, F value) {
  float sum = 0;
  SIMD(omp simd reduction(+ : sum)) for (int64_t j = 0; j < n; j++) sum += value(j);
  return sum;
}
template <class T>
T *at_least(std::vector<T> &memory, int64_t count) {
  if (static_cast<int64_t>(memory.size()) < count) memory = std::vector<T>(count);
  return memory.data();
}

// C (m, n) = op(A) op(B) + beta C; rows or columns of C are shared among the threads
template <class T>
void product(char ta, char tb, int64_t m, int64_t n, int64_t k, const T *a, const T *b, float beta, float *c) {
  const int64_t lda = ta == 'N' ? k : m, ldb = tb == 'N' ? n : k, side = std::max(m, n);
  const int threads = m * n * k < 1 << 20 ? 1 : Pool::get().threads;
  Gemm<T> *gemm;
  if constexpr (std::is_same_v<T, float>) gemm = dnnl_sgemm;
  else gemm = dnnl_gemm_bf16bf16f32;
  parallel(side, rounded_up((side + threads - 1) / threads, 16), [&](int64_t from, int64_t to) {
    if (m >= n)
      gemm(ta, tb, to - from, n, k, 1, a + from * (ta == 'N' ? lda : 1), lda, b, ldb, beta, c + from * n, n);
    else
      gemm(ta, tb, m, to - from, k, 1, a, lda, b + from * (tb == 'N' ? 1 : ldb), ldb, beta, c + from, n);
  });
}

// An operand of a product: as it is, or rounded to the nearest bfloat16 (ties to even; NaN stays NaN)
template <int SLOT, class T>
const T *operand(const float *x, int64_t n) {
  if constexpr (std::is_same_v<T, float>) return x;
  static std::vector<T> kept;
  T *y = at_least(kept, n);
  parallel(n, 1 << 16, [&](int64_t from, int64_t to) {
    SIMD(omp simd) for (int64_t i = from; i < to; i++) {
      uint32_t v;
      std::memcpy(&v, x + i, 4);
      const bool nan = (v & 0x7fffffffu) > 0x7f800000u;
      y[i] = static_cast<uint16_t>((nan ? v | 0x400000u : v + 0x7fffu + (v >> 16 & 1u)) >> 16);
    }
  });
  return y;
}

inline float exponential(float x) {  // Cephes expf, relative error 2e-7; NaN stays NaN
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = std::floor(x * 1.44269504f + 0.5f), f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * f + 1.3981999507e-3f, y = y * f + 8.3334519073e-3f, y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f, y = y * f + 5.0000001201e-1f, y = y * f * f + f + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
}

// What a linear layer does with its input first, and the gradient of that: arrays up to `weight` are its own
struct Nothing {
  static constexpr int weight = 1, outputs = 1;
  const Arrays &a;
  const float *forward() const { return a.in(0); }
  const float *backward(float *) const { return a.in(0); }  // multiplies the gradient in place; returns `forward()`
};

// GELU; the normal distribution's function by Abramowitz and Stegun 7.1.26, absolute error 1e-7
struct Gelu : Nothing {
  const float *forward() const { return backward(nullptr); }
  const float *backward(float *gradient) const {
    static std::vector<float> kept;
    const float *x = a.in(0);
    float *y = at_least(kept, a.size(0));
    parallel(a.size(0), 1 << 14, [&](int64_t from, int64_t to) {
      SIMD(omp simd) for (int64_t i = from; i < to; i++) {
        const float bell = exponential(-0.5f * x[i] * x[i]), t = 1.0f / (1.0f + 0.23164189f * std::abs(x[i]));
        const float p = ((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f;
        const float tail = 0.5f * (p * t + 0.254829592f) * t * bell, share = x[i] < 0 ? tail : 1.0f - tail;
        y[i] = x[i] * share;
        if (gradient) gradient[i] *= share + x[i] * 0.39894228f * bell;
      }
    });
    return y;
  }
};

// Layer norm: x (rows, dim), weight, bias, epsilon (1,)
struct Norm {
  static constexpr int weight = 4, outputs = 3;
  const Arrays &a;
  int64_t rows = a.dim(0, 0), dim = a.dim(0, 1);
  const float *forward(float *y = nullptr) const {
    static std::vector<float> kept;
    if (!y) y = at_least(kept, rows * dim);
    parallel(rows, 32, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i++) {
        const auto [x, mean, rate] = row(i);
        float *o = y + i * dim;
        SIMD(omp simd) for (int64_t j = 0; j < dim; j++) o[j] = (x[j] - mean) * rate * a.in(1)[j] + a.in(2)[j];
      }
    });
    return y;
  }
  void backward(const float *gradient, float *dx, float *dweight, float *dbias) const {  // dx may be the gradient
    const auto sums = sums_of<float>(rows, 256, 2 * dim, [&](int64_t from, int64_t to, float *w) {
      for (int64_t i = from; i < to; i++) {
        const auto [x, mean, rate] = row(i);
        const float *g = gradient + i * dim, *weight = a.in(1);
        float *o = dx + i * dim, inner = 0, slope = 0;
        SIMD(omp simd reduction(+ : inner, slope)) for (int64_t j = 0; j < dim; j++) {
          const float unit = (x[j] - mean) * rate, v = g[j] * weight[j];
          inner += v, slope += v * unit;
          w[j] += g[j] * unit, w[dim + j] += g[j];
        }
        inner /= dim, slope /= dim;
        SIMD(omp simd)
        for (int64_t j = 0; j < dim; j++) o[j] = rate * (g[j] * weight[j] - inner - (x[j] - mean) * rate * slope);
      }
    });
    std::copy_n(sums.data(), dim, dweight), std::copy_n(sums.data() + dim, dim, dbias);
  }
  const float *backward(float *dx) const {
    backward(dx, dx, a.out(weight + 3), a.out(weight + 4));
    return forward();
  }
  std::tuple<const float *, float, float> row(int64_t i) const {  // x, its mean and 1 / standard deviation
    const float *x = a.in(0) + i * dim, mean = total(dim, [=](int64_t j) { return x[j]; }) / dim;
    const float square = total(dim, [=](int64_t j) { return (x[j] - mean) * (x[j] - mean); });
    return {x, mean, 1 / std::sqrt(square / dim + *a.in(3))};
  }
};

// First, weight (out, in), bias (out,) or none, what is added to the result (rows, out) or none -> (rows, out)
template <class T, class First>
void linear(const Arrays &a) {
  const int w = First::weight, extra = a.count - w - 2;
  const int64_t m = a.dim(0, 0), n = a.dim(w, 0), k = a.dim(w, 1);
  float *y = a.out(a.count - 1);
  if (extra > 0)
    parallel(m, 64, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i++) {
        std::copy_n(a.in(w + 1), n, y + i * n);
        if (extra > 1) add(n, a.in(w + 2) + i * n, y + i * n);
      }
    });
  product('N', 'T', m, n, k, operand<0, T>(First{a}.forward(), m * k), operand<1, T>(a.in(w), n * k), extra > 0, y);
}

// First, weight, gradient -> of x, of the other arrays of First, of the weight, of the bias if it is asked for
template <class T, class First>
void linear_grad(const Arrays &a) {
  const int w = First::weight, first = w + 2, dw = first + First::outputs;
  const int64_t m = a.dim(0, 0), n = a.dim(w, 0), k = a.dim(w, 1);
  const float *gradient = a.in(w + 1);
  const T *g = operand<0, T>(gradient, m * n);
  product('N', 'N', m, k, n, g, operand<1, T>(a.in(w), n * k), 0, a.out(first));
  product('T', 'N', n, k, m, g, operand<1, T>(First{a}.backward(a.out(first)), m * k), 0, a.out(dw));
  if (dw + 2 > a.count) return;
  float *db = a.out(dw + 1);
  parallel(n, 128, [&](int64_t from, int64_t to) {
    std::fill(db + from, db + to, 0.0f);
    for (int64_t i = 0; i < m; i++) add(to - from, gradient + i * n + from, db + from);
  });
}

#ifdef __AVX512F__
constexpr int64_t WIDE = 16;  // floats in a register
#else
constexpr int64_t WIDE = 8;
#endif
constexpr int BANDS = WIDE == 16 ? 4 : 2;  // registers of a row of a tile: 6 rows fit in 32 or 16 registers
typedef float Vec __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

struct Matrix { const float *data; int64_t row, step; };  // by the strides from row to row and from column to column

template <int R, int V>
inline __attribute__((always_inline)) void tile(int64_t k, float scale, Matrix a, const float *b, int64_t ldb, float *c,
                                                int64_t ldc) {
  Vec sum[R][V] = {};
  for (int64_t p = 0; p < k; p++) {
    Vec right[V];
    for (int v = 0; v < V; v++) right[v] = *reinterpret_cast<const Vec *>(b + p * ldb + WIDE * v);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] += a.data[r * a.row + p * a.step] * right[v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) *reinterpret_cast<Vec *>(c + r * ldc + WIDE * v) = scale * sum[r][v];
}

template <int V>
int64_t band(int64_t j, int64_t m, int64_t n, int64_t k, float scale, Matrix a, const float *b, int64_t ldb, float *c,
             int64_t ldc) {
  for (; j + V * WIDE <= n; j += V * WIDE) {
    int64_t i = 0;
    const auto below = [&] { return Matrix{a.data + i * a.row, a.row, a.step}; };
    for (; i + 6 <= m; i += 6) tile<6, V>(k, scale, below(), b + j, ldb, c + i * ldc + j, ldc);
    for (; i + 2 <= m; i += 2) tile<2, V>(k, scale, below(), b + j, ldb, c + i * ldc + j, ldc);
    for (; i < m; i++) tile<1, V>(k, scale, below(), b + j, ldb, c + i * ldc + j, ldc);
  }
  return j;
}
// C (m, n) = scale A B with A (m, k); n is a multiple of WIDE
void small(int64_t m, int64_t n, int64_t k, float scale, Matrix a, const float *b, int64_t ldb, float *c, int64_t ldc) {
  int64_t j = band<BANDS>(0, m, n, k, scale, a, b, ldb, c, ldc);
  j = band<2>(j, m, n, k, scale, a, b, ldb, c, ldc);
  band<1>(j, m, n, k, scale, a, b, ldb, c, ldc);
}

// x (rows, cols) by its row stride -> its transpose y (cols, wide), padded with zeros
void transpose(const float *x, int64_t ldx, int64_t rows, int64_t cols, float *y, int64_t wide) {
  for (int64_t i0 = 0; i0 < wide; i0 += 16)
    for (int64_t j = 0; j < cols; j++)
      for (int64_t i = i0; i < std::min(wide, i0 + 16); i++) y[j * wide + i] = i < rows ? x[i * ldx + j] : 0.0f;
}

// Attention on qkv (outer, tokens, inner, 3, heads, dim), among the tokens of each (outer, inner): a ViT has outer =
// images, a Swin outer = windows and inner = images. The scores get the entry of a position table (entries, heads) that
// an index (tokens, tokens) names, and a mask (windows, tokens, tokens); (1,) stands for none.
struct Heads {
  int64_t outer, tokens, inner, heads, dim, width, line, out_line, padded, wide, pairs, masks;
  explicit Heads(const Arrays &a) {
    const int64_t *s = a.shapes[0];
    outer = s[0], tokens = s[1], inner = s[2], heads = s[4], dim = s[5], width = heads * dim;
    line = inner * 3 * width, out_line = inner * width, padded = rounded_up(tokens, WIDE), wide = rounded_up(dim, WIDE);
    pairs = a.ranks[1] == 2 ? tokens * tokens : 0, masks = a.ranks[3] == 3 ? a.dim(3, 0) : 0;
  }
  int64_t q(int64_t o, int64_t b, int64_t h) const { return (o * tokens * inner + b) * 3 * width + h * dim; }
  int64_t out(int64_t o, int64_t b, int64_t h) const { return (o * tokens * inner + b) * width + h * dim; }
  int64_t weight(int64_t o, int64_t b, int64_t h) const { return ((o * inner + b) * heads + h) * tokens * tokens; }
  float *scratch() const {  // of this thread, for a head
    static thread_local std::vector<float> kept;
    return at_least(kept, 3 * tokens * wide + dim * padded + tokens * padded);
  }

  // y (tokens, dim) with row stride ldy = scale A B, B (tokens, dim) with row stride ldb; memory (2, tokens, wide)
  void mix(float scale, Matrix a, const float *b, int64_t ldb, float *y, int64_t ldy, float *memory) const {
    if (wide == dim) return small(tokens, wide, tokens, scale, a, b, ldb, y, ldy);
    float *out = memory + tokens * wide;  // whole registers, padded with zeros
    for (int64_t i = 0; i < tokens * wide; i++) memory[i] = i % wide < dim ? b[i / wide * ldb + i % wide] : 0.0f;
    small(tokens, wide, tokens, scale, a, memory, wide, out, wide);
    for (int64_t i = 0; i < tokens; i++) std::memcpy(y + i * ldy, out + i * wide, dim * 4);
  }
};

void softmax(int64_t n, float *x) {
  float most = x[0], sum = 0;
  SIMD(omp simd reduction(max : most)) for (int64_t j = 0; j < n; j++) most = x[j] > most ? x[j] : most;
  SIMD(omp simd reduction(+ : sum)) for (int64_t j = 0; j < n; j++) x[j] = exponential(x[j] - most), sum += x[j];
  const float rate = 1.0f / sum;
  SIMD(omp simd) for (int64_t j = 0; j < n; j++) x[j] *= rate;
}

}  // namespace
extern "C" void set_threads(int n) { if (n != Pool::get().threads) Pool::renew(n); }  // not while a kernel runs

#define LINEAR(name, First)                                           \
  KERNEL(name##_float32) { linear<float, First>(a); }                 \
  KERNEL(name##_bfloat16) { linear<uint16_t, First>(a); }             \
  KERNEL(name##_float32_grad) { linear_grad<float, First>(a); }       \
  KERNEL(name##_bfloat16_grad) { linear_grad<uint16_t, First>(a); }
LINEAR(linear, Nothing)
LINEAR(gelu_linear, Gelu)
LINEAR(norm_linear, Norm)

KERNEL(layer_norm) { Norm{a}.forward(a.out(4)); }  // x (rows, dim), weight, bias, epsilon (1,) -> (rows, dim)
KERNEL(layer_norm_grad) { Norm{a}.backward(a.in(4), a.out(5), a.out(6), a.out(7)); }  // gradient: 4

// qkv, table, index, mask, scale (1,) -> mixed (outer, tokens, inner, heads, dim); for the gradient also the weights
// (outer, inner, heads, tokens, tokens)
KERNEL(attention) {
  const Heads s(a);
  const int64_t n = s.tokens, np = s.padded;
  const float *qkv = a.in(0), *table = a.in(1), *mask = a.in(3), scale = *a.in(4);
  const int32_t *index = a.whole(2);
  float *out = a.out(5), *weights = a.count == 7 ? a.out(6) : nullptr;
  std::vector<float> bias(s.pairs * s.heads);
  for (int64_t i = 0; i < s.pairs * s.heads; i++) bias[i] = table[index[i % s.pairs] * s.heads + i / s.pairs];
  parallel(s.outer * s.inner * s.heads, 1 + (1 << 17) / (n * np * s.dim), [&](int64_t from, int64_t to) {
    float *padded = s.scratch(), *keys = padded + 2 * n * s.wide, *scores = keys + s.dim * np;
    for (int64_t u = from; u < to; u++) {
      const int64_t h = u % s.heads, b = u / s.heads % s.inner, o = u / s.heads / s.inner;
      const float *q = qkv + s.q(o, b, h);
      transpose(q + s.width, s.line, n, s.dim, keys, np);
      small(n, np, s.dim, scale, {q, s.line, 1}, keys, np, scores, np);
      for (int64_t i = 0; i < n; i++) {
        if (s.pairs) add(n, &bias[(h * n + i) * n], scores + i * np);
        if (s.masks) add(n, mask + (o % s.masks * n + i) * n, scores + i * np);
        softmax(n, scores + i * np);
        if (weights) std::memcpy(weights + s.weight(o, b, h) + i * n, scores + i * np, n * 4);
      }
      s.mix(1, {scores, np, 1}, q + 2 * s.width, s.line, out + s.out(o, b, h), s.out_line, padded);
    }
  });
}

KERNEL(attention_grad) {  // qkv, table, index, mask, scale, weights, gradient of mixed -> of qkv, of table
  const Heads s(a);
  const int64_t n = s.tokens, np = s.padded, areas = s.outer * s.inner;
  const float *qkv = a.in(0), *weights = a.in(5), *grad = a.in(6), scale = *a.in(4);
  const int32_t *index = a.whole(2);
  float *dqkv = a.out(7), *dtable = a.out(8);
  // a piece is some areas of one head; their gradients of the bias are added in the same order by any number of threads
  const int64_t parts = std::min<int64_t>(areas, s.pairs ? std::max<int64_t>(1, 16 / s.heads) : areas);
  const int64_t each = (areas + parts - 1) / parts;
  std::vector<float> added(s.heads * parts * s.pairs);
  Pool::get().run(s.heads * parts, [&](int64_t piece) {
    const int64_t h = piece % s.heads, part = piece / s.heads;
    float *padded = s.scratch(), *values = padded + 2 * n * s.wide, *d = values + s.dim * np;
    for (int64_t area = part * each; area < std::min(areas, (part + 1) * each); area++) {
      const int64_t o = area / s.inner, b = area % s.inner;
      const float *q = qkv + s.q(o, b, h), *g = grad + s.out(o, b, h), *weight = weights + s.weight(o, b, h);
      float *dq = dqkv + s.q(o, b, h);
      transpose(q + 2 * s.width, s.line, n, s.dim, values, np);
      small(n, np, s.dim, 1, {g, s.out_line, 1}, values, np, d, np);
      s.mix(1, {weight, 1, n}, g, s.out_line, dq + 2 * s.width, s.line, padded);
      for (int64_t i = 0; i < n; i++) {
        const float *p = weight + i * n;
        float *r = d + i * np;
        const float inner = total(n, [=](int64_t j) { return r[j] * p[j]; });
        SIMD(omp simd) for (int64_t j = 0; j < n; j++) r[j] = (r[j] - inner) * p[j];
        if (s.pairs) add(n, r, added.data() + piece * s.pairs + i * n);
      }
      s.mix(scale, {d, np, 1}, q + s.width, s.line, dq, s.line, padded);
      s.mix(scale, {d, 1, np}, q, s.line, dq + s.width, s.line, padded);
    }
  });
  std::memset(dtable, 0, a.size(1) * 4);
  for (int64_t piece = 0; piece < s.heads * parts; piece++)
    for (int64_t i = 0; i < s.pairs; i++) dtable[index[i] * s.heads + piece % s.heads] += added[piece * s.pairs + i];
}

// qkv (rows, 3, heads, dim), factor (heads,) -> q / |q| * factor, k / |k|, v (Swin V2); with the gradient of that, the
// gradients of qkv and factor
void cosine_of(const Arrays &a, const float *grad, float *y, float *dfactor) {
  const int64_t rows = a.dim(0, 0), heads = a.dim(0, 2), dim = a.dim(0, 3);
  const auto sums = sums_of<float>(rows, 256, heads, [&](int64_t from, int64_t to, float *sum) {
    for (int64_t u = from * 3 * heads; u < to * 3 * heads; u++) {
      const int64_t h = u % heads, part = u / heads % 3;
      const float *x = a.in(0) + u * dim, *g = grad ? grad + u * dim : x;
      const float length = std::sqrt(total(dim, [=](int64_t j) { return x[j] * x[j]; }));
      const float rate = part == 2 ? 1 : 1 / std::max(length, 1e-12f), factor = part == 0 ? a.in(1)[h] * rate : rate;
      const float inner = grad ? total(dim, [=](int64_t j) { return x[j] * g[j]; }) : 0;
      if (part == 0) sum[h] += inner * rate;
      const float back = part == 2 || length < 1e-12f ? 0 : inner * rate * rate;
      for (int64_t j = 0; j < dim; j++) y[u * dim + j] = factor * (g[j] - back * x[j]);
    }
  });
  if (grad) std::memcpy(dfactor, sums.data(), heads * 4);
}

KERNEL(cosine) { cosine_of(a, nullptr, a.out(2), nullptr); }
KERNEL(cosine_grad) { cosine_of(a, a.in(2), a.out(3), a.out(4)); }  // qkv, factor, gradient -> of qkv, of factor

KERNEL(square_sum) {  // arrays of any shape -> the sum of all squares (1,)
  double all = 0;
  for (int i = 0; i + 1 < a.count; i++)
    all += sums_of<double>(a.size(i), 1 << 16, 1, [x = a.in(i)](int64_t from, int64_t to, double *sum) {
      *sum = total(to - from, [y = x + from](int64_t j) { return y[j] * y[j]; });
    })[0];
  *a.out(a.count - 1) = static_cast<float>(all);
}

// values (rates, decays of the groups, epsilon), betas (2,), group of each, factor on the gradients (1,), skip (1,); n
// weights, n first and n second moments, which change unless skip is 1; n gradients -> 1
KERNEL(adamw) {
  const float *values = a.in(0), b1 = a.in(1)[0], b2 = a.in(1)[1], scale = *a.in(3);
  const int32_t *group = a.whole(2);
  const int64_t groups = (a.dim(0, 0) - 1) / 2, n = a.dim(2, 0);
  for (int64_t i = 5; *a.in(4) == 0 && i < 5 + n; i++) {
    float *w = a.out(i), *m = a.out(n + i), *v = a.out(2 * n + i);
    const float *g = a.in(3 * n + i), rate = values[group[i - 5]], decay = values[groups + group[i - 5]];
    parallel(a.size(i), 1 << 16, [&, eps = values[2 * groups]](int64_t from, int64_t to) {
      SIMD(omp simd) for (int64_t j = from; j < to; j++) {
        const float d = scale * g[j];
        m[j] = b1 * m[j] + (1 - b1) * d;
        v[j] = b2 * v[j] + (1 - b2) * d * d;
        w[j] -= rate * (m[j] / (std::sqrt(v[j]) + eps) + decay * w[j]);
      }
    });
  }
  *a.out(a.count - 1) = 1;
}
