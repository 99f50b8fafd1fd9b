// Calls src/data/resample.cpp over odd shapes, for compilers that find errors of memory: each array is a heap block of
// exactly its size, and the pixels end with their last row. Prints the number of calls.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>

template <class T>
using Function = int64_t(const T *, const int64_t *, int64_t, char *, int64_t, T *);
extern "C" Function<uint8_t> resample_uint8;
extern "C" Function<float> resample_float32;

namespace {
int calls = 0;

template <class T>
void call(Function<T> function, int64_t rows, int64_t cols, int64_t channels, int64_t pitch, int64_t height,
          int64_t width, int64_t top, int64_t left, int64_t tall, int64_t wide) {
  const int64_t shape[] = {rows, cols, channels, pitch, height, width, top, left, tall, wide};
  const int64_t size = (rows - 1) * pitch + cols * channels;
  const std::unique_ptr<T[]> pixels(new T[size]), out(new T[tall * wide * channels]);
  for (int64_t i = 0; i < size; i++) pixels[i] = static_cast<T>(std::rand() % 256);
  for (int64_t cubic : {0, 1}) {
    const int64_t needed = function(pixels.get(), shape, cubic, nullptr, 0, out.get());
    const std::unique_ptr<char[]> memory(new char[needed]);
    if (function(pixels.get(), shape, cubic, memory.get(), needed - 1, out.get()) != needed) std::abort();
    if (function(pixels.get(), shape, cubic, memory.get(), needed, out.get()) != needed) std::abort();
    calls++;
  }
}

template <class T>
void shapes(Function<T> function) {
  for (int64_t rows : {1, 2, 17, 70})
    for (int64_t cols : {1, 3, 16, 65})
      for (int64_t channels : {1, 3, 5})
        for (int64_t height : {1, 5, 17, 130})
          for (int64_t width : {1, 4, 16, 67}) {
            call<T>(function, rows, cols, channels, cols * channels + 7, height, width, 0, 0, height, width);
            const int64_t top = height / 3, left = width / 2;
            call<T>(function, rows, cols, channels, cols * channels, height, width, top, left, (height - top + 1) / 2,
                    width - left);
          }
  call<T>(function, 3, 5000, 3, 15000, 2, 700, 0, 0, 2, 700);
  call<T>(function, 5000, 3, 3, 9, 700, 2, 0, 0, 700, 2);
  call<T>(function, 4, 3, 5000, 15000, 5, 2, 0, 0, 5, 2);
  call<T>(function, 3, 2, 3, 6, 100000, 100000, 99990, 50000, 10, 30);
}
}  // namespace

int main() {
  shapes<uint8_t>(resample_uint8);
  shapes<float>(resample_float32);
  std::printf("%d\n", calls);
}
