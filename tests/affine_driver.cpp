// Calls src/data/affine.cpp over odd shapes and matrices, for compilers that find errors of memory: each array is a heap
// block of exactly its size, and the pixels end with their last row. Prints the number of calls.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <memory>

extern "C" int64_t affine_bicubic(const uint8_t *, const int64_t *, const double *, const uint8_t *, char *, int64_t,
                                  uint8_t *);

namespace {
int calls = 0;

void call(int64_t rows, int64_t cols, int64_t pitch, const double *matrix) {
  const int64_t shape[] = {rows, cols, pitch}, size = (rows - 1) * pitch + cols * 3;
  const uint8_t fill[] = {1, 2, 3};
  const std::unique_ptr<uint8_t[]> pixels(new uint8_t[size]), out(new uint8_t[rows * cols * 3]);
  for (int64_t i = 0; i < size; i++) pixels[i] = static_cast<uint8_t>(std::rand());
  const int64_t needed = affine_bicubic(pixels.get(), shape, matrix, fill, nullptr, 0, out.get());
  const std::unique_ptr<char[]> memory(new char[needed]);
  for (int64_t given : {needed - 1, needed})
    if (affine_bicubic(pixels.get(), shape, matrix, fill, memory.get(), given, out.get()) != needed) std::abort();
  calls++;
}
}  // namespace

int main() {
  for (int64_t rows : {1, 2, 3, 17, 40})
    for (int64_t cols : {1, 2, 16, 31, 65})
      for (int64_t more : {0, 7})
        for (double amount : {-1e300, -50.0, -1.0, -0.3, -1e-9, 0.0, 0.25, 0.5, 1.0, 7.5, 1e9, std::nan(""),
                              std::numeric_limits<double>::infinity()}) {
          const double matrices[][6] = {{1, amount, 0, 0, 1, 0},      {1, 0, 0, amount, 1, 0},
                                        {1, 0, amount, 0, 1, 0},      {1, 0, 0, 0, 1, amount},
                                        {0.9, amount, 3, -0.2, 1, 1}, {amount, 0, 0, 0, amount, 0}};
          for (const double *matrix : matrices) call(rows, cols, cols * 3 + more, matrix);
        }
  std::printf("%d\n", calls);
}
