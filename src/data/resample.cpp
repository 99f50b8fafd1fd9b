// Pillow's resize with the numbers of its versions 9.1 to 12.3 (libImaging/Resample.c): first the width, then the height,
// and 8-bit pixels are rounded in between. Called by resample.py; no threads, no memory of its own.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {
using std::int64_t;
constexpr int BITS = 32 - 8 - 2;      // of the fraction of a weight for 8-bit pixels
constexpr int64_t COLUMNS = 1 << 12;  // values of a row that are transposed at once

#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

// How pixels of a type are summed
template <class T>
struct Kind;
template <>
struct Kind<uint8_t> {
  using Weight = int32_t;
  typedef int32_t Sums __attribute__((vector_size(REGISTER)));
  typedef uint8_t Group __attribute__((vector_size(16)));
  typedef uint8_t Places __attribute__((vector_size(16)));
  static constexpr Weight START = 1 << (BITS - 1);
  static Weight weight(double w) { return static_cast<Weight>((w < 0 ? -0.5 : 0.5) + w * (1 << BITS)); }
  static uint8_t pixel(Weight sum) { return static_cast<uint8_t>(std::clamp(sum >> BITS, 0, 255)); }
};
template <>
struct Kind<float> {
  using Weight = double;
  typedef double Sums __attribute__((vector_size(REGISTER)));
  typedef float Group __attribute__((vector_size(16)));
  typedef int32_t Places __attribute__((vector_size(16)));
  static constexpr Weight START = 0;
  static Weight weight(double w) { return w; }
  static float pixel(Weight sum) { return static_cast<float>(sum); }
};
template <class T>
constexpr int LANES = REGISTER / sizeof(typename Kind<T>::Weight);  // values of a register of sums
template <class T>
constexpr int GROUP = 16 / sizeof(T);  // rows and columns that are transposed at once
template <class T>
constexpr int TILE = 4 * LANES<T>;  // rows that the horizontal pass takes at once
static_assert(TILE<uint8_t> % GROUP<uint8_t> == 0 && TILE<float> % GROUP<float> == 0, "whole groups");

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Hands out parts of the caller's memory; without memory it only counts
struct Scratch {
  char *memory;
  int64_t used = 0;
  template <class T>
  T *take(int64_t count) {
    T *part = reinterpret_cast<T *>(memory + used);
    used += rounded_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

double bilinear(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}
double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  const double near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, far = (((x - 5) * x + 8) * x - 4) * a;
  return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

// The pixels and weights that make each pixel of a part of an axis (precompute_coeffs)
template <class T>
struct Axis {
  using Weight = typename Kind<T>::Weight;
  int64_t size, length, begin, count;  // pixels before and after, and the part of the latter
  bool changes;
  double scale, stretch, support;
  int64_t most;  // weights of a pixel
  int64_t *first, *taps;
  Weight *weights;
  double *exact;

  Axis(int64_t size, int64_t length, int64_t begin, int64_t count, bool cubic, Scratch &scratch)
      : size(size), length(length), begin(begin), count(count), changes(size != length) {
    scale = static_cast<double>(size) / static_cast<double>(length);
    stretch = std::max(scale, 1.0);
    support = (cubic ? 2.0 : 1.0) * stretch;
    most = changes ? std::min(static_cast<int64_t>(std::ceil(support)) * 2 + 1, size) : 0;
    first = scratch.take<int64_t>(changes ? count : 0);
    taps = scratch.take<int64_t>(changes ? count : 0);
    weights = scratch.take<Weight>(most * count);
    exact = scratch.take<double>(most);
  }

  template <class Filter>
  void fill(Filter filter) {
    for (int64_t i = 0; i < count && changes; i++) {
      const double center = (static_cast<double>(i + begin) + 0.5) * scale, rate = 1.0 / stretch;
      const int64_t low = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
      const int64_t number = std::min(static_cast<int64_t>(center + support + 0.5), size) - low;
      for (int64_t k = 0; k < number; k++) exact[k] = filter((static_cast<double>(k + low) - center + 0.5) * rate);
      double sum = 0;
      for (int64_t k = 0; k < number; k++) sum += exact[k];
      for (int64_t k = 0; k < number; k++)
        weights[i * most + k] = Kind<T>::weight(sum != 0.0 ? exact[k] / sum : exact[k]);
      first[i] = low, taps[i] = number;
    }
  }
  const Weight *of(int64_t i) const { return weights + i * most; }
  int64_t low() const { return changes ? first[0] : begin; }
  int64_t high() const { return changes ? first[count - 1] + taps[count - 1] : begin + count; }
};

// M registers of values: sums over `taps` rows that are `pitch` apart. Plain loops where types change, since GCC takes
// __builtin_convertvector to wider values apart.
template <class T, int M>
inline void sum_registers(T *out, const T *in, int64_t pitch, const typename Kind<T>::Weight *weights, int64_t taps) {
  using Sums = typename Kind<T>::Sums;
  typename Kind<T>::Weight values[M * LANES<T>];
  Sums sums[M];
  for (Sums &sum : sums) sum = Sums{} + Kind<T>::START;
  for (int64_t k = 0; k < taps; k++)
    for (int m = 0; m < M; m++) {
      const T *pixels = in + k * pitch + m * LANES<T>;
      for (int i = 0; i < LANES<T>; i++) values[i] = pixels[i];
      Sums terms;
      std::memcpy(&terms, values, sizeof terms);
      sums[m] += terms * weights[k];
    }
  std::memcpy(values, sums, sizeof sums);
  for (int i = 0; i < M * LANES<T>; i++) out[i] = Kind<T>::pixel(values[i]);
}

template <class T>
void sum_rows(T *out, const T *in, int64_t pitch, const typename Kind<T>::Weight *weights, int64_t taps,
              int64_t length) {
  constexpr int L = LANES<T>;
  int64_t i = 0;
  for (; i + 4 * L <= length; i += 4 * L) sum_registers<T, 4>(out + i, in + i, pitch, weights, taps);
  for (; i + L <= length; i += L) sum_registers<T, 1>(out + i, in + i, pitch, weights, taps);
  if (i == length) return;
  if (length >= L) {  // the last values once more, with those before them
    sum_registers<T, 1>(out + length - L, in + length - L, pitch, weights, taps);
    return;
  }
  for (; i < length; i++) {
    typename Kind<T>::Weight sum = Kind<T>::START;
    for (int64_t k = 0; k < taps; k++) sum += in[k * pitch + i] * weights[k];
    out[i] = Kind<T>::pixel(sum);
  }
}

// a[FROM], b[FROM], a[FROM + 1], b[FROM + 1], ...
template <int FROM, class T, int... I>
inline typename Kind<T>::Group interleaved(typename Kind<T>::Group a, typename Kind<T>::Group b,
                                           std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (FROM + I / 2 + I % 2 * GROUP<T>)...);
#else
  return __builtin_shuffle(a, b, typename Kind<T>::Places{(FROM + I / 2 + I % 2 * GROUP<T>)...});
#endif
}

// out[i * out_pitch + j] = in[j * in_pitch + i] for i < width and j < height. Whole groups are written; rows from
// `height` on repeat the last.
template <class T>
void transpose(const T *in, int64_t in_pitch, int64_t height, int64_t width, T *out, int64_t out_pitch) {
  constexpr int N = GROUP<T>;
  constexpr auto places = std::make_integer_sequence<int, N>();
  using Group = typename Kind<T>::Group;
  for (int64_t i = 0; i < width; i += N)
    for (int64_t j = 0; j < height; j += N) {
      Group group[N] = {}, next[N];
      const int64_t number = std::min<int64_t>(width - i, N);
      for (int n = 0; n < N; n++) {
        const T *row = in + std::min(j + n, height - 1) * in_pitch + i;
        if (number == N)
          std::memcpy(&group[n], row, sizeof(Group));
        else
          std::memcpy(&group[n], row, static_cast<size_t>(number) * sizeof(T));
      }
      for (int round = 1; round < N; round *= 2) {  // interleaving the halves log2(N) times
        for (int n = 0; n < N / 2; n++) {
          next[2 * n] = interleaved<0, T>(group[n], group[n + N / 2], places);
          next[2 * n + 1] = interleaved<N / 2, T>(group[n], group[n + N / 2], places);
        }
        std::copy(next, next + N, group);
      }
      for (int n = 0; n < N; n++) std::memcpy(out + (i + n) * out_pitch + j, &group[n], sizeof(Group));
    }
}

struct Shape {
  int64_t rows, cols, channels, pitch;  // of the pixels; pitch: values from row to row
  int64_t height, width;                // of the whole result
  int64_t top, left, tall, wide;        // the part that is returned
};

template <class T>
struct Resample {
  const Shape s;
  Scratch scratch;
  Axis<T> x, y;
  int64_t line;  // values of a row of `between`
  T *tile, *sums, *between;

