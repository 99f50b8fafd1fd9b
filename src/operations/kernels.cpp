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
#include <type_traits>
#include <vector>

#include <unistd.h>

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
  struct Turn : std::unique_lock<std::mutex> {  // to run a kernel
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
    std::unique_lock<std::mutex> lock(sleep_);
    work_ = &work, pieces_ = pieces, next_ = 0, busy_ = started_, round_++;
    lock.unlock();
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

void add(int64_t n, const float *x, float *y) {
  SIMD(omp simd) for (int64_t j = 0; j < n; j++) y[j] += x[j];
}

float sum_of(const float *x, int64_t n) {
  float sum = 0;
  SIMD(omp simd reduction(+ : sum)) for (int64_t j = 0; j < n; j++) sum += x[j];
  return sum;
}

float squares(const float *x, int64_t n, float centre = 0) {
  float sum = 0;
  SIMD(omp simd reduction(+ : sum)) for (int64_t j = 0; j < n; j++) sum += (x[j] - centre) * (x[j] - centre);
  return sum;
}

template <class T>
T *at_least(std::vector<T> &memory, int64_t count) {
  if (static_cast<int64_t>(memory.size()) < count) memory = std::vector<T>(count);
  return memory.data();
}

template <class T, class... Values>
void gemm(Values... values) {
  if constexpr (std::is_same_v<T, float>) dnnl_sgemm(values...);
  else dnnl_gemm_bf16bf16f32(values...);
}

// C (m, n) = op(A) op(B) + beta C; rows or columns of C are shared among the threads
template <class T>
void product(char ta, char tb, int64_t m, int64_t n, int64_t k, const T *a, const T *b, float beta, float *c) {
  const int64_t lda = ta == 'N' ? k : m, ldb = tb == 'N' ? n : k, side = std::max(m, n);
  const int threads = Pool::get().threads;
  parallel(side, rounded_up((side + threads - 1) / threads, 16), [&](int64_t from, int64_t to) {
    if (m >= n)
      gemm<T>(ta, tb, to - from, n, k, 1.0f, a + from * (ta == 'N' ? lda : 1), lda, b, ldb, beta, c + from * n, n);
    else
      gemm<T>(ta, tb, m, to - from, k, 1.0f, a, lda, b + from * (tb == 'N' ? 1 : ldb), ldb, beta, c + from, n);
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
      y[i] = static_cast<uint16_t>(((v & 0x7fffffffu) > 0x7f800000u ? v | 0x400000u : v + 0x7fffu + (v >> 16 & 1u)) >> 16);
    }
  });
  return y;
}

// Comparisons keep NaN.
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

// GELU of n values x; multiplies `gradient`, if there is one, by the slopes
const float *gelu(int64_t n, const float *x, float *gradient) {
  static std::vector<float> kept;
  float *y = at_least(kept, n);
  parallel(n, 1 << 14, [&](int64_t from, int64_t to) {
    SIMD(omp simd) for (int64_t i = from; i < to; i++) {
      const float share = 0.5f * (1.0f + error_function(x[i] * 0.70710678f));
      y[i] = x[i] * share;
      if (gradient) gradient[i] *= share + x[i] * 0.39894228f * exponential(-0.5f * x[i] * x[i]);
    }
  });
  return y;
}

#ifdef __AVX512F__
constexpr int64_t WIDE = 16;  // floats in a register
#else
constexpr int64_t WIDE = 8;
#endif
constexpr int BANDS = WIDE == 16 ? 4 : 2;  // registers of a row of a tile: 6 rows fit in 32 or 16 registers
typedef float Vec __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

thread_local std::vector<float> scratch;

struct Matrix {  // by the strides from row to row and from column to column
  const float *data;
  int64_t row, step;
};

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
// images, a Swin outer = windows and inner = images. Bias (heads, tokens, tokens) and mask (windows, tokens, tokens) or
// (1,) for none.
struct Heads {
  int64_t outer, tokens, inner, heads, dim, width, line, out_line, padded, wide, masks;
  bool biased;
  Heads(int64_t **shapes, const int *ranks) {
    const int64_t *s = shapes[0];
    outer = s[0], tokens = s[1], inner = s[2], heads = s[4], dim = s[5], width = heads * dim;
    line = inner * 3 * width, out_line = inner * width, padded = rounded_up(tokens, WIDE), wide = rounded_up(dim, WIDE);
    biased = ranks[1] == 3, masks = ranks[2] == 3 ? shapes[2][0] : 0;
  }
  int64_t q(int64_t o, int64_t b, int64_t h) const { return (o * tokens * inner + b) * 3 * width + h * dim; }
  int64_t out(int64_t o, int64_t b, int64_t h) const { return (o * tokens * inner + b) * width + h * dim; }
  int64_t share(int64_t o, int64_t b, int64_t h) const { return ((o * inner + b) * heads + h) * tokens * tokens; }
  int64_t values() const { return 3 * tokens * wide + dim * padded + tokens * padded; }  // of the memory of a head

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

// x (rows, in), weight (out, in), bias (out,) or none -> (rows, out); of GELU(x) if `activated`
template <class T>
void linear(int count, void **data, int64_t **shapes, bool activated) {
  const int64_t m = shapes[0][0], n = shapes[1][0], k = shapes[1][1];
  const float *x = IN(0);
  float *y = OUT(count - 1);
  if (activated) x = gelu(m * k, x, nullptr);
  if (count == 4)
    parallel(m, 64, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i++) std::memcpy(y + i * n, data[2], n * 4);
    });
  product('N', 'T', m, n, k, operand<0, T>(x, m * k), operand<1, T>(IN(1), n * k), count == 4, y);
}

