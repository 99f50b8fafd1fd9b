// Kernels of the training step on CPU, called by MindSpore's Custom operation (kernels.py). The products are those of the
// oneDNN that MindSpore brings along. Arrays are dense float32 in row order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

using std::int64_t;
extern "C" int dnnl_sgemm(char, char, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t,
                          float, float *, int64_t);
extern "C" int dnnl_gemm_bf16bf16f32(char, char, int64_t, int64_t, int64_t, float, const uint16_t *, int64_t,
                                     const uint16_t *, int64_t, float, float *, int64_t);

// A kernel has `count` arrays, inputs first, then outputs, with their ranks and shapes. One kernel runs at a time.
#define KERNEL(name)                                                                                               \
  static void name##_(int count, void **data, int *ranks, int64_t **shapes);                                       \
  extern "C" int name(int count, void **data, int *ranks, int64_t **shapes, const char **, void *, void *) {       \
    Pool::Turn turn;                                                                                               \
    name##_(count, data, ranks, shapes);                                                                           \
    return 0;                                                                                                      \
  }                                                                                                                \
  void name##_([[maybe_unused]] int count, void **data, [[maybe_unused]] int *ranks, [[maybe_unused]] int64_t **shapes)
#define IN(i) static_cast<const float *>(data[i])
#define OUT(i) static_cast<float *>(data[i])
#define SIMD(...) _Pragma(#__VA_ARGS__)

namespace {

int64_t size(int rank, const int64_t *shape) {
  int64_t n = 1;
  for (int i = 0; i < rank; i++) n *= shape[i];
  return n;
}

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Threads of this process: each takes the next piece of the work until none is left.
class Pool {
 public:
  // The right to run a kernel. A forked process has no threads of its parent and gets its own.
  struct Turn : std::unique_lock<std::mutex> {
    Turn() : unique_lock(get().turn_) {}
  };
  static Pool &get() {
    if (owner_ != getpid()) renew(current_ ? current_->threads : 1);  // a forked process has no threads of its parent
    return *current_;
  }
  static void renew(int threads) { current_ = new Pool(threads), owner_ = getpid(); }  // the old one's threads sleep
  const int threads;

  void run(int64_t pieces, const std::function<void(int64_t)> &work) {
    if (pieces < 2 || threads < 2) {
      for (int64_t i = 0; i < pieces; i++) work(i);
      return;
    }
    while (started_ < threads - 1) std::thread([this, round = round_.load()] { serve(round); }).detach(), started_++;
    {
      std::lock_guard<std::mutex> lock(sleep_);
      work_ = &work, pieces_ = pieces, next_ = 0, busy_ = started_;
      round_++;
    }
    wake_.notify_all();
    take();
    wait([this] { return busy_ == 0; });
  }

