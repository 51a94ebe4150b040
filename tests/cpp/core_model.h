// The oracle of the core's tests: a cache in which every branch is a plain list of tokens, and
// every verb copies lists.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <vector>

#include "core/cache_core.h"

namespace fork_attn::test {

struct Token {
  uint64_t id;  // names the token for ever, whichever branches see it
  int64_t position;
};

struct ModelBranch {
  std::vector<Token> tokens;
  int64_t position = 0;
  Handle parent = 0;
  bool has_parent = false;
  bool plain = true;  // no join, excision or position set: dense under the copy policy

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  int64_t end_position() const { return tokens.empty() ? 0 : tokens.back().position + 1; }
};

class Model {
 public:
  std::map<Handle, ModelBranch> branches;

  void new_branch(Handle h) { branches[h] = {}; }

  void fork(Handle parent, Handle child) {
    ModelBranch copy = branches.at(parent);
    copy.parent = parent;
    copy.has_parent = true;
    branches[child] = copy;
  }

  void fork_at(Handle parent, Handle child, int64_t length) {
    fork(parent, child);
    crop(child, length);
  }

  void append(Handle h, const std::vector<uint64_t>& ids) {
    ModelBranch& b = branches.at(h);
    for (const uint64_t id : ids) b.tokens.push_back({id, b.position++});
  }

  // The tokens that a join would add, in the order of the union.
  std::vector<Token> added(Handle h, const std::vector<Handle>& children) const {
    std::set<uint64_t> seen;
    for (const Token& t : branches.at(h).tokens) seen.insert(t.id);
    std::vector<Token> out;
    for (const Handle child : children) {
      for (const Token& t : branches.at(child).tokens) {
        if (seen.insert(t.id).second) out.push_back(t);
      }
    }
    return out;
  }

  int64_t join_position(Handle h, const std::vector<Handle>& children, JoinPosition mode,
                        int64_t given) const {
    int64_t position = branches.at(h).position;
    if (mode == JoinPosition::kGiven) return given;
    if (mode == JoinPosition::kSum) {
      return position + static_cast<int64_t>(added(h, children).size());
    }
    for (const Handle child : children) {
      position = std::max(position, branches.at(child).position);
    }
    return position;
  }

  void join(Handle h, const std::vector<Handle>& children, JoinPosition mode, int64_t given) {
    const int64_t position = join_position(h, children, mode, given);
    const std::vector<Token> more = added(h, children);
    ModelBranch& b = branches.at(h);
    b.tokens.insert(b.tokens.end(), more.begin(), more.end());
    b.position = position;
    b.plain = false;
    for (const Handle child : children) free(child);
  }

  bool descends(Handle h, Handle ancestor) const {
    const ModelBranch* b = &branches.at(h);
    while (b->has_parent) {
      if (b->parent == ancestor) return true;
      b = &branches.at(b->parent);
    }
    return false;
  }

  int depth(Handle h) const {
    int depth = 0;
    for (const ModelBranch* b = &branches.at(h); b->has_parent; b = &branches.at(b->parent)) {
      ++depth;
    }
    return depth;
  }

  std::vector<Handle> descendants(Handle h) const {
    std::vector<Handle> out;
    for (const auto& [other, b] : branches) {
      if (descends(other, h)) out.push_back(other);
    }
    return out;
  }

  void select(Handle h, Handle child) {
    const ModelBranch chosen = branches.at(child);
    for (const Handle other : descendants(h)) free(other);
    branches.at(h).tokens = chosen.tokens;
    branches.at(h).position = chosen.position;
    branches.at(h).plain = chosen.plain;
  }

  void reorder(const std::vector<Handle>& handles, const std::vector<int64_t>& indices) {
    std::vector<ModelBranch> sources;
    for (const int64_t i : indices) sources.push_back(branches.at(handles[i]));
    for (std::size_t k = 0; k < handles.size(); ++k) {
      branches.at(handles[k]).tokens = sources[k].tokens;
      branches.at(handles[k]).position = sources[k].position;
      branches.at(handles[k]).plain = sources[k].plain;
    }
  }

  void crop(Handle h, int64_t length) {
    ModelBranch& b = branches.at(h);
    b.tokens.resize(length);
    b.position = b.end_position();
  }

  void excise(Handle h, int64_t start, int64_t end) {
    ModelBranch& b = branches.at(h);
    b.tokens.erase(b.tokens.begin() + start, b.tokens.begin() + end);
    if (start < end) b.plain = false;
  }

  void set_position(Handle h, int64_t position) {
    branches.at(h).position = position;
    branches.at(h).plain = false;
  }

  // Descendants of a freed branch stay descendants of its ancestors.
  void free(Handle h) {
    const ModelBranch gone = branches.at(h);
    branches.erase(h);
    for (auto& [other, b] : branches) {
      if (!b.has_parent || b.parent != h) continue;
      b.parent = gone.parent;
      b.has_parent = gone.has_parent;
    }
  }
};

}  // namespace fork_attn::test
