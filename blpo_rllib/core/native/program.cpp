// Functions by name, and lists of calls that are run one after the other.

#include <cstdint>
#include <cstring>
#include <vector>

#include "functions.h"

namespace {

struct Entry {
  const char* name;
  Function function;
};
std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

}  // namespace

Registration::Registration(const char* name, Function function) { entries().push_back({name, function}); }

extern "C" {

// The function of this name, or null.
Function blpo_function(const char* name) {
  for (const Entry& entry : entries())
    if (std::strcmp(entry.name, name) == 0) return entry.function;
  return nullptr;
}

void blpo_call(Function function, const Word* arguments, int64_t threads) {
  function(arguments, static_cast<int>(threads));
}

struct Call {
  Function function;
  const Word* arguments;
};

// The list of calls `repetitions` times; `round` says which time it is, from 0.
void blpo_run(const Call* calls, int64_t count, int64_t threads, int64_t* round, int64_t repetitions) {
  for (*round = 0; *round < repetitions; ++*round)
    for (int64_t i = 0; i < count; ++i) calls[i].function(calls[i].arguments, static_cast<int>(threads));
}
}