 private:
  explicit Pool(int count) : threads(count) {}
  void take() {
    for (int64_t i; (i = next_++) < pieces_;) (*work_)(i);
  }
  template <class Done>
  void wait(Done done) {
    for (int spins = 0; spins < 4000; spins++)
      if (done()) return;
    std::unique_lock<std::mutex> lock(sleep_);
    wake_.wait(lock, done);
  }
  void serve(int seen) {
    for (;; seen++) {
      wait([this, seen] { return round_ != seen; });
      take();
      std::lock_guard<std::mutex> lock(sleep_);
      if (--busy_ == 0) wake_.notify_all();
    }
  }
  static inline Pool *current_ = nullptr;
  static inline pid_t owner_ = 0;
  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  const std::function<void(int64_t)> *work_ = nullptr;
  int64_t pieces_ = 0;
  int started_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> round_{0}, busy_{0};
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

float *scratch(int64_t count) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

// --- products ------------------------------------------------------------------------------------------------------

int gemm(char ta, char tb, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb,
         float beta, float *c, int64_t ldc) {
  return dnnl_sgemm(ta, tb, m, n, k, 1, a, lda, b, ldb, beta, c, ldc);
}
int gemm(char ta, char tb, int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda, const uint16_t *b,
         int64_t ldb, float beta, float *c, int64_t ldc) {
  return dnnl_gemm_bf16bf16f32(ta, tb, m, n, k, 1, a, lda, b, ldb, beta, c, ldc);
}

// C (m, n) = op(A) op(B) + beta C; rows or columns of C are shared among the threads
template <class T>
void product(char ta, char tb, int64_t m, int64_t n, int64_t k, const T *a, const T *b, float beta, float *c) {
  const int64_t lda = ta == 'N' ? k : m, ldb = tb == 'N' ? n : k, side = std::max(m, n);
  const int threads = Pool::get().threads;
  parallel(side, rounded_up((side + threads - 1) / threads, 16), [&](int64_t from, int64_t to) {
    if (m >= n)
      gemm(ta, tb, to - from, n, k, a + from * (ta == 'N' ? lda : 1), lda, b, ldb, beta, c + from * n, n);
    else
      gemm(ta, tb, m, to - from, k, a, lda, b + from * (tb == 'N' ? 1 : ldb), ldb, beta, c + from, n);
  });
}

// Rounded to the nearest bfloat16, ties to even; NaN stays NaN
std::vector<uint16_t> bfloat16(const float *x, int64_t n) {
  std::vector<uint16_t> y(n);
  const uint32_t *bits = reinterpret_cast<const uint32_t *>(x);
  parallel(n, 1 << 16, [&, out = y.data()](int64_t from, int64_t to) {
    SIMD(omp simd)
    for (int64_t i = from; i < to; i++) {
      const uint32_t v = bits[i], nan = (v & 0x7fffffffu) > 0x7f800000u;
      out[i] = static_cast<uint16_t>((nan ? v | 0x400000u : v + 0x7fffu + (v >> 16 & 1u)) >> 16);
    }
  });
  return y;
}

// Sums over the rows of (rows, dim), a band of columns to a thread
void column_sums(int64_t rows, int64_t dim, const float *x, float *sum) {
  parallel(dim, 128, [&](int64_t from, int64_t to) {
    std::memset(sum + from, 0, (to - from) * 4);
    for (int64_t i = 0; i < rows; i++) {
      const float *row = x + i * dim;
      SIMD(omp simd)
      for (int64_t j = from; j < to; j++) sum[j] += row[j];
    }
  });
}

void fill_rows(int64_t rows, int64_t dim, const float *bias, float *y) {
  parallel(rows, 64, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) std::memcpy(y + i * dim, bias, dim * 4);
  });
}

// --- functions of a number: comparisons keep NaN -------------------------------------------------------------------

inline float exponential(float x) {  // Cephes expf, relative error 2e-7
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = std::floor(x * 1.44269504f + 0.5f), f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * f + 1.3981999507e-3f, y = y * f + 8.3334519073e-3f, y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f, y = y * f + 5.0000001201e-1f, y = y * f * f + f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
}

