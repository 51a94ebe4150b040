// The two matrix products of attention on fp32 tiles, in registers.
#pragma once

#include "simd.h"
#include "tile_reader.h"

namespace fork_attn::cpu {
namespace {

// Rows of the right-hand matrix: at a fixed distance, or each at its own address.
struct StridedRows {
  const float* base;
  int64_t stride;
  FORK_ATTN_INLINE const float* row(int k) const { return base + k * stride; }
};

template <class T>
struct ScatteredRows {
  const void* const* rows;
  FORK_ATTN_INLINE const T* row(int k) const { return static_cast<const T*>(rows[k]); }
};

// Rows that the next tile needs: pages lie anywhere, so the processor cannot guess them. They are
// asked for a few lines at a time, beside the arithmetic: asked for at once, lines only wait for
// each other, and memory rests while the arithmetic goes on.
class NextRows {
 public:
  // `times`: how often `ask` will be called.
  NextRows(const void* const* rows, int count, std::size_t bytes, int times)
      : rows_(rows),
        lines_in_row_(static_cast<int>((bytes + kLine - 1) / kLine)),
        left_(count * lines_in_row_),
        share_(times > 0 ? (left_ + times - 1) / times : 0) {}

  FORK_ATTN_INLINE void ask() {
    for (int i = 0; i < share_ && left_ > 0; ++i, --left_) {
      __builtin_prefetch(static_cast<const char*>(rows_[row_]) + line_ * kLine, 0, 2);
      if (++line_ == lines_in_row_) {
        line_ = 0;
        ++row_;
      }
    }
  }

