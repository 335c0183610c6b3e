// Which ISA level the kernels run at: the best one this processor supports, or the one TRANSFUSE_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

namespace transfuse {

enum class Isa : int { portable = 0, avx2, avx512, avx512_bf16, emulated512 };

struct IsaLevel {
  Isa isa;
  const char* name;
  bool compiled;   // present in this binary
  bool supported;  // this processor can run it
};

const std::vector<IsaLevel>& isa_levels();
// Chosen once, at the first call. Throws std::runtime_error naming the levels when TRANSFUSE_CPU_ISA cannot be met.
Isa isa_in_use();
const char* isa_name(Isa isa);

// Kernels of one level live in namespace transfuse::<level>; these macros list the levels present in the binary. The
// one with bfloat16 products has code of its own only in files that multiply that way; the others' is that of avx512.
#if TRANSFUSE_AVX512_LEVELS
#define TRANSFUSE_FOR_EACH_LEVEL(X, ...) \
  X(portable, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__) X(emulated512, __VA_ARGS__)
#define TRANSFUSE_FOR_BF16_LEVEL(X, ...) X(avx512_bf16, __VA_ARGS__)
#elif TRANSFUSE_X86_LEVELS
#define TRANSFUSE_FOR_EACH_LEVEL(X, ...) X(portable, __VA_ARGS__) X(avx2, __VA_ARGS__) X(emulated512, __VA_ARGS__)
#define TRANSFUSE_FOR_BF16_LEVEL(X, ...)
#else
#define TRANSFUSE_FOR_EACH_LEVEL(X, ...) X(portable, __VA_ARGS__) X(emulated512, __VA_ARGS__)
#define TRANSFUSE_FOR_BF16_LEVEL(X, ...)
#endif

#define TRANSFUSE_DECLARE_TABLE(level, Table, symbol) \
  namespace level {                                   \
  extern const Table symbol;                          \
  }
#define TRANSFUSE_SELECT_TABLE(level, Table, symbol) \
  case Isa::level: return level::symbol;
#define TRANSFUSE_SELECT_AVX512(level, Table, symbol) \
  case Isa::level: return avx512::symbol;

#define TRANSFUSE_DEFINE_ACCESSOR(Table, symbol, accessor, SELECT_BF16) \
  const Table& accessor() {                                             \
    switch (isa_in_use()) {                                             \
      TRANSFUSE_FOR_EACH_LEVEL(TRANSFUSE_SELECT_TABLE, Table, symbol)   \
      TRANSFUSE_FOR_BF16_LEVEL(SELECT_BF16, Table, symbol)              \
      default: return portable::symbol;                                 \
    }                                                                   \
  }

// Defines `const Table& accessor()`, which returns the table `symbol` of the level in use. Use inside namespace
// transfuse. The second one is for files in TRANSFUSE_BF16_SOURCES.
#define TRANSFUSE_KERNEL_TABLE(Table, symbol, accessor)            \
  TRANSFUSE_FOR_EACH_LEVEL(TRANSFUSE_DECLARE_TABLE, Table, symbol) \
  TRANSFUSE_DEFINE_ACCESSOR(Table, symbol, accessor, TRANSFUSE_SELECT_AVX512)
#define TRANSFUSE_BF16_KERNEL_TABLE(Table, symbol, accessor)       \
  TRANSFUSE_FOR_EACH_LEVEL(TRANSFUSE_DECLARE_TABLE, Table, symbol) \
  TRANSFUSE_FOR_BF16_LEVEL(TRANSFUSE_DECLARE_TABLE, Table, symbol) \
  TRANSFUSE_DEFINE_ACCESSOR(Table, symbol, accessor, TRANSFUSE_SELECT_TABLE)

}  // namespace transfuse