inline float error_function(float x) {  // rational approximation of Eigen, absolute error 2e-7
  x = x < -4.0f ? -4.0f : x;
  x = x > 4.0f ? 4.0f : x;
  const float s = x * x;
  float p = -2.72614225801306e-10f, q = -1.45660718464996e-05f;
  p = p * s + 2.77068142495902e-08f, p = p * s - 2.10102402082508e-06f, p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f, p = p * s - 2.95459980854025e-03f, p = p * s - 1.60960333262415e-02f;
  q = q * s - 2.13374055278905e-04f, q = q * s - 1.68282697438203e-03f, q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

// --- small products inside attention -------------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int64_t WIDE = 16;  // floats in a register
#else
constexpr int64_t WIDE = 8;
#endif
constexpr int BANDS = WIDE == 16 ? 4 : 2;  // registers of a row of a tile: 6 rows fit in 32 or 16 registers
typedef float Vec __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

template <int R, int V>
inline __attribute__((always_inline)) void tile(int64_t k, float scale, const float *a, int64_t row, int64_t step,
                                                const float *b, int64_t ldb, float *c, int64_t ldc) {
  Vec sum[R][V] = {};
  for (int64_t p = 0; p < k; p++) {
    Vec right[V];
    for (int v = 0; v < V; v++) right[v] = *reinterpret_cast<const Vec *>(b + p * ldb + WIDE * v);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] += a[r * row + p * step] * right[v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) *reinterpret_cast<Vec *>(c + r * ldc + WIDE * v) = scale * sum[r][v];
}

template <int V>
int64_t band(int64_t j, int64_t m, int64_t n, int64_t k, float scale, const float *a, int64_t row, int64_t step,
             const float *b, int64_t ldb, float *c, int64_t ldc) {
  for (; j + V * WIDE <= n; j += V * WIDE) {
    int64_t i = 0;
    for (; i + 6 <= m; i += 6) tile<6, V>(k, scale, a + i * row, row, step, b + j, ldb, c + i * ldc + j, ldc);
    for (; i + 2 <= m; i += 2) tile<2, V>(k, scale, a + i * row, row, step, b + j, ldb, c + i * ldc + j, ldc);
    for (; i < m; i++) tile<1, V>(k, scale, a + i * row, row, step, b + j, ldb, c + i * ldc + j, ldc);
  }
  return j;
}

// C (m, n) = scale A B: A (m, k) by strides from row to row and from column to column; n is a multiple of WIDE
void small(int64_t m, int64_t n, int64_t k, float scale, const float *a, int64_t row, int64_t step, const float *b,
           int64_t ldb, float *c, int64_t ldc) {
  int64_t j = band<BANDS>(0, m, n, k, scale, a, row, step, b, ldb, c, ldc);
  j = band<2>(j, m, n, k, scale, a, row, step, b, ldb, c, ldc);
  band<1>(j, m, n, k, scale, a, row, step, b, ldb, c, ldc);
}

// x (rows, cols) by its row stride -> its transpose y (cols, wide), padded with zeros
void transpose(const float *x, int64_t ldx, int64_t rows, int64_t cols, float *y, int64_t wide) {
  for (int64_t i0 = 0; i0 < wide; i0 += 16)
    for (int64_t j = 0; j < cols; j++)
      for (int64_t i = i0; i < std::min(wide, i0 + 16); i++) y[j * wide + i] = i < rows ? x[i * ldx + j] : 0.0f;
}

// --- attention: qkv (outer, tokens, inner, 3, heads, dim) -----------------------------------------------------------
// Attention is among the tokens of each (outer, inner); a ViT has outer = images, a Swin outer = windows, inner = images.

struct Heads {
  int64_t outer, tokens, inner, heads, dim, width, line, out_line, padded, wide;
  bool biased;
  int64_t masks;  // windows with masks of their own
  Heads(const int64_t *s, int bias_rank, int mask_rank, const int64_t *mask)
      : outer(s[0]), tokens(s[1]), inner(s[2]), heads(s[4]), dim(s[5]), width(heads * dim), line(inner * 3 * width),
        out_line(inner * width), padded(rounded_up(tokens, WIDE)), wide(rounded_up(dim, WIDE)), biased(bias_rank == 3),
        masks(mask_rank == 3 ? mask[0] : 0) {}
  int64_t q(int64_t o, int64_t b, int64_t h) const { return (o * tokens * inner + b) * 3 * width + h * dim; }
  int64_t out(int64_t o, int64_t b, int64_t h) const { return (o * tokens * inner + b) * width + h * dim; }
  int64_t share(int64_t o, int64_t b, int64_t h) const { return ((o * inner + b) * heads + h) * tokens * tokens; }
  int64_t memory() const { return 3 * tokens * wide + dim * padded + tokens * padded; }

  // Rows of a head with whole registers: in place, or copied to `memory` and padded with zeros
  const float *rows(const float *x, int64_t &ld, float *memory) const {
    if (wide == dim) return x;
    for (int64_t i = 0; i < tokens; i++)
      for (int64_t j = 0; j < wide; j++) memory[i * wide + j] = j < dim ? x[i * ld + j] : 0.0f;
    ld = wide;
    return memory;
  }
  // y (tokens, dim) with row stride `ld` = scale A B, B from `rows`
  void mix(float scale, const float *a, int64_t row, int64_t step, const float *b, int64_t ldb, float *y, int64_t ld,
           float *memory) const {
    if (wide == dim) return small(tokens, wide, tokens, scale, a, row, step, b, ldb, y, ld);
    small(tokens, wide, tokens, scale, a, row, step, b, ldb, memory, wide);
    for (int64_t i = 0; i < tokens; i++) std::memcpy(y + i * ld, memory + i * wide, dim * 4);
  }
};

float square(const float *x, int64_t n) {
  float sum = 0;
  SIMD(omp simd reduction(+ : sum))
  for (int64_t j = 0; j < n; j++) sum += x[j] * x[j];
  return sum;
}

void add(int64_t n, const float *x, float *y) {
  SIMD(omp simd)
  for (int64_t j = 0; j < n; j++) y[j] += x[j];
}

void softmax(int64_t n, float *x) {
  float most = x[0], sum = 0;
  SIMD(omp simd reduction(max : most))
  for (int64_t j = 0; j < n; j++) most = x[j] > most ? x[j] : most;
  SIMD(omp simd reduction(+ : sum))
  for (int64_t j = 0; j < n; j++) x[j] = exponential(x[j] - most), sum += x[j];
  const float rate = 1.0f / sum;
  SIMD(omp simd)
  for (int64_t j = 0; j < n; j++) x[j] *= rate;
}

void layer_statistics(const float *x, int64_t dim, float eps, float &mean, float &rate) {
  float sum = 0, square = 0;
  SIMD(omp simd reduction(+ : sum))
  for (int64_t j = 0; j < dim; j++) sum += x[j];
  const float m = sum / dim;
  SIMD(omp simd reduction(+ : square))
  for (int64_t j = 0; j < dim; j++) square += (x[j] - m) * (x[j] - m);
  mean = m, rate = 1.0f / std::sqrt(square / dim + eps);
}

template <class T, class Convert>
void linear_of(int count, void **data, int64_t **shapes, Convert convert) {
  const int64_t m = shapes[0][0], n = shapes[1][0], k = shapes[1][1];
  const bool biased = count == 4;
  if (biased) fill_rows(m, n, IN(2), OUT(3));
  const auto x = convert(IN(0), m * k), w = convert(IN(1), n * k);
  product<T>('N', 'T', m, n, k, &x[0], &w[0], biased, OUT(count - 1));
}

template <class T, class Convert>
void linear_grad_of(int count, void **data, int64_t **shapes, Convert convert) {
  const int64_t m = shapes[0][0], n = shapes[1][0], k = shapes[1][1];
  const auto x = convert(IN(0), m * k), w = convert(IN(1), n * k), g = convert(IN(2), m * n);
  product<T>('N', 'N', m, k, n, &g[0], &w[0], 0, OUT(3));
  product<T>('T', 'N', n, k, m, &g[0], &x[0], 0, OUT(4));
  if (count == 6) column_sums(m, n, IN(2), OUT(5));
}

const float *as_it_is(const float *x, int64_t) { return x; }

}  // namespace