// x, weight, gradient (rows, out) -> of x, of weight, of bias if it is asked for
template <class T>
void linear_grad(int count, void **data, int64_t **shapes, bool activated) {
  const int64_t m = shapes[0][0], n = shapes[1][0], k = shapes[1][1];
  const float *x = IN(0);
  float *dx = OUT(3);
  const T *g = operand<0, T>(IN(2), m * n);
  product('N', 'N', m, k, n, g, operand<1, T>(IN(1), n * k), 0, dx);
  if (activated) x = gelu(m * k, x, dx);
  product('T', 'N', n, k, m, g, operand<1, T>(x, m * k), 0, OUT(4));
  if (count != 6) return;
  float *db = OUT(5);
  parallel(n, 128, [&](int64_t from, int64_t to) {
    std::memset(db + from, 0, (to - from) * 4);
    for (int64_t i = 0; i < m; i++) add(to - from, IN(2) + i * n + from, db + from);
  });
}

}  // namespace

extern "C" void set_threads(int threads) {  // not while a kernel runs
  if (threads != Pool::get().threads) Pool::renew(threads);
}

#define LINEAR(name, type, activated)                               \
  KERNEL(name) { linear<type>(count, data, shapes, activated); }    \
  KERNEL(name##_grad) { linear_grad<type>(count, data, shapes, activated); }
LINEAR(linear_float32, float, false)
LINEAR(linear_bfloat16, uint16_t, false)
LINEAR(gelu_linear_float32, float, true)
LINEAR(gelu_linear_bfloat16, uint16_t, true)

KERNEL(layer_norm) {  // x (rows, dim), weight, bias, epsilon (1,) -> (rows, dim)
  const int64_t rows = shapes[0][0], dim = shapes[0][1];
  const float *x = IN(0), *weight = IN(1), *bias = IN(2), eps = *IN(3);
  float *y = OUT(4);
  parallel(rows, 32, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      const float *r = x + i * dim;
      float *o = y + i * dim;
      const float mean = sum_of(r, dim) / dim, rate = 1 / std::sqrt(squares(r, dim, mean) / dim + eps);
      SIMD(omp simd) for (int64_t j = 0; j < dim; j++) o[j] = (r[j] - mean) * rate * weight[j] + bias[j];
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
      float *o = dx + i * dim, inner = 0, slope = 0;
      const float mean = sum_of(r, dim) / dim, rate = 1 / std::sqrt(squares(r, dim, mean) / dim + eps);
      SIMD(omp simd reduction(+ : inner, slope)) for (int64_t j = 0; j < dim; j++) {
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

// qkv, bias, mask, scale (1,) -> mixed (outer, tokens, inner, heads, dim); for the gradient also shares (outer, inner,
// heads, tokens, tokens)
KERNEL(attention) {
  const Heads s(shapes, ranks);
  const int64_t n = s.tokens, np = s.padded;
  const float *qkv = IN(0), *bias = IN(1), *mask = IN(2), scale = *IN(3);
  float *out = OUT(4), *shares = count == 6 ? OUT(5) : nullptr;
  parallel(s.outer * s.inner * s.heads, n < 64 ? s.heads : 1, [&](int64_t from, int64_t to) {
    float *padded = at_least(scratch, s.values()), *keys = padded + 2 * n * s.wide, *scores = keys + s.dim * np;
    for (int64_t u = from; u < to; u++) {
      const int64_t h = u % s.heads, b = u / s.heads % s.inner, o = u / s.heads / s.inner;
      const float *q = qkv + s.q(o, b, h);
      transpose(q + s.width, s.line, n, s.dim, keys, np);
      small(n, np, s.dim, scale, {q, s.line, 1}, keys, np, scores, np);
      for (int64_t i = 0; i < n; i++) {
        if (s.biased) add(n, bias + (h * n + i) * n, scores + i * np);
        if (s.masks) add(n, mask + (o % s.masks * n + i) * n, scores + i * np);
        softmax(n, scores + i * np);
        if (shares) std::memcpy(shares + s.share(o, b, h) + i * n, scores + i * np, n * 4);
      }
      s.mix(1, {scores, np, 1}, q + 2 * s.width, s.line, out + s.out(o, b, h), s.out_line, padded);
    }
  });
}

KERNEL(attention_grad) {  // qkv, bias, mask, scale, shares, gradient of mixed -> of qkv, of bias
  const Heads s(shapes, ranks);
  const int64_t n = s.tokens, np = s.padded, areas = s.outer * s.inner;
  const float *qkv = IN(0), *shares = IN(4), *grad = IN(5), scale = *IN(3);
  float *dqkv = OUT(6), *dbias = OUT(7);
  // a piece is some areas of one head; their gradients of the bias are added in the same order by any number of threads
  const int64_t parts = std::min<int64_t>(areas, s.biased ? std::max<int64_t>(1, 16 / s.heads) : areas);
  const int64_t each = (areas + parts - 1) / parts, pairs = s.biased ? n * n : 0;
  std::vector<float> added(s.heads * parts * pairs);
  Pool::get().run(s.heads * parts, [&](int64_t piece) {
    const int64_t h = piece % s.heads, part = piece / s.heads;
    float *padded = at_least(scratch, s.values()), *values = padded + 2 * n * s.wide, *d = values + s.dim * np;
    for (int64_t area = part * each; area < std::min(areas, (part + 1) * each); area++) {
      const int64_t o = area / s.inner, b = area % s.inner;
      const float *q = qkv + s.q(o, b, h), *g = grad + s.out(o, b, h), *share = shares + s.share(o, b, h);
      float *dq = dqkv + s.q(o, b, h);
      transpose(q + 2 * s.width, s.line, n, s.dim, values, np);
      small(n, np, s.dim, 1, {g, s.out_line, 1}, values, np, d, np);
      s.mix(1, {share, 1, n}, g, s.out_line, dq + 2 * s.width, s.line, padded);
      for (int64_t i = 0; i < n; i++) {
        const float *p = share + i * n;
        float *r = d + i * np, inner = 0;
        SIMD(omp simd reduction(+ : inner)) for (int64_t j = 0; j < n; j++) inner += r[j] * p[j];
        SIMD(omp simd) for (int64_t j = 0; j < n; j++) r[j] = (r[j] - inner) * p[j];
        if (s.biased) add(n, r, added.data() + piece * pairs + i * n);
      }
      s.mix(scale, {d, np, 1}, q + s.width, s.line, dq, s.line, padded);
      s.mix(scale, {d, 1, np}, q, s.line, dq + s.width, s.line, padded);
    }
  });
  std::memset(dbias, 0, size(ranks[1], shapes[1]) * 4);
  for (int64_t part = 0; s.biased && part < parts; part++)
    add(s.heads * pairs, added.data() + part * s.heads * pairs, dbias);
}

// qkv (rows, 3, heads, dim), factor (heads,) -> q / |q| * factor, k / |k|, v (Swin V2); or with the gradient of that, the
// gradients of qkv and factor
void cosine_of(void **data, int64_t **shapes, const float *grad, float *y, float *dfactor) {
  const int64_t rows = shapes[0][0], heads = shapes[0][2], dim = shapes[0][3];
  const auto sums = sums_of<float>(rows, 256, heads, [&](int64_t from, int64_t to, float *sum) {
    for (int64_t u = from * 3 * heads; u < to * 3 * heads; u++) {
      const int64_t h = u % heads, part = u / heads % 3;
      const float *x = IN(0) + u * dim, *g = grad ? grad + u * dim : x, length = std::sqrt(squares(x, dim));
      const float rate = part == 2 ? 1 : 1 / std::max(length, 1e-12f), factor = part == 0 ? IN(1)[h] * rate : rate;
      float inner = 0;
      if (grad) {
        SIMD(omp simd reduction(+ : inner)) for (int64_t j = 0; j < dim; j++) inner += x[j] * g[j];
        if (part == 0) sum[h] += inner * rate;
        inner = part == 2 || length < 1e-12f ? 0 : inner * rate * rate;
      }
      for (int64_t j = 0; j < dim; j++) y[u * dim + j] = factor * (g[j] - inner * x[j]);
    }
  });
  if (grad) std::memcpy(dfactor, sums.data(), heads * 4);
}

KERNEL(cosine) { cosine_of(data, shapes, nullptr, OUT(2), nullptr); }

KERNEL(cosine_grad) { cosine_of(data, shapes, IN(2), OUT(3), OUT(4)); }  // qkv, factor, gradient -> of qkv, of factor

KERNEL(square_sum) {  // arrays of any shape -> the sum of all squares (1,)
  double all = 0;
  for (int i = 0; i + 1 < count; i++)
    all += sums_of<double>(size(ranks[i], shapes[i]), 1 << 16, 1, [x = IN(i)](int64_t from, int64_t to, double *sum) {
      *sum = squares(x + from, to - from);
    })[0];
  *OUT(count - 1) = static_cast<float>(all);
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
      SIMD(omp simd) for (int64_t j = from; j < to; j++) {
        const float d = scale * g[j];
        m[j] = b1 * m[j] + (1 - b1) * d;
        v[j] = b2 * v[j] + (1 - b2) * d * d;
        w[j] -= rate * (m[j] / (std::sqrt(v[j]) + eps) + decay * w[j]);
      }
    });
  }
  *OUT(count - 1) = 1;
}
