// Pillow's affine transform with the bicubic filter, bit for bit (libImaging/Geometry.c), for (rows, cols, 3) of 8 bits.
// Called by affine.py; no threads, no memory of its own.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {
using std::int64_t;
constexpr int64_t BORDER = 2;  // pixels around the image, which repeat its edge
constexpr int CHANNELS = 3;

// The image with its border, a pixel in the lowest three bytes of each number
struct Padded {
  const uint32_t *pixels;
  int64_t pitch;
};

// Where the pixels of an output row come from
struct Places {
  double *x, *y;   // columns and rows of the image, and then the distances beyond the second of four neighbours
  int32_t *first;  // the first of 4 x 4 neighbours in the padded image
};

int64_t rounded_up(int64_t n) { return (n + 63) / 64 * 64; }

// The value at a distance t beyond the second of four neighbours
template <class T>
inline double cubic(T a, T b, T c, T d, double t) {
  const double p1 = b, p2 = -a + c, p3 = 2 * (a - b) + c - d, p4 = -a + b - c + d;
  return p1 + t * (p2 + t * (p3 + t * p4));
}

inline int32_t channel(uint32_t pixel, int number) { return static_cast<int32_t>(pixel >> (8 * number) & 255); }

inline uint32_t byte(double value) {
  return static_cast<uint32_t>(static_cast<int32_t>(std::min(std::max(value, 0.0), 255.0)));
}

// The cubic through four pixels, each `step` after the one before; without rounding
void lines(const Padded &image, const int32_t *first, const double *t, int64_t offset, int64_t step, int64_t count,
           double *__restrict sums) {
  const uint32_t *a = image.pixels + offset, *b = a + step, *c = b + step, *d = c + step;
  double *red = sums, *green = sums + count, *blue = sums + 2 * count;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; i++) {
    const uint32_t pa = a[first[i]], pb = b[first[i]], pc = c[first[i]], pd = d[first[i]];
    red[i] = cubic(channel(pa, 0), channel(pb, 0), channel(pc, 0), channel(pd, 0), t[i]);
    green[i] = cubic(channel(pa, 1), channel(pb, 1), channel(pc, 1), channel(pd, 1), t[i]);
    blue[i] = cubic(channel(pa, 2), channel(pb, 2), channel(pc, 2), channel(pd, 2), t[i]);
  }
}

// The cubic through four lines
void across(double *__restrict sums, const double *t, int64_t count) {
  for (int number = 0; number < CHANNELS; number++) {
    double *a = sums + number * count, *b = a + CHANNELS * count, *c = b + CHANNELS * count, *d = c + CHANNELS * count;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) a[i] = cubic(a[i], b[i], c[i], d[i], t[i]);
  }
}

void pad(const uint8_t *in, int64_t rows, int64_t cols, int64_t pitch, uint32_t *out, int64_t out_pitch) {
  for (int64_t row = 0; row < rows; row++) {
    const uint8_t *line = in + row * pitch;
    uint32_t *to = out + (row + BORDER) * out_pitch;
    for (int64_t i = 0; i < cols; i++)
      to[i + BORDER] = static_cast<uint32_t>(line[3 * i] | line[3 * i + 1] << 8 | line[3 * i + 2] << 16);
    std::fill_n(to, BORDER, to[BORDER]);
    std::fill_n(to + BORDER + cols, BORDER, to[BORDER + cols - 1]);
  }
  for (int64_t row = 0; row < BORDER; row++) {
    std::copy_n(out + BORDER * out_pitch, out_pitch, out + row * out_pitch);
    std::copy_n(out + (BORDER + rows - 1) * out_pitch, out_pitch, out + (BORDER + rows + row) * out_pitch);
  }
}
}  // namespace