extern "C" void set_threads(int threads) {  // not while a kernel runs
  if (threads != Pool::get().threads) Pool::renew(threads);
}

// --- kernels ---------------------------------------------------------------------------------------------------------

KERNEL(linear) {  // x (rows, in), weight (out, in), bias (out,) or none -> (rows, out)
  linear_of<float>(count, data, shapes, as_it_is);
}

KERNEL(linear_grad) {  // x, weight, gradient (rows, out) -> of x, of weight, of bias if it is asked for
  linear_grad_of<float>(count, data, shapes, as_it_is);
}

KERNEL(linear_bfloat16) { linear_of<uint16_t>(count, data, shapes, bfloat16); }

KERNEL(linear_bfloat16_grad) { linear_grad_of<uint16_t>(count, data, shapes, bfloat16); }

KERNEL(gelu) {
  const float *x = IN(0);
  float *y = OUT(1);
  parallel(size(ranks[0], shapes[0]), 1 << 14, [&](int64_t from, int64_t to) {
    SIMD(omp simd)
    for (int64_t i = from; i < to; i++) y[i] = 0.5f * x[i] * (1.0f + error_function(x[i] * 0.70710678f));
  });
}

KERNEL(gelu_grad) {  // x, gradient -> of x
  const float *x = IN(0), *g = IN(1);
  float *y = OUT(2);
  parallel(size(ranks[0], shapes[0]), 1 << 14, [&](int64_t from, int64_t to) {
    SIMD(omp simd)
    for (int64_t i = from; i < to; i++) {
      const float phi = 0.5f * (1.0f + error_function(x[i] * 0.70710678f));
      y[i] = g[i] * (phi + x[i] * 0.39894228f * exponential(-0.5f * x[i] * x[i]));
    }
  });
}

