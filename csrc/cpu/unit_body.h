// One unit of work: flash attention of a block's rows over an item's slots, for one KV head.
// Rows are ordered by token, then by query head within the group. See simd.h for how this is
// compiled.
#pragma once

#include "products.h"
#include "scratch.h"
#include "simd.h"
#include "softmax_state.h"
#include "tile_reader.h"
#include "unit.h"

namespace fork_attn::cpu {
namespace {

// Up to here dot products cost less than transposing the K tile.
constexpr int kDotRows = kLanes / 2;
// Up to here K and V in fewer than 32 bits are widened as they are multiplied; more rows take them
// from a widened copy.
constexpr int kRowsInPlace = 4;

// Rows of 16-bit or odd-sized elements become rows of `width` floats, zeros past `dim`.
template <class T>
FORK_ATTN_INLINE void widen_row(const T* from, int dim, int width, float* to) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load_as_float(from + d));
  for (; d < dim; ++d) to[d] = to_float(from[d]);
  for (; d < width; ++d) to[d] = 0.0f;
}

template <class T>
void widen_rows(const void* const* from, int count, int dim, int width, float* scratch,
                const void** to) {
  for (int i = 0; i < count; ++i) {
    float* row = scratch + i * width;
    widen_row(static_cast<const T*>(from[i]), dim, width, row);
    to[i] = row;
  }
}

inline bool all_finite(const float* row, int width) {
  VecF sum = {};
  for (int d = 0; d < width; d += kLanes) sum += load(row + d) * 0.0f;  // NaN from Inf and NaN
  return sum_of_lanes(sum) == 0.0f;
}

// T: the type of q and out; KV: of the caches.
template <class T, class KV>
class UnitRunner {
 public:
  UnitRunner(const TreeAttentionParams& params, const Unit& unit, const Partials& partials,
             float* scratch)
      : p_(params),
        kv_head_(unit.kv_head),
        partials_(partials),
        plan_(params.plan),
        item_(plan_.items()[unit.item]) {
    block_ = plan_.blocks()[item_.block];
    group_ = plan_.header().group;
    score_scale_ = p_.softmax_scale * (p_.k_scale == nullptr ? 1.0f : p_.k_scale[kv_head_]);
    v_scale_ = p_.v_scale == nullptr ? 1.0f : p_.v_scale[kv_head_];
    num_rows_ = block_.num_tokens * group_;
    width_ = (p_.head_dim + kLanes - 1) / kLanes * kLanes;
    width_v_ = (p_.head_dim_v + kLanes - 1) / kLanes * kLanes;
    const ScratchLayout at(num_rows_, p_.head_dim, p_.head_dim_v);
    q_ = scratch + at.q;
    out_ = scratch + at.out;
    max_ = scratch + at.max;
    sum_ = scratch + at.sum;
    decay_ = scratch + at.decay;
    scores_ = scratch + at.scores;
    k_rows_ = scratch + at.k_rows;
    k_columns_ = scratch + at.k_columns;
    v_rows_ = scratch + at.v_rows;
    folded_ = scratch + at.folded;
    folded_lse_ = scratch + at.folded_lse;
    invariant_ = plan_.header().tile_slots > 0;
    for (float& one : ones_) one = 1.0f;
  }

  void run() {
    begin();
    TileReader reader(p_, item_, kv_head_);
    Tile tiles[2];
    bool more = reader.next(tiles[0]);
    for (int i = 0; more; i ^= 1) {
      more = reader.next(tiles[i ^ 1]);
      if (!more) tiles[i ^ 1].count = 0;
      attend_tile(tiles[i], tiles[i ^ 1]);
      if (invariant_ && more && tiles[i ^ 1].chunk != tiles[i].chunk) end_chunk();
    }
    if (invariant_) end_last_chunk();
    if (item_.partial_begin >= 0) {
      write_partials();
    } else {
      write_output();
    }
  }

 private:
  int query_head(int h) const { return kv_head_ * group_ + h; }

