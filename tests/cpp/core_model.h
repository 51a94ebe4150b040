// The oracle of the core's tests: a cache in which every branch is a plain list of tokens, and
// every verb copies lists.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "core/cache_core.h"

namespace fork_attn::test {

struct Token {
  uint64_t id;  // names the token for ever, whichever branches see it
  int64_t position;
  int64_t written;  // where its key is rotated to

  bool shifted() const { return position != written; }
};

// What is seen of another branch: these tokens, and its own from `start` on.
struct ModelWatch {
  bool alive = true;
  Handle other = 0;
  std::vector<Token> seen;
  int64_t start = 0;
  bool rebase = true;
};

struct ModelPlace {  // of a watch in a context
  std::shared_ptr<ModelWatch> watch;
  int64_t before;  // tokens of the context
  int64_t position;
};

struct ModelBranch {
  std::vector<Token> tokens;
  std::vector<ModelPlace> places;
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
    for (const uint64_t id : ids) {
      b.tokens.push_back({id, b.position, b.position});
      ++b.position;
    }
  }

  // The tokens that a join would add, in the order of the union.
  std::vector<Token> added(Handle h, const std::vector<Handle>& children) const {
    std::set<uint64_t> seen;
    for (const Token& t : view(h)) seen.insert(t.id);
    std::vector<Token> out;
    for (const Handle child : children) {
      for (const Token& t : branches.at(child).tokens) {
        if (seen.insert(t.id).second) out.push_back(t);
      }
    }
    return out;
  }

  std::vector<Token> shown(const ModelWatch& w) const {
    std::vector<Token> out = w.seen;
    if (!w.alive) return out;
    const std::vector<Token>& live = branches.at(w.other).tokens;
    out.insert(out.end(), live.begin() + w.start, live.end());
    return out;
  }

  // Everything a branch sees, at its positions in the view.
  std::vector<Token> view(Handle h) const {
    const ModelBranch& b = branches.at(h);
    std::vector<std::pair<int64_t, int64_t>> spans;
    int64_t total = 0;
    for (const ModelPlace& p : b.places) {
      spans.push_back(p.watch->rebase ? span(shown(*p.watch)) : std::pair<int64_t, int64_t>{0, 0});
      total += spans.back().second - spans.back().first;
    }
    std::vector<Token> out;
    int64_t moved = 0;
    std::size_t next = 0;
    for (int64_t i = 0; i <= b.length(); ++i) {
      for (; next < b.places.size() && b.places[next].before == i; ++next) {
        const ModelPlace& p = b.places[next];
        const int64_t by = p.watch->rebase ? p.position + moved - spans[next].first : total;
        for (Token t : shown(*p.watch)) {
          t.position += by;
          out.push_back(t);
        }
        moved += spans[next].second - spans[next].first;
      }
      if (i == b.length()) break;
      Token t = b.tokens[i];
      t.position += moved;
      out.push_back(t);
    }
    return out;
  }

  static std::pair<int64_t, int64_t> span(const std::vector<Token>& tokens) {
    if (tokens.empty()) return {0, 0};
    std::pair<int64_t, int64_t> out{INT64_MAX, INT64_MIN};
    for (const Token& t : tokens) {
      out.first = std::min(out.first, t.position);
      out.second = std::max(out.second, t.position + 1);
    }
    return out;
  }

  bool watched(Handle h) const {
    for (const auto& [other, b] : branches) {
      if (watches(other, h)) return true;
    }
    return false;
  }

  bool watches(Handle h, Handle other) const {
    for (const ModelPlace& p : branches.at(h).places) {
      if (p.watch->alive && p.watch->other == other) return true;
    }
    return false;
  }

  void watch(Handle h, Handle other, bool rebase) {
    ModelWatch w{true, other, added(h, {other}), branches.at(other).length(), rebase};
    ModelBranch& b = branches.at(h);
    b.places.push_back({std::make_shared<ModelWatch>(w), b.length(), b.position});
    b.plain = false;
  }

  // A token stands at two positions in what a join would bring together.
  bool conflict(Handle h, const std::vector<Handle>& children) const {
    std::set<uint64_t> through_watches;
    for (const ModelPlace& p : branches.at(h).places) {
      for (const Token& t : shown(*p.watch)) through_watches.insert(t.id);
    }
    std::map<uint64_t, int64_t> held;
    for (const Token& t : branches.at(h).tokens) held.emplace(t.id, t.position);
    for (const Handle child : children) {
      for (const Token& t : branches.at(child).tokens) {
        if (through_watches.count(t.id) != 0) continue;
        if (held.emplace(t.id, t.position).first->second != t.position) return true;
      }
    }
    return false;
  }

