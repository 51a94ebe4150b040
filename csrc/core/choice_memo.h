// Keeps what blocks were chosen while contexts only grow: between forks and joins a decode step
// differs from the one before by a token per branch, and the best choice by nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "blocks.h"

namespace fork_attn {

class ChoiceMemo {
 public:
  struct Kind {  // of layer
    int32_t window;
    LayerShape shape;
    const TargetCosts* target;
    bool operator==(const Kind&) const = default;
  };

  // What was chosen last for that kind, if the same tokens share the same groups as then, and none
  // of these has grown or shrunk by more than kSlack slots or a sixteenth; else null. Valid until
  // the next call.
  const BlockChoice* find(const Kind& kind, const Groups& groups);
  const BlockChoice& keep(const Kind& kind, const Groups& groups, BlockChoice choice);

 private:
  static constexpr std::size_t kMostKinds = 8;
  static constexpr int64_t kSlack = 16;
  struct Entry {
    Kind kind;
    std::vector<int32_t> readers;  // see describe
    std::vector<int64_t> slots;    // of each group
    BlockChoice choice;
  };

  void describe(const Groups& groups);

  std::vector<Entry> entries_;
  std::size_t oldest_ = 0;
  std::vector<int32_t> readers_;  // of the groups asked about
};

}  // namespace fork_attn
