// Typed access to the sections of a plan buffer.
#pragma once

#include <cstdint>

#include "../core/plan.h"

namespace fork_attn::cpu {

class PlanView {
 public:
  explicit PlanView(const int64_t* words) : words_(words) {}

  const PlanHeader& header() const { return *reinterpret_cast<const PlanHeader*>(words_); }
  const PlanBlock* blocks() const { return section<PlanBlock>(header().off_blocks); }
  const int32_t* tokens() const { return section<int32_t>(header().off_tokens); }
  const int32_t* q_rows() const { return section<int32_t>(header().off_q_rows); }
  const int32_t* positions() const { return section<int32_t>(header().off_positions); }
  const PlanItem* items() const { return section<PlanItem>(header().off_items); }
  const PlanRun* runs() const { return section<PlanRun>(header().off_runs); }
  const int32_t* pages() const { return section<int32_t>(header().off_pages); }
  const int32_t* gather() const { return section<int32_t>(header().off_gather); }
  const uint64_t* words() const { return section<uint64_t>(header().off_words); }
  const int32_t* merge_indptr() const { return section<int32_t>(header().off_merge_indptr); }
  const int32_t* merge_rows() const { return section<int32_t>(header().off_merge_rows); }

 private:
  template <class T>
  const T* section(int32_t offset) const {
    return reinterpret_cast<const T*>(words_ + offset);
  }

  const int64_t* words_;
};

inline uint64_t low_bits(int count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

}  // namespace fork_attn::cpu