KERNEL(layer_norm) {  // x (rows, dim), weight, bias, epsilon (1,) -> (rows, dim)
  const int64_t rows = shapes[0][0], dim = shapes[0][1];
  const float *x = IN(0), *weight = IN(1), *bias = IN(2), eps = *IN(3);
  float *y = OUT(4);
  parallel(rows, 32, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      const float *r = x + i * dim;
      float *o = y + i * dim, mean, rate;
      layer_statistics(r, dim, eps, mean, rate);
      SIMD(omp simd)
      for (int64_t j = 0; j < dim; j++) o[j] = (r[j] - mean) * rate * weight[j] + bias[j];
    }
  });
}

KERNEL(layer_norm_grad) {  // x, weight, epsilon, gradient -> of x, of weight, of bias
  const int64_t rows = shapes[0][0], dim = shapes[0][1];
  const float *x = IN(0), *weight = IN(1), eps = *IN(2), *g = IN(3);
  float *dx = OUT(4);
  const auto sums = sums_of<float>(rows, 256, 2 * dim, [&](int64_t from, int64_t to, float *w) {
    float *b = w + dim;
    for (int64_t i = from; i < to; i++) {
      const float *r = x + i * dim, *q = g + i * dim;
      float *o = dx + i * dim, mean, rate, inner = 0, slope = 0;
      layer_statistics(r, dim, eps, mean, rate);
      SIMD(omp simd reduction(+ : inner, slope))
      for (int64_t j = 0; j < dim; j++) {
        const float unit = (r[j] - mean) * rate, v = q[j] * weight[j];
        inner += v, slope += v * unit;
        w[j] += q[j] * unit, b[j] += q[j];
      }
      inner /= dim, slope /= dim;
      SIMD(omp simd)
      for (int64_t j = 0; j < dim; j++) o[j] = rate * (q[j] * weight[j] - inner - (r[j] - mean) * rate * slope);
    }
  });
  std::memcpy(OUT(5), sums.data(), dim * 4), std::memcpy(OUT(6), sums.data() + dim, dim * 4);
}

// qkv, bias (heads, tokens, tokens) or (1,), mask (windows, tokens, tokens) or (1,), scale (1,) -> mixed
// (outer, tokens, inner, heads, dim); if the gradient needs them, shares (outer, inner, heads, tokens, tokens)
KERNEL(attention) {
  const Heads s(shapes[0], ranks[1], ranks[2], shapes[2]);
  const int64_t n = s.tokens, np = s.padded;
  const float *qkv = IN(0), *bias = IN(1), *mask = IN(2), scale = *IN(3);
  float *out = OUT(4), *shares = count == 6 ? OUT(5) : nullptr;
  parallel(s.outer * s.inner * s.heads, n < 64 ? s.heads : 1, [&](int64_t from, int64_t to) {
    float *memory = scratch(s.memory()), *keys = memory + s.tokens * s.wide * 2, *scores = keys + s.dim * np;
    for (int64_t u = from; u < to; u++) {
      const int64_t h = u % s.heads, b = u / s.heads % s.inner, o = u / s.heads / s.inner;
      const float *q = qkv + s.q(o, b, h);
      int64_t ldv = s.line;
      transpose(q + s.width, s.line, n, s.dim, keys, np);
      small(n, np, s.dim, scale, q, s.line, 1, keys, np, scores, np);
      for (int64_t i = 0; i < n; i++) {
        if (s.biased) add(n, bias + (h * n + i) * n, scores + i * np);
        if (s.masks) add(n, mask + (o % s.masks * n + i) * n, scores + i * np);
        softmax(n, scores + i * np);
        if (shares) std::memcpy(shares + s.share(o, b, h) + i * n, scores + i * np, n * 4);
      }
      const float *v = s.rows(q + 2 * s.width, ldv, memory);
      s.mix(1, scores, np, 1, v, ldv, out + s.out(o, b, h), s.out_line, memory + n * s.wide);
    }
  });
}

