// How Python calls a function of these files: by name and precision, with one list of words for its arguments.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

// One argument: an address, an integer or a number.
union Word {
  void* address;
  int64_t integer;
  double number;
};
using Function = void (*)(const Word* arguments, int threads);

// Makes a function known; see blpo_function in program.cpp.
struct Registration {
  Registration(const char* name, Function function);
};

template <class A>
inline A argument(const Word& word) {
  if constexpr (std::is_reference_v<A>) return *static_cast<std::remove_reference_t<A>*>(word.address);
  else if constexpr (std::is_pointer_v<A>) return static_cast<A>(word.address);
  else if constexpr (std::is_floating_point_v<A>) return static_cast<A>(word.number);
  else return static_cast<A>(word.integer);
}

// `function` takes what the words hold, and the number of threads.
template <auto function>
struct Adapter;
template <class... A, void (*function)(A...)>
struct Adapter<function> {
  static constexpr std::size_t count = sizeof...(A) - 1;
  template <class B, std::size_t I>
  static B pick(const Word* words, int threads) {
    if constexpr (I == count) return threads;
    else return argument<B>(words[I]);
  }
  template <std::size_t... I>
  static void run(const Word* words, int threads, std::index_sequence<I...>) {
    function(pick<A, I>(words, threads)...);
  }
  static void call(const Word* words, int threads) { run(words, threads, std::index_sequence_for<A...>()); }
};

// BLPO_FUNCTION(name): template <class T> void name(..., int threads) can be called from Python. Each library is of one
// precision: BLPO_NUMBER is float or double.
#define BLPO_FUNCTION(name) const Registration name##_registration(#name, Adapter<&name<BLPO_NUMBER>>::call);
