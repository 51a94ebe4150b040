// Errors of the core. The bindings turn each kind into the Python exception of the same name.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

namespace fork_attn {

enum class ErrorKind {
  kValue,
  kType,
  kStaleBranch,
  kOutOfPages,
  kDuplicateBranch,
  kForeignBranch,
  kStepOpen,
  kNotDense,
  kStalePlan,
  kPlanCapacityExceeded,
  kConcurrentUse,
  kUnsupported,
  kDevice,
  kInvariant,
};

class Error : public std::exception {
 public:
  Error(ErrorKind error_kind, std::string message)
      : kind(error_kind), message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

  ErrorKind kind;
  int64_t needed = 0;  // kOutOfPages only, in pages
  int64_t free = 0;
  int64_t pending = 0;

 private:
  std::string message_;
};

[[noreturn]] inline void fail(ErrorKind kind, std::string message) {
  throw Error(kind, std::move(message));
}

}  // namespace fork_attn