KERNEL(attention_grad) {  // qkv, bias, mask, scale, shares, gradient of mixed -> of qkv, of bias
  const Heads s(shapes[0], ranks[1], ranks[2], shapes[2]);
  const int64_t n = s.tokens, np = s.padded, areas = s.outer * s.inner;
  const float *qkv = IN(0), *shares = IN(4), *grad = IN(5), scale = *IN(3);
  float *dqkv = OUT(6), *dbias = OUT(7);
  // a piece is some areas of one head: their gradients of the bias are added in order
  const int64_t parts = std::min<int64_t>(areas, s.biased ? std::max<int64_t>(1, 16 / s.heads) : areas);
  const int64_t each = (areas + parts - 1) / parts, pairs = s.biased ? n * n : 0;
  std::vector<float> added(s.heads * parts * pairs);
  Pool::get().run(s.heads * parts, [&](int64_t piece) {
    const int64_t h = piece % s.heads, part = piece / s.heads;
    float *memory = scratch(s.memory()), *second = memory + n * s.wide, *third = second + n * s.wide;
    float *values = third + n * s.wide, *d = values + s.dim * np, *sum = added.data() + piece * pairs;
    for (int64_t area = part * each; area < std::min(areas, (part + 1) * each); area++) {
      const int64_t o = area / s.inner, b = area % s.inner;
      const float *q = qkv + s.q(o, b, h), *g = grad + s.out(o, b, h), *share = shares + s.share(o, b, h);
      float *dq = dqkv + s.q(o, b, h);
      int64_t ldg = s.out_line, ldk = s.line, ldq = s.line;
      transpose(q + 2 * s.width, s.line, n, s.dim, values, np);
      small(n, np, s.dim, 1, g, s.out_line, 1, values, np, d, np);
      const float *wide_g = s.rows(g, ldg, memory);
      s.mix(1, share, 1, n, wide_g, ldg, dq + 2 * s.width, s.line, second);
      for (int64_t i = 0; i < n; i++) {
        const float *p = share + i * n;
        float *r = d + i * np, inner = 0;
        SIMD(omp simd reduction(+ : inner))
        for (int64_t j = 0; j < n; j++) inner += r[j] * p[j];
        SIMD(omp simd)
        for (int64_t j = 0; j < n; j++) r[j] = (r[j] - inner) * p[j];
        if (s.biased) add(n, r, sum + i * n);
      }
      const float *wide_k = s.rows(q + s.width, ldk, memory), *wide_q = s.rows(q, ldq, second);
      s.mix(scale, d, np, 1, wide_k, ldk, dq, s.line, third);
      s.mix(scale, d, 1, np, wide_q, ldq, dq + s.width, s.line, third);
    }
  });
  if (!s.biased) *dbias = 0;
  for (int64_t h = 0; s.biased && h < s.heads; h++) {
    std::memcpy(dbias + h * pairs, added.data() + h * pairs, pairs * 4);
    for (int64_t part = 1; part < parts; part++) add(pairs, added.data() + (part * s.heads + h) * pairs, dbias + h * pairs);
  }
}

KERNEL(cosine) {  // qkv (rows, 3, heads, dim), scale (heads,) -> q / |q| * scale, k / |k|, v (Swin V2)
  const int64_t rows = shapes[0][0], heads = shapes[0][2], dim = shapes[0][3];
  const float *qkv = IN(0), *scale = IN(1);
  float *y = OUT(2);
  parallel(rows, 64, [&](int64_t from, int64_t to) {
    for (int64_t u = from * 3 * heads; u < to * 3 * heads; u++) {
      const int64_t h = u % heads, part = u / heads % 3;
      const float *x = qkv + u * dim;
      const float factor = part == 2 ? 1.0f : (part == 0 ? scale[h] : 1.0f) / std::max(std::sqrt(square(x, dim)), 1e-12f);
      for (int64_t j = 0; j < dim; j++) y[u * dim + j] = factor * x[j];
    }
  });
}