  Resample(const Shape &shape, bool cubic, char *memory)
      : s(shape), scratch{memory}, x(s.cols, s.width, s.left, s.wide, cubic, scratch),
        y(s.rows, s.height, s.top, s.tall, cubic, scratch), line(rounded_up(s.wide * s.channels, GROUP<T>)) {
    const int64_t columns = std::min(std::max(COLUMNS / s.channels, x.most), s.cols);
    const int64_t rows = std::min(s.rows, y.changes ? most_rows() : s.tall);
    tile = scratch.template take<T>(x.changes ? rounded_up(columns * s.channels, GROUP<T>) * TILE<T> : 0);
    sums = scratch.template take<T>(x.changes ? line * TILE<T> : 0);
    between = scratch.template take<T>(x.changes ? line * rounded_up(rows, TILE<T>) : 0);
  }
  // A bound of the rows that the part is made from
  int64_t most_rows() const { return static_cast<int64_t>(static_cast<double>(s.tall) * y.scale) + y.most + 2; }

  // Rows `low` to `high` of the pixels to `between`
  void horizontal(const T *pixels, int64_t low, int64_t high) {
    const int64_t room = std::max(COLUMNS / s.channels, x.most);
    for (int64_t row = low; row < high; row += TILE<T>) {
      const int64_t height = std::min<int64_t>(high - row, TILE<T>);
      for (int64_t i = 0, end = 0; i < s.wide; i = end) {
        const int64_t start = x.first[i];
        while (end < s.wide && x.first[end] + x.taps[end] - start <= room) end++;
        const int64_t columns = x.first[end - 1] + x.taps[end - 1] - start;
        transpose(pixels + row * s.pitch + start * s.channels, s.pitch, height, columns * s.channels, tile, TILE<T>);
        for (int64_t j = i; j < end; j++)
          for (int64_t c = 0; c < s.channels; c++)
            sum_registers<T, 4>(sums + (j * s.channels + c) * TILE<T>,
                             tile + ((x.first[j] - start) * s.channels + c) * TILE<T>, s.channels * TILE<T>, x.of(j),
                             x.taps[j]);
      }
      transpose(sums, TILE<T>, s.wide * s.channels, TILE<T>, between + (row - low) * line, line);
    }
  }