  // What a join adds, laid end to end; the position behind it.
  std::vector<Token> laid(Handle h, const std::vector<Handle>& children, Rebase rebase,
                          int64_t& end) const {
    std::vector<Token> out;
    std::vector<Handle> so_far;
    end = branches.at(h).position;
    for (const Handle child : children) {
      so_far.push_back(child);
      const std::vector<Token> all = added(h, so_far);
      std::vector<Token> own(all.begin() + static_cast<std::ptrdiff_t>(out.size()), all.end());
      const auto [first, past] = span(own);
      for (Token& t : own) {
        if (rebase != Rebase::kNo) t.position += end - first;
        if (rebase == Rebase::kCopy) t.written = t.position;
        out.push_back(t);
      }
      end += past - first;
    }
    return out;
  }

  int64_t join_position(Handle h, const std::vector<Handle>& children, JoinPosition mode,
                        int64_t given, Rebase rebase = Rebase::kNo) const {
    int64_t position = branches.at(h).position;
    if (mode == JoinPosition::kGiven) return given;
    if (mode == JoinPosition::kSum) {
      return position + static_cast<int64_t>(added(h, children).size());
    }
    if (rebase != Rebase::kNo) {
      laid(h, children, rebase, position);
      return position;
    }
    for (const Handle child : children) {
      position = std::max(position, branches.at(child).position);
    }
    return position;
  }

  void join(Handle h, const std::vector<Handle>& children, JoinPosition mode, int64_t given,
            Rebase rebase = Rebase::kNo) {
    const int64_t position = join_position(h, children, mode, given, rebase);
    int64_t end = 0;
    const std::vector<Token> more =
        rebase == Rebase::kNo ? added(h, children) : laid(h, children, rebase, end);
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
    const std::vector<Handle> below = descendants(h);
    // Before the others go: what they wrote stays with those who watch them.
    const ModelBranch chosen = branches.at(child);
    branches.at(h).tokens = chosen.tokens;
    branches.at(h).places = chosen.places;
    branches.at(h).position = chosen.position;
    branches.at(h).plain = chosen.plain;
    for (const Handle other : below) free(other);
  }

  void reorder(const std::vector<Handle>& handles, const std::vector<int64_t>& indices) {
    std::vector<ModelBranch> sources;
    for (const int64_t i : indices) sources.push_back(branches.at(handles[i]));
    for (std::size_t k = 0; k < handles.size(); ++k) {
      branches.at(handles[k]).tokens = sources[k].tokens;
      branches.at(handles[k]).places = sources[k].places;
      branches.at(handles[k]).position = sources[k].position;
      branches.at(handles[k]).plain = sources[k].plain;
    }
  }

  void crop(Handle h, int64_t length) {
    ModelBranch& b = branches.at(h);
    b.tokens.resize(length);
    std::erase_if(b.places, [&](const ModelPlace& p) { return p.before > length; });
    b.position = b.end_position();
  }

  // By how much what follows moves; positions out of range would be an error.
  int64_t closing_shift(Handle h, int64_t start, int64_t end) const {
    const ModelBranch& b = branches.at(h);
    const int64_t after = end < b.length() ? b.tokens[end].position : b.position;
    return b.tokens[start].position - after;
  }

  bool can_close(Handle h, int64_t start, int64_t end) const {
    const ModelBranch& b = branches.at(h);
    int64_t least = b.position;
    int64_t most = b.position;
    for (int64_t i = end; i < b.length(); ++i) {
      least = std::min(least, b.tokens[i].position);
      most = std::max(most, b.tokens[i].position + 1);
    }
    for (const ModelPlace& p : b.places) {
      if (p.before >= end) least = std::min(least, p.position);
    }
    const int64_t shift = closing_shift(h, start, end);
    return least + shift >= 0 && most + shift <= kMaxLength;
  }

  void excise(Handle h, int64_t start, int64_t end, bool rebase = false) {
    if (start == end) return;
    ModelBranch& b = branches.at(h);
    const int64_t shift = rebase ? closing_shift(h, start, end) : 0;
    for (int64_t i = end; i < b.length(); ++i) b.tokens[i].position += shift;
    b.tokens.erase(b.tokens.begin() + start, b.tokens.begin() + end);
    std::erase_if(b.places,
                  [&](const ModelPlace& p) { return p.before > start && p.before < end; });
    for (ModelPlace& p : b.places) {
      if (p.before < end) continue;
      p.before -= end - start;
      p.position += shift;
    }
    b.position += shift;
    b.plain = false;
  }

  void set_position(Handle h, int64_t position) {
    branches.at(h).position = position;
    branches.at(h).plain = false;
  }

  // Descendants of a freed branch stay descendants of its ancestors.
  void free(Handle h) {
    for (auto& [other, b] : branches) {
      for (ModelPlace& p : b.places) {
        if (!p.watch->alive || p.watch->other != h) continue;
        p.watch->seen = shown(*p.watch);
        p.watch->alive = false;
      }
    }
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