  void begin() {
    const int32_t* q_rows = plan_.q_rows() + block_.token_begin;
    for (int t = 0; t < block_.num_tokens; ++t) {
      for (int h = 0; h < group_; ++h) {
        const T* q = static_cast<const T*>(p_.q.data) + q_rows[t] * p_.q.row_stride +
                     query_head(h) * p_.q.head_stride;
        widen_row(q, p_.head_dim, width_, q_ + (t * group_ + h) * width_);
      }
    }
    for (int i = 0; i < num_rows_; ++i) folded_lse_[i] = -kInfinity;
    begin_softmax();
  }

  void begin_softmax() {
    for (int i = 0; i < num_rows_; ++i) {
      max_[i] = -kInfinity;
      sum_[i] = 0.0f;
    }
    std::memset(out_, 0, sizeof(float) * num_rows_ * width_v_);
  }

  void end_chunk() {
    for (int i = 0; i < num_rows_; ++i) {
      const RowEnd end = end_row(max_[i], sum_[i], nullptr);
      float* out = out_ + i * width_v_;
      // + 0: hidden slots of a tile may have turned -0 to 0.
      for (int d = 0; d < p_.head_dim_v; ++d) out[d] = out[d] * end.scale + 0.0f;
      fold_state(folded_ + i * width_v_, &folded_lse_[i], out, end.lse, p_.head_dim_v);
    }
    begin_softmax();
  }

  // What is folded becomes what is written.
  void end_last_chunk() {
    end_chunk();
    for (int i = 0; i < num_rows_; ++i) {
      if (folded_lse_[i] == -kInfinity) continue;
      max_[i] = folded_lse_[i];
      sum_[i] = 1.0f;
      std::memcpy(out_ + i * width_v_, folded_ + i * width_v_, sizeof(float) * p_.head_dim_v);
    }
  }

  // Rows of K or V as floats: in place where that is what memory holds.
  void prepare_rows(const void* const* from, int count, int dim, int width, float* scratch,
                    const void** to) {
    if (std::is_same_v<KV, float> && dim == width) {
      std::memcpy(to, from, count * sizeof(*to));
    } else {
      widen_rows<KV>(from, count, dim, width, scratch, to);
    }
  }

  // Bit n of seen_[t]: token t sees slot n of the tile. Finds hidden slots whose V holds NaN or Inf
  // on the way.
  void prepare_masks(const Tile& tile) {
    isolate_ = false;
    for (int t = 0; t < block_.num_tokens; ++t) seen_[t] = low_bits(tile.count);
    const uint64_t block = low_bits(block_.num_tokens);
    if (tile.seen_by_all == block) return;
    for (int t = 0; t < block_.num_tokens; ++t) {
      if (tile.seen_by_all >> t & 1) continue;
      uint64_t seen = 0;
      for (int n = 0; n < tile.count; ++n) seen |= (tile.words[n] >> t & 1) << n;
      seen_[t] = seen;
    }
    for (int n = 0; n < tile.count && !isolate_; ++n) {
      isolate_ = tile.words[n] != block && !all_finite(static_cast<const float*>(v_[n]), width_v_);
    }
  }