 private:
  static constexpr int kLine = 64;
  const void* const* rows_;
  int lines_in_row_, left_, share_;
  int row_ = 0, line_ = 0;
};

// A right-hand matrix that asks for a share of the next tile with each of its rows.
template <class Rows>
struct AskingRows {
  Rows rows;
  NextRows* next;
  FORK_ATTN_INLINE auto row(int k) const {
    next->ask();
    return rows.row(k);
  }
};

// With 32 vector registers 6 x 4 accumulators fit, with 16 registers 6 x 2.
constexpr int kBlockRows = 6;
#if defined(__aarch64__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = kLanes == 16 ? 4 : 2;
#endif

// c = a b, or c = c * decay[row] + a b where decay is given, for kRows rows and kVectors vectors of
// columns. The product is summed up on its own first: long contexts then lose less to rounding.
template <int kRows, int kVectors, class Rows>
void multiply_block(const float* a, int64_t a_stride, Rows b, int column, int depth, float* c,
                    int64_t c_stride, const float* decay) {
  VecF sum[kRows][kVectors] = {};
  for (int k = 0; k < depth; ++k) {
    const auto* row = b.row(k) + column;
    VecF right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = load_as_float(row + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const VecF left = broadcast(a[i * a_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* p = c + i * c_stride + column + v * kLanes;
      store(p, decay == nullptr ? sum[i][v] : load(p) * decay[i] + sum[i][v]);
    }
  }
}

template <int kVectors, class Rows>
void multiply_columns(const float* a, int64_t a_stride, int num_rows, Rows b, int column, int depth,
                      float* c, int64_t c_stride, const float* decay) {
  for (int i = 0; i < num_rows; i += kBlockRows) {
    const float* ai = a + i * a_stride;
    float* ci = c + i * c_stride;
    const float* di = decay == nullptr ? nullptr : decay + i;
    switch (num_rows - i) {
      case 1:
        multiply_block<1, kVectors>(ai, a_stride, b, column, depth, ci, c_stride, di);
        break;
      case 2:
        multiply_block<2, kVectors>(ai, a_stride, b, column, depth, ci, c_stride, di);
        break;
      case 3:
        multiply_block<3, kVectors>(ai, a_stride, b, column, depth, ci, c_stride, di);
        break;
      case 4:
        multiply_block<4, kVectors>(ai, a_stride, b, column, depth, ci, c_stride, di);
        break;
      case 5:
        multiply_block<5, kVectors>(ai, a_stride, b, column, depth, ci, c_stride, di);
        break;
      default:
        multiply_block<kBlockRows, kVectors>(ai, a_stride, b, column, depth, ci, c_stride, di);
    }
  }
}

// How often `multiply` below takes a row of b.
inline int rows_taken(int num_rows, int depth, int num_vectors) {
  const int rest = num_vectors % kBlockVectors;
  const int columns = num_vectors / kBlockVectors + rest / 2 + rest % 2;
  return (num_rows + kBlockRows - 1) / kBlockRows * columns * depth;
}

// c (num_rows x num_vectors * kLanes) = a (num_rows x depth) times b, or c * decay[row] + that
// product.
template <class Rows>
void multiply(const float* a, int64_t a_stride, int num_rows, Rows b, int depth, int num_vectors,
              float* c, int64_t c_stride, const float* decay) {
  int v = 0;
  for (; v + kBlockVectors <= num_vectors; v += kBlockVectors) {
    multiply_columns<kBlockVectors>(a, a_stride, num_rows, b, v * kLanes, depth, c, c_stride,
                                    decay);
  }
  for (; v + 2 <= num_vectors; v += 2) {
    multiply_columns<2>(a, a_stride, num_rows, b, v * kLanes, depth, c, c_stride, decay);
  }
  if (v < num_vectors) {
    multiply_columns<1>(a, a_stride, num_rows, b, v * kLanes, depth, c, c_stride, decay);
  }
}

// Writes rows [0, count) of k, each `width` floats, as columns of out (width x kTileSlots). Columns
// up to the next multiple of kLanes become copies of the last row.
void transpose_rows(ScatteredRows<float> k, int count, int width, float* out) {
  for (int n = 0; n < count; n += kLanes) {
    for (int d = 0; d < width; d += kLanes) {
      VecF block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = load(k.row(n + i < count ? n + i : count - 1) + d);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (d + i) * kTileSlots + n, block[i]);
    }
  }
}

// Four accumulators alone would wait for each other's additions, and round more.
constexpr int kDotSums = kLanes == 4 ? 2 : 1;

// scores[i][n] = q[i] . k[n] for kRows rows of q, kLanes / kRows slots at a time.
template <int kRows, class T>
void dot_block(const float* q, int width, ScatteredRows<T> k, int count, float* scores,
               NextRows& next) {
  constexpr int kSlots = kLanes / kRows;
  for (int n = 0; n < (count + kLanes - 1) / kLanes * kLanes; n += kSlots) {
    const T* rows[kSlots];
    for (int i = 0; i < kSlots; ++i) rows[i] = k.row(n + i < count ? n + i : count - 1);
    VecF sum[kDotSums][kLanes] = {};
    const auto add = [&](int d, VecF* to) {
      VecF right[kSlots];
#pragma GCC unroll 16
      for (int i = 0; i < kSlots; ++i) right[i] = load_as_float(rows[i] + d);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const VecF left = load(q + m * width + d);
#pragma GCC unroll 16
        for (int i = 0; i < kSlots; ++i) to[m * kSlots + i] += left * right[i];
      }
    };
    int d = 0;
    for (; d + kDotSums * kLanes <= width; d += kDotSums * kLanes) {
#pragma GCC unroll 2
      for (int s = 0; s < kDotSums; ++s) add(d + s * kLanes, sum[s]);
      next.ask();
    }
    for (; d < width; d += kLanes) add(d, sum[0]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      for (int s = 1; s < kDotSums; ++s) sum[0][i] += sum[s][i];
    }
    float lanes[kLanes];
    store(lanes, sum_each(sum[0]));
    for (int m = 0; m < kRows; ++m)
      std::memcpy(scores + m * kTileSlots + n, lanes + m * kSlots, kSlots * sizeof(float));
  }
}

// How often `dot_products` asks for a share of the next tile.
inline int dot_steps(int num_rows, int width, int count) {
  return (count + kLanes - 1) / kLanes * num_rows * (width / (kDotSums * kLanes));
}

// scores[i][n] = q[i] . k[n], by dot products: for few rows cheaper than transposing k. Columns
// past `count` as above.
template <class T>
void dot_products(const float* q, int num_rows, int width, ScatteredRows<T> k, int count,
                  float* scores, NextRows next) {
  int m = 0;
  const auto block = [&](auto rows) {
    dot_block<rows.value>(q + m * width, width, k, count, scores + m * kTileSlots, next);
    m += rows.value;
  };
  while (m + 4 <= num_rows) block(std::integral_constant<int, 4>{});
  if (m + 2 <= num_rows) block(std::integral_constant<int, 2>{});
  if (m < num_rows) block(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace fork_attn::cpu