KERNEL(cosine_grad) {  // qkv, scale, gradient -> of qkv, of scale
  const int64_t rows = shapes[0][0], heads = shapes[0][2], dim = shapes[0][3];
  const float *qkv = IN(0), *scale = IN(1), *grad = IN(2);
  float *dx = OUT(3);
  const auto sums = sums_of<float>(rows, 256, heads, [&](int64_t from, int64_t to, float *sum) {
    for (int64_t u = from * 3 * heads; u < to * 3 * heads; u++) {
      const int64_t h = u % heads, part = u / heads % 3;
      const float *x = qkv + u * dim, *g = grad + u * dim;
      const float length = std::sqrt(square(x, dim)), rate = 1.0f / std::max(length, 1e-12f);
      float inner = 0;
      SIMD(omp simd reduction(+ : inner))
      for (int64_t j = 0; j < dim; j++) inner += x[j] * g[j];
      if (part == 0) sum[h] += inner * rate;
      const float factor = part == 2 ? 1.0f : part == 0 ? scale[h] * rate : rate;
      const float back = part == 2 || length < 1e-12f ? 0.0f : inner * rate * rate;
      for (int64_t j = 0; j < dim; j++) dx[u * dim + j] = factor * (g[j] - back * x[j]);
    }
  });
  std::memcpy(OUT(4), sums.data(), heads * 4);
}

KERNEL(square_sum) {  // arrays of any shape -> the sum of all squares (1,)
  double all = 0;
  for (int i = 0; i + 1 < count; i++)
    all += sums_of<double>(size(ranks[i], shapes[i]), 1 << 16, 1, [x = IN(i)](int64_t from, int64_t to, double *sum) {
      *sum = square(x + from, to - from);
    })[0];
  *OUT(count - 1) = static_cast<float>(all);
}

KERNEL(accumulate) {  // sums of n parameters, their gradients -> 1; the gradients are added to the sums
  const int n = (count - 1) / 2;
  for (int i = 0; i < n; i++)
    parallel(size(ranks[i], shapes[i]), 1 << 16,
             [&](int64_t from, int64_t to) { add(to - from, IN(n + i) + from, OUT(i) + from); });
  *OUT(count - 1) = 1;
}

KERNEL(mean) {  // share (1,), sums of n parameters, their gradients -> share * (sum + gradient); the sums become 0
  const int n = (count - 1) / 3;
  for (int i = 1; i <= n; i++)
    parallel(size(ranks[i], shapes[i]), 1 << 16, [&, share = *IN(0), g = IN(n + i)](int64_t from, int64_t to) {
      float *sum = OUT(i), *mean = OUT(2 * n + i);
      SIMD(omp simd)
      for (int64_t j = from; j < to; j++) mean[j] = share * (sum[j] + g[j]), sum[j] = 0;
    });
}

// values (rates, decays of the groups, epsilon), betas (2,), group of each, factor on the gradients (1,), skip (1,), then
// n weights, n first and n second moments, which change unless skip is 1, and n gradients -> 1
KERNEL(adamw) {
  const float *values = IN(0), b1 = IN(1)[0], b2 = IN(1)[1], scale = *IN(3);
  const int32_t *group = static_cast<const int32_t *>(data[2]);
  const int64_t groups = (shapes[0][0] - 1) / 2, n = shapes[2][0];
  for (int64_t i = 5; *IN(4) == 0 && i < 5 + n; i++) {
    float *w = OUT(i), *m = OUT(n + i), *v = OUT(2 * n + i);
    const float *g = IN(3 * n + i), rate = values[group[i - 5]], decay = values[groups + group[i - 5]];
    parallel(size(ranks[i], shapes[i]), 1 << 16, [&, eps = values[2 * groups]](int64_t from, int64_t to) {
      SIMD(omp simd)
      for (int64_t j = from; j < to; j++) {
        const float d = scale * g[j];
        m[j] = b1 * m[j] + (1 - b1) * d;
        v[j] = b2 * v[j] + (1 - b2) * d * d;
        w[j] -= rate * (m[j] / (std::sqrt(v[j]) + eps) + decay * w[j]);
      }
    });
  }
  *OUT(count - 1) = 1;
}