  void attend_tile(const Tile& tile, const Tile& next) {
    const bool dot = num_rows_ <= kDotRows && !invariant_;  // the two round differently
    const bool in_place = !std::is_same_v<KV, float> && num_rows_ <= kRowsInPlace &&
                          tile.seen_by_all == low_bits(block_.num_tokens);
    const bool k_in_place = in_place && dot && p_.head_dim == width_;
    const bool v_in_place = in_place && p_.head_dim_v == width_v_;
    if (!k_in_place) prepare_rows(tile.k, tile.count, p_.head_dim, width_, k_rows_, k_);
    if (!v_in_place) prepare_rows(tile.v, tile.count, p_.head_dim_v, width_v_, v_rows_, v_);
    prepare_masks(tile);
    if (!dot) transpose_rows({k_}, tile.count, width_, k_columns_);
    const int num_vectors = (tile.count + kLanes - 1) / kLanes;
    for (int row = 0; row < num_rows_; row += kChunkRows) {
      const int rows = num_rows_ - row < kChunkRows ? num_rows_ - row : kChunkRows;
      const float* q = q_ + row * width_;
      const int coming = row == 0 ? next.count : 0;
      const std::size_t k_bytes = p_.head_dim * sizeof(KV);
      if (dot) {
        const NextRows keys(next.k, coming, k_bytes, dot_steps(rows, width_, tile.count));
        if (k_in_place) {
          dot_products<KV>(q, rows, width_, {tile.k}, tile.count, scores_, keys);
        } else {
          dot_products<float>(q, rows, width_, {k_}, tile.count, scores_, keys);
        }
      } else {
        NextRows keys(next.k, coming, k_bytes, rows_taken(rows, width_, num_vectors));
        multiply_keys(q, rows, num_vectors, keys);
      }
      softmax(row, rows, num_vectors);
      NextRows values(next.v, coming, p_.head_dim_v * sizeof(KV),
                      rows_taken(rows, tile.count, width_v_ / kLanes));
      if (isolate_) {
        add_isolated(row, rows);
      } else if (v_in_place) {
        add_values<KV>(tile.v, tile.count, row, rows, values);
      } else {
        add_values<float>(v_, tile.count, row, rows, values);
      }
    }
  }

  // P V.
  template <class Element>
  void add_values(const void* const* v, int count, int row, int rows, NextRows& next) {
    multiply(scores_, kTileSlots, rows, AskingRows<ScatteredRows<Element>>{{v}, &next}, count,
             width_v_ / kLanes, out_ + row * width_v_, width_v_, decay_);
  }

  // Q K^T, a few columns of Q at a time: that part of K stays in the L1 cache, and long dot
  // products lose less to rounding.
  void multiply_keys(const float* q, int rows, int num_vectors, NextRows& next) {
    constexpr int kDepth = 64;
    for (int d = 0; d < width_; d += kDepth) {
      const AskingRows<StridedRows> columns{{k_columns_ + d * kTileSlots, kTileSlots}, &next};
      const int depth = width_ - d < kDepth ? width_ - d : kDepth;
      multiply(q + d, width_, rows, columns, depth, num_vectors, scores_, kTileSlots,
               d == 0 ? nullptr : ones_);
    }
  }

  // Scales, caps and masks a row of scores; returns their maximum.
  FORK_ATTN_INLINE float finish_scores(float* s, uint64_t seen, int num_vectors) {
    const bool masked = seen != low_bits(num_vectors * kLanes);
    VecU lane_bit;
    for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1u << i;
    VecF top = broadcast(-kInfinity);
    for (int v = 0; v < num_vectors; ++v) {
      VecF x = load(s + v * kLanes) * score_scale_;
      if (p_.softcap > 0.0f) x = tanh(x / p_.softcap) * p_.softcap;
      if (masked) {
        const VecU bits = VecU{} + static_cast<uint32_t>(seen >> (v * kLanes));
        x = (lane_bit & bits) != 0u ? x : broadcast(-kInfinity);
      }
      top = max(x, top);
      store(s + v * kLanes, x);
    }
    return max_of_lanes(top);
  }

  // Turns the chunk's scores into probabilities relative to the new maxima; decay_ tells how far
  // these moved.
  void softmax(int row, int rows, int num_vectors) {
    float origin[kChunkRows];
    for (int i = 0; i < rows; ++i) {
      origin[i] = finish_scores(scores_ + i * kTileSlots, seen_[(row + i) / group_], num_vectors);
    }
    for (int i = rows; i % kLanes != 0; ++i) origin[i] = -kInfinity;
    for (int i = 0; i < rows; i += kLanes) {
      const VecF old = load(max_ + row + i);
      const VecF top = max(load(origin + i), old);
      const VecF from =
          top == -kInfinity ? VecF{} : top;  // nothing seen so far: all probabilities are 0
      store(decay_ + i, exp(old - from));
      store(max_ + row + i, top);
      store(origin + i, from);
    }
    for (int i = 0; i < rows; ++i) {
      float* s = scores_ + i * kTileSlots;
      VecF sum = {};
      for (int v = 0; v < num_vectors; ++v) {
        const VecF probability = exp(load(s + v * kLanes) - origin[i]);
        sum += probability;
        store(s + v * kLanes, probability);
      }
      sum_[row + i] = sum_[row + i] * decay_[i] + sum_of_lanes(sum);
    }
  }