// shape: rows, columns and values from one row to the next; matrix: output to input as in Pillow; fill: of pixels from
// outside. Returns the bytes of memory that it needs; does nothing else with less.
extern "C" int64_t affine_bicubic(const uint8_t *in, const int64_t *shape, const double *matrix, const uint8_t *fill,
                                  char *memory, int64_t size, uint8_t *out) {
  const int64_t rows = shape[0], cols = shape[1], pitch = cols + 2 * BORDER;
  const int64_t image_bytes = rounded_up((rows + 2 * BORDER) * pitch * 4), line = rounded_up(cols * 8);
  const int64_t needed = image_bytes + line * (3 + 4 * CHANNELS);
  if (size < needed) return needed;
  uint32_t *pixels = reinterpret_cast<uint32_t *>(memory);
  pad(in, rows, cols, shape[2], pixels, pitch);
  const Padded image{pixels, pitch};
  char *buffers = memory + image_bytes;
  const Places places{reinterpret_cast<double *>(buffers), reinterpret_cast<double *>(buffers + line),
                      reinterpret_cast<int32_t *>(buffers + 2 * line)};
  double *sums = reinterpret_cast<double *>(buffers + 3 * line);
  const double wide = static_cast<double>(cols), tall = static_cast<double>(rows);

  for (int64_t row = 0; row < rows; row++, out += CHANNELS * cols) {
    const double v = static_cast<double>(row) + 0.5;
    for (int64_t i = 0; i < cols; i++) {
      const double u = static_cast<double>(i) + 0.5;
      places.x[i] = matrix[0] * u + matrix[1] * v + matrix[2];
      places.y[i] = matrix[3] * u + matrix[4] * v + matrix[5];
    }
    const auto inside = [&](int64_t i) {
      return places.x[i] >= 0.0 && places.x[i] < wide && places.y[i] >= 0.0 && places.y[i] < tall;
    };
    int64_t low = 0, high = cols;  // the columns whose pixels come from inside the image
    while (low < high && !inside(low)) low++;
    while (low < high && !inside(high - 1)) high--;
    const int64_t count = high - low;
    double *x = places.x + low, *y = places.y + low;
    int64_t off_x = 0, off_y = 0;  // pixels between two columns, and between two rows
    for (int64_t i = 0; i < count; i++) {
      const double left = std::floor(x[i] - 0.5), top = std::floor(y[i] - 0.5);
      x[i] = x[i] - 0.5 - left;
      y[i] = y[i] - 0.5 - top;
      off_x += x[i] != 0.0;
      off_y += y[i] != 0.0;
      places.first[i] = static_cast<int32_t>(top) * static_cast<int32_t>(pitch) + static_cast<int32_t>(left);
    }
    // neighbours are from 1 before to 2 after; at a distance of 0 the cubic is its second neighbour
    const int64_t before = BORDER - 1, origin = before * pitch + before;
    if (off_y == 0)
      lines(image, places.first, x, origin + pitch, 1, count, sums);
    else if (off_x == 0)
      lines(image, places.first, y, origin + 1, pitch, count, sums);
    else {
      for (int64_t k = 0; k < 4; k++)
        lines(image, places.first, x, origin + k * pitch, 1, count, sums + k * CHANNELS * count);
      across(sums, y, count);
    }
    const double *red = sums, *green = sums + count, *blue = sums + 2 * count;
    for (int64_t i = 0; i < low; i++)
      for (int number = 0; number < CHANNELS; number++) out[CHANNELS * i + number] = fill[number];
    uint32_t *packed = reinterpret_cast<uint32_t *>(places.first);
    for (int64_t i = 0; i < count; i++) packed[i] = byte(red[i]) | byte(green[i]) << 8 | byte(blue[i]) << 16;
    for (int64_t i = 0; i < count; i++) {
      uint8_t *pixel = out + CHANNELS * (low + i);
      pixel[0] = static_cast<uint8_t>(packed[i]);
      pixel[1] = static_cast<uint8_t>(packed[i] >> 8);
      pixel[2] = static_cast<uint8_t>(packed[i] >> 16);
    }
    for (int64_t i = high; i < cols; i++)
      for (int number = 0; number < CHANNELS; number++) out[CHANNELS * i + number] = fill[number];
  }
  return needed;
}
