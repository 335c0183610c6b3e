// Register-blocked matrix product of small tiles that live in cache: C[rows x cols] (+)= A[rows x depth] * B[depth x
// cols].
//
// B and C are row-major with unit column stride and columns padded to whole vectors; A is broadcast element by element,
// either row-major (A[i*lda + k]) or transposed (A[k*lda + i]). A "unit" is one A or B element of 32 or 64 bits: a
// float, a double, or a pair of bf16 along the depth, so one micro-kernel serves all three.
#pragma once

#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

// Plain multiply-add in the accumulation type.
template <class A>
struct DotPlain {
  using Unit = A;
  using Acc = A;
  using V = typename Simd<A>::V;
  static constexpr int kDepth = 1;  // depth elements per unit
  TRANSFUSE_INLINE V spread(Unit a) { return splat<A>(a); }
  TRANSFUSE_INLINE V load_unit(const Unit* p) { return load<V>(p); }
  TRANSFUSE_INLINE V dot(V acc, V a, V b) { return a * b + acc; }
};

#if TRANSFUSE_BF16_DOT
// acc += a.lo * b.lo + a.hi * b.hi in fp32, two bf16 per 32-bit unit.
struct DotBf16 {
  using Unit = uint32_t;
  using Acc = float;
  using V = VecF;
  static constexpr int kDepth = 2;
  TRANSFUSE_INLINE VecU spread(Unit a) { return a - VecU{}; }
  TRANSFUSE_INLINE VecU load_unit(const Unit* p) { return load<VecU>(p); }
  TRANSFUSE_INLINE V dot(V acc, VecU a, VecU b) {
#if defined(__AVX512BF16__)
    return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc = (V)(a << 16) * (V)(b << 16) + acc;
    return (V)(a & 0xffff0000u) * (V)(b & 0xffff0000u) + acc;
#endif
  }
};
#endif

template <class P, bool kTransposed, int kRows, int kVecs>
TRANSFUSE_INLINE void micro_kernel(int64_t depth, const typename P::Unit* a, int64_t lda, const typename P::Unit* b,
                                   int64_t ldb, typename P::Acc* c, int64_t ldc, bool accumulate) {
  using V = typename P::V;
  constexpr int W = Simd<typename P::Acc>::W;
  if (depth <= 0) __builtin_unreachable();  // callers pass whole tiles; lets the accumulators stay in registers
  V acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) acc[i][v] = V{};
  int64_t k = depth;
  do {
    decltype(P::load_unit(b)) bv[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) bv[v] = P::load_unit(b + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto av = P::spread(kTransposed ? a[i] : a[i * lda]);
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) acc[i][v] = P::dot(acc[i][v], av, bv[v]);
    }
    a += kTransposed ? lda : 1;
    b += ldb;
  } while (--k > 0);
  // Added at the end, not carried through: a sum over thousands of keys stays a sum of short sums.
  if (accumulate) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) acc[i][v] += load<V>(c + i * ldc + v * W);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) store(c + i * ldc + v * W, acc[i][v]);
}

template <class P, bool kTransposed, int kVecs>
static __attribute__((noinline)) void gemm_panel(int rows, int64_t depth, const typename P::Unit* a, int64_t lda,
                                                 const typename P::Unit* b, int64_t ldb, typename P::Acc* c,
                                                 int64_t ldc, bool accumulate) {
  for (int i = 0; i < rows; i += kTileRows) {
    micro_kernel<P, kTransposed, kTileRows, kVecs>(depth, kTransposed ? a + i : a + i * lda, lda, b, ldb, c + i * ldc,
                                                   ldc, accumulate);
  }
}

// `rows` must be a multiple of kTileRows, `depth` at least 1, and `vecs` counts vectors of columns; A, B and C hold
// that much padding.
template <class P, bool kTransposed>
static void gemm(int rows, int vecs, int64_t depth, const typename P::Unit* a, int64_t lda, const typename P::Unit* b,
                 int64_t ldb, typename P::Acc* c, int64_t ldc, bool accumulate) {
  constexpr int W = Simd<typename P::Acc>::W;
  while (vecs > 0) {
    const int panel = vecs == 4 || vecs == 2 ? 2 : vecs >= 3 ? 3 : 1;
    if (panel == 3)
      gemm_panel<P, kTransposed, 3>(rows, depth, a, lda, b, ldb, c, ldc, accumulate);
    else if (panel == 2)
      gemm_panel<P, kTransposed, 2>(rows, depth, a, lda, b, ldb, c, ldc, accumulate);
    else
      gemm_panel<P, kTransposed, 1>(rows, depth, a, lda, b, ldb, c, ldc, accumulate);
    vecs -= panel;
    b += panel * W;
    c += panel * W;
  }
}

// The same with B in panels of kPanelVecs vectors, each stored [depth][panel columns] without gaps: what a transposed
// block is packed into, so that a panel streams through the first-level cache.
constexpr int kPanelVecs = 3;

template <class P>
static void gemm_panels(int rows, int vecs, int64_t depth, const typename P::Unit* a, int64_t lda,
                        const typename P::Unit* b, typename P::Acc* c, int64_t ldc, bool accumulate) {
  constexpr int64_t ldb = kPanelVecs * Simd<typename P::Acc>::W;
  for (; vecs > 0; vecs -= kPanelVecs) {
    if (vecs >= 3)
      gemm_panel<P, false, 3>(rows, depth, a, lda, b, ldb, c, ldc, accumulate);
    else if (vecs == 2)
      gemm_panel<P, false, 2>(rows, depth, a, lda, b, ldb, c, ldc, accumulate);
    else
      gemm_panel<P, false, 1>(rows, depth, a, lda, b, ldb, c, ldc, accumulate);
    b += depth * ldb;
    c += ldb;
  }
}

// Units needed for `columns` columns of depth `depth` in panels.
template <class P>
TRANSFUSE_INLINE int64_t panels_size(int64_t columns, int64_t depth) {
  constexpr int64_t width = kPanelVecs * Simd<typename P::Acc>::W;
  return (columns + width - 1) / width * width * depth;
}

// Leading dimension for `cols` elements: whole vectors, and not a multiple of 128 bytes, so that walking down a column
// does not hit the same cache sets over and over.
template <class T>
TRANSFUSE_INLINE int64_t padded_columns(int64_t cols) {
  constexpr int64_t line = 64 / sizeof(T);
  int64_t ld = (cols + line - 1) / line * line;
  if (ld / line % 2 == 0) ld += line;
  return ld;
}
TRANSFUSE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
