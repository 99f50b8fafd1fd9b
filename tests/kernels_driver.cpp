// Calls every kernel of src/operations/kernels.cpp over odd shapes, for compilers that find errors of memory: each
// array is a heap block of exactly its size. The products of oneDNN are plain loops. Prints the number of calls.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

using Shape = std::vector<int64_t>;
using Kernel = int(int, void **, int *, int64_t **, const char *, void *, void *);
#define NAMES(use)                                                                                                \
  use(linear_float32) use(linear_float32_grad) use(linear_bfloat16) use(linear_bfloat16_grad)                     \
  use(gelu_linear_float32) use(gelu_linear_float32_grad) use(gelu_linear_bfloat16) use(gelu_linear_bfloat16_grad) \
  use(norm_linear_float32) use(norm_linear_float32_grad) use(norm_linear_bfloat16) use(norm_linear_bfloat16_grad) \
  use(layer_norm) use(layer_norm_grad) use(attention) use(attention_grad) use(cosine) use(cosine_grad)            \
  use(square_sum) use(adamw)
#define DECLARE(name) Kernel name;
extern "C" {
NAMES(DECLARE)
void set_threads(int);
}

namespace {

template <class T, class Get>
int multiply(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha, const T *a, int64_t lda, const T *b,
             int64_t ldb, float beta, float *c, int64_t ldc, Get get) {
  const bool at = ta == 'T' || ta == 't', bt = tb == 'T' || tb == 't';
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float sum = 0;
      for (int64_t p = 0; p < k; p++) sum += get(a[at ? p * lda + i : i * lda + p]) * get(b[bt ? j * ldb + p : p * ldb + j]);
      c[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]);
    }
  return 0;
}

float number() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) * 2 - 1; }

std::atomic<int> calls{0};

// Call a kernel on arrays of these shapes: all are filled with numbers, except those given
struct Call {
  std::vector<Shape> shapes;
  std::vector<std::unique_ptr<float[]>> arrays;
  explicit Call(std::vector<Shape> all) : shapes(std::move(all)) {
    for (const Shape &shape : shapes) {
      int64_t size = 1;
      for (int64_t side : shape) size *= side;
      arrays.emplace_back(new float[size]);
      for (int64_t i = 0; i < size; i++) arrays.back()[i] = number();
    }
  }
  void operator()(Kernel kernel) {
    std::vector<void *> data;
    std::vector<int> ranks;
    std::vector<std::unique_ptr<int64_t[]>> sides;
    std::vector<int64_t *> table;
    for (size_t i = 0; i < shapes.size(); i++) {
      data.push_back(arrays[i].get()), ranks.push_back(static_cast<int>(shapes[i].size()));
      sides.emplace_back(new int64_t[shapes[i].size()]);
      std::copy(shapes[i].begin(), shapes[i].end(), sides.back().get());
      table.push_back(sides.back().get());
    }
    if (kernel(static_cast<int>(data.size()), data.data(), ranks.data(), table.data(), nullptr, nullptr, nullptr))
      std::abort();
    calls++;
  }
};

void products(Kernel forward, Kernel backward) {
  for (int64_t m : {1, 7, 50})
    for (int64_t n : {1, 3, 33})
      for (int64_t k : {1, 5, 40}) {
        Call({{m, k}, {n, k}, {n}, {m, n}})(forward);
        Call({{m, k}, {n, k}, {m, n}})(forward);
        Call({{m, k}, {n, k}, {n}, {m, n}, {m, n}})(forward);
        Call({{m, k}, {n, k}, {m, n}, {m, k}, {n, k}, {n}})(backward);
        Call({{m, k}, {n, k}, {m, n}, {m, k}, {n, k}})(backward);
      }
}

void normed(Kernel forward, Kernel backward) {
  for (int64_t m : {1, 50})
    for (int64_t n : {1, 33})
      for (int64_t k : {1, 5, 40}) {
        Call({{m, k}, {k}, {k}, {1}, {n, k}, {n}, {m, n}})(forward);
        Call({{m, k}, {k}, {k}, {1}, {n, k}, {m, n}})(forward);
        Call({{m, k}, {k}, {k}, {1}, {n, k}, {m, n}, {m, k}, {k}, {k}, {n, k}, {n}})(backward);
        Call({{m, k}, {k}, {k}, {1}, {n, k}, {m, n}, {m, k}, {k}, {k}, {n, k}})(backward);
      }
}