  void run(const T *pixels, bool cubic, T *out) {
    cubic ? x.fill(bicubic) : x.fill(bilinear);
    cubic ? y.fill(bicubic) : y.fill(bilinear);
    const int64_t length = s.wide * s.channels, low = y.low();
    const T *rows = pixels + low * s.pitch + s.left * s.channels;
    if (x.changes) horizontal(pixels, low, y.high());
    if (x.changes) rows = between;
    const int64_t pitch = x.changes ? line : s.pitch;
    for (int64_t i = 0; i < s.tall; i++) {
      if (y.changes)
        sum_rows(out + i * length, rows + (y.first[i] - low) * pitch, pitch, y.of(i), y.taps[i], length);
      else
        std::memcpy(out + i * length, rows + i * pitch, static_cast<size_t>(length) * sizeof(T));
    }
  }
};

template <class T>
int64_t resample(const T *pixels, const int64_t *shape, int64_t cubic, char *memory, int64_t size, T *out) {
  Shape s;
  static_assert(sizeof s == 10 * sizeof(int64_t), "no gaps");
  std::memcpy(&s, shape, sizeof s);
  Resample<T> task(s, cubic != 0, memory);
  if (task.scratch.used <= size) task.run(pixels, cubic != 0, out);
  return task.scratch.used;
}
}  // namespace

// Resize pixels (rows, cols, channels) into `out` (tall, wide, channels). shape: as `Shape`. memory: `size` bytes at a
// multiple of 64. Returns the bytes that are needed; if there are fewer, nothing is done.
extern "C" int64_t resample_uint8(const uint8_t *pixels, const int64_t *shape, int64_t cubic, char *memory,
                                  int64_t size, uint8_t *out) {
  return resample(pixels, shape, cubic, memory, size, out);
}
extern "C" int64_t resample_float32(const float *pixels, const int64_t *shape, int64_t cubic, char *memory,
                                    int64_t size, float *out) {
  return resample(pixels, shape, cubic, memory, size, out);
}