  // P V where a row must not touch the slots it does not see: 0 * Inf is NaN, and one branch's
  // overflow would spread to the others of the block.
  void add_isolated(int row, int rows) {
    float probability[kTileSlots];
    const void* v[kTileSlots];
    for (int i = 0; i < rows; ++i) {
      int count = 0;
      for (uint64_t rest = seen_[(row + i) / group_]; rest != 0; rest &= rest - 1) {
        const int n = __builtin_ctzll(rest);
        probability[count] = scores_[i * kTileSlots + n];
        v[count++] = v_[n];
      }
      multiply(probability, kTileSlots, 1, ScatteredRows<float>{v}, count, width_v_ / kLanes,
               out_ + (row + i) * width_v_, width_v_, decay_ + i);
    }
  }

  void write_partials() {
    for (int i = 0; i < num_rows_; ++i) {
      const int64_t slot =
          int64_t{item_.partial_begin + i / group_} * p_.num_q_heads + query_head(i % group_);
      const RowEnd end = end_row(max_[i], sum_[i], nullptr);
      const float scale = end.scale * v_scale_;
      const float* from = out_ + i * width_v_;
      float* to = partials_.out + slot * p_.head_dim_v;
      for (int d = 0; d < p_.head_dim_v; ++d) to[d] = from[d] * scale;
      partials_.lse[slot] = end.lse;
    }
  }

  void write_output() {
    const int32_t* tokens = plan_.tokens() + block_.token_begin;
    for (int i = 0; i < num_rows_; ++i) {
      const int64_t token = tokens[i / group_];
      const int head = query_head(i % group_);
      const RowEnd end = end_row(max_[i], sum_[i], p_.sinks == nullptr ? nullptr : p_.sinks + head);
      const float scale = end.scale * v_scale_;
      const float* from = out_ + i * width_v_;
      T* to = static_cast<T*>(p_.out.data) + token * p_.out.row_stride + head * p_.out.head_stride;
      for (int d = 0; d < p_.head_dim_v; ++d) from_float(from[d] * scale, to[d]);
      p_.lse[token * p_.num_q_heads + head] = end.lse;
    }
  }

  const TreeAttentionParams& p_;
  int kv_head_;
  const Partials& partials_;
  PlanView plan_;
  PlanItem item_;
  PlanBlock block_;
  float score_scale_, v_scale_;
  int group_, num_rows_, width_, width_v_;  // widths: head dimensions rounded up to whole vectors
  float *q_, *out_, *max_, *sum_, *decay_, *scores_, *k_rows_, *k_columns_, *v_rows_;
  float *folded_, *folded_lse_;  // batch-invariant plans: the chunks before this one
  bool invariant_;
  const void* k_[kTileSlots];
  const void* v_[kTileSlots];
  uint64_t seen_[kMaxBlockTokens];
  float ones_[kChunkRows];
  bool isolate_;
};

template <class T>
void run_unit_of(const TreeAttentionParams& params, const Unit& unit, const Partials& partials,
                 float* scratch) {
  if (params.kv_dtype == DType::kFloat8E4M3) {
    UnitRunner<T, Float8E4M3>(params, unit, partials, scratch).run();
  } else {
    UnitRunner<T, T>(params, unit, partials, scratch).run();
  }
}

inline void run_unit_body(const TreeAttentionParams& params, const Unit& unit,
                          const Partials& partials, float* scratch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return run_unit_of<float>(params, unit, partials, scratch);
    case DType::kBFloat16:
      return run_unit_of<BFloat16>(params, unit, partials, scratch);
    case DType::kFloat16:
      return run_unit_of<Float16>(params, unit, partials, scratch);
    case DType::kFloat8E4M3:
      break;  // no query has that type: tree_attention refuses it
  }
}

}  // namespace
}  // namespace fork_attn::cpu