void rows() {
  for (int64_t m : {1, 7, 300})
    for (int64_t n : {1, 3, 65}) {
      Call({{m, n}, {n}, {n}, {1}, {m, n}})(layer_norm);
      Call({{m, n}, {n}, {n}, {1}, {m, n}, {m, n}, {n}, {n}})(layer_norm_grad);
      for (int64_t h : {1, 3}) {
        Call({{m, 3, h, n}, {h}, {m, 3, h, n}})(cosine);
        Call({{m, 3, h, n}, {h}, {m, 3, h, n}, {m, 3, h, n}, {h}})(cosine_grad);
      }
    }
}

void attentions() {
  for (int64_t tokens : {1, 2, 9, 16, 17, 49, 65})
    for (int64_t dim : {1, 8, 12, 16, 20, 64, 80})
      for (int turn = 0; turn < 4; turn++) {
        const int64_t outer = turn == 1 ? 1 : 4, inner = turn == 2 ? 3 : 1, heads = turn == 3 ? 1 : 3;
        const Shape qkv{outer, tokens, inner, 3, heads, dim}, mixed{outer, tokens, inner, heads, dim};
        const Shape shares{outer, inner, heads, tokens, tokens};
        const int64_t entries = 2 * tokens + 1;
        const Shape table = turn % 2 ? Shape{entries, heads} : Shape{1};
        const Shape index = turn % 2 ? Shape{tokens, tokens} : Shape{1};
        const Shape mask = turn < 2 ? Shape{outer, tokens, tokens} : Shape{1};
        const auto call = [&](std::vector<Shape> all, Kernel kernel) {
          Call made(std::move(all));
          int32_t *entry = reinterpret_cast<int32_t *>(made.arrays[2].get());
          for (int64_t i = 0; i < (turn % 2 ? tokens * tokens : 1); i++) entry[i] = static_cast<int32_t>(i * 7 % entries);
          made(kernel);
        };
        call({qkv, table, index, mask, {1}, mixed}, attention);
        call({qkv, table, index, mask, {1}, mixed, shares}, attention);
        call({qkv, table, index, mask, {1}, shares, mixed, qkv, table}, attention_grad);
      }
}

void updates() {
  const std::vector<Shape> parameters{{3, 5}, {1}, {}, {70000}, {1, 7, 1}};
  const auto times = [&](std::vector<Shape> first, int count, std::vector<Shape> last) {
    for (int i = 0; i < count; i++) first.insert(first.end(), parameters.begin(), parameters.end());
    first.insert(first.end(), last.begin(), last.end());
    return first;
  };
  Call(times({}, 1, {{1}}))(square_sum);
  Call({{}, {1}})(square_sum);
  for (float skip : {0.0f, 1.0f}) {
    const int64_t groups = 2, count = static_cast<int64_t>(parameters.size());
    Call call(times({{2 * groups + 1}, {2}, {count}, {1}, {1}}, 4, {{1}}));
    const int32_t group[] = {0, 1, 1, 0, 1};
    std::memcpy(call.arrays[2].get(), group, sizeof group);
    call.arrays[4][0] = skip;
    call(adamw);
  }
}

}  // namespace

extern "C" int dnnl_sgemm(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                          const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  return multiply(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, [](float x) { return x; });
}

extern "C" int dnnl_gemm_bf16bf16f32(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha, const uint16_t *a,
                                     int64_t lda, const uint16_t *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  return multiply(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, [](uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  });
}

int main() {
  for (int threads : {1, 3, 2}) {
    set_threads(threads);
    products(linear_float32, linear_float32_grad);
    products(linear_bfloat16, linear_bfloat16_grad);
    products(gelu_linear_float32, gelu_linear_float32_grad);
    products(gelu_linear_bfloat16, gelu_linear_bfloat16_grad);
    normed(norm_linear_float32, norm_linear_float32_grad);
    normed(norm_linear_bfloat16, norm_linear_bfloat16_grad);
    rows();
    attentions();
    updates();
  }
  std::thread other(rows);  // two callers take turns
  rows();
  other.join();
  std::printf("%d\n", calls.load());
}
