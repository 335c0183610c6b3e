// Counter-based noise on the CPU, at one ISA level (see nes.h).
#include "transfuse/nes.h"

#include <algorithm>
#include <vector>

#include "transfuse/vec.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr int64_t kGroup = 64;     // numbers per group, see nes.h
constexpr int64_t kChunk = 1024;   // numbers per buffer
constexpr int64_t kTask = 8192;    // numbers per task
constexpr int64_t kSerial = 8192;  // numbers in all below which waking other threads does not pay
constexpr int W = Simd<float>::W;

struct Words {
  VecU w[4];
};

// Low and high halves of the products of 32-bit numbers.
TRANSFUSE_INLINE void multiply(VecU a, uint32_t m, VecU* low, VecU* high) {
  *low = a * m;
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32((int)m);
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32((__m512i)a, factor), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  *high = (VecU)_mm512_mask_blend_epi32(0xaaaa, even, odd);
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32((int)m);
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32((__m256i)a, factor), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  *high = (VecU)_mm256_blend_epi32(even, odd, 0xaa);
#else
  uint32_t lanes[W];
  store(lanes, a);
  for (int i = 0; i < W; ++i) lanes[i] = (uint32_t)(((uint64_t)lanes[i] * m) >> 32);
  *high = load<VecU>(lanes);
#endif
}

// Philox 4x32-10 for W blocks from `block` on.
TRANSFUSE_INLINE Words philox(uint64_t seed, uint64_t sample, uint64_t block) {
  uint32_t low[W], high[W];
  for (int i = 0; i < W; ++i) {
    low[i] = (uint32_t)(block + (uint64_t)i);
    high[i] = (uint32_t)((block + (uint64_t)i) >> 32);
  }
  const VecU zero = VecU{};
  VecU c0 = load<VecU>(low), c1 = load<VecU>(high), c2 = zero + (uint32_t)sample, c3 = zero + (uint32_t)(sample >> 32);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    VecU low0, high0, low1, high1;
    multiply(c0, 0xD2511F53u, &low0, &high0);
    multiply(c2, 0xCD9E8D57u, &low1, &high1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Two normal numbers from two words; relative error of a few ulp.
TRANSFUSE_INLINE void normals(VecU r0, VecU r1, VecF* first, VecF* second) {
  const VecF unit = splat<float>(0x1p-32f), half = splat<float>(0.5f), one = splat<float>(1.0f);
  // ln u for u = (r0 + 1/2) 2^-32 = mantissa 2^exponent, mantissa in [1/sqrt 2, sqrt 2). Near 1, f = u - 1 is taken
  // from the complement of r0, which has all its digits.
  const VecF u = (__builtin_convertvector(r0, VecF) + half) * unit;
  const VecU bits = (VecU)u - 0x3f3504f3u;
  const VecI exponent = (VecI)bits >> 23;
  const VecF mantissa = (VecF)((bits & 0x7fffffu) + 0x3f3504f3u);
  const VecF complement = (__builtin_convertvector(~r0, VecF) + half) * unit;
  const VecF f = (VecF)(exponent == 0 ? (VecI)(-complement) : (VecI)(mantissa - one));
  VecF p = splat<float>(0.06915368139743805f);
  p = p * f + splat<float>(-0.11789807677268982f);
  p = p * f + splat<float>(0.11872976273298264f);
  p = p * f + splat<float>(-0.1238434836268425f);
  p = p * f + splat<float>(0.14218658208847046f);
  p = p * f + splat<float>(-0.16669251024723053f);
  p = p * f + splat<float>(0.20002226531505585f);
  p = p * f + splat<float>(-0.24999986588954926f);
  p = p * f + splat<float>(0.3333331048488617f);
  const VecF e = __builtin_convertvector(exponent, VecF), square = f * f;
  // ln 2 in two parts, the first of which times any exponent is exact.
  const VecF log = e * 0.693145751953125f + (e * 1.4286068202862268e-06f + (f + (p * f - half) * square));
  const VecF energy = -2.0f * log;
  VecF radius;
#if defined(__AVX512F__)
  radius = (VecF)_mm512_sqrt_ps((__m512)energy);
#elif defined(__AVX2__)
  radius = (VecF)_mm256_sqrt_ps((__m256)energy);
#else
  float lanes[W];
  store(lanes, energy);
  for (int i = 0; i < W; ++i) lanes[i] = std::sqrt(lanes[i]);
  radius = load<VecF>(lanes);
#endif
  // angle = (quarter + rest) pi / 2 with |rest| <= 1/2, by integers.
  const VecU quarter = (r1 + 0x20000000u) >> 30;
  const VecI rest = (VecI)(r1 - (quarter << 30));
  const VecF angle = __builtin_convertvector(rest, VecF) * (float)(1.5707963267948966 * 0x1p-30);
  const VecF z = angle * angle;
  const VecF sine =
      angle + angle * z * (-0.16666655242443085f + z * (0.008332177996635437f + z * -0.00019517297914717346f));
  const VecF cosine =
      one + z * (-0.5f + z * (0.04166664555668831f + z * (-0.001388736767694354f + z * 2.443845005473122e-05f)));
  const VecI swap = -(VecI)(quarter & 1u);
  const VecF a = (VecF)(swap ? (VecI)sine : (VecI)cosine), b = (VecF)(swap ? (VecI)cosine : (VecI)sine);
  // cos is negative in quarters 1 and 2, sin in 2 and 3.
  const VecU cosine_sign = ((quarter + 1u) & 2u) << 30, sine_sign = (quarter & 2u) << 30;
  *first = radius * (VecF)((VecU)a ^ cosine_sign);
  *second = radius * (VecF)((VecU)b ^ sine_sign);
}

// Numbers [begin, begin + n) of a sample, begin a multiple of kGroup, into a buffer of whole groups. Groups without a
// mask are zero.
void noise(const NesArgs& args, uint64_t sample, int64_t begin, int64_t n, float* out) {
  for (int64_t at = 0; at < n; at += kGroup) {
    const int64_t live = std::min(kGroup, n - at);
    if (args.mask != nullptr) {
      const uint8_t* mask = args.mask + begin + at;
      if (!std::any_of(mask, mask + live, [](uint8_t m) { return m != 0; })) {
        std::fill(out + at, out + at + kGroup, 0.0f);
        continue;
      }
    }
    const uint64_t block = (uint64_t)((begin + at) / kGroup) * 16;
    for (int j = 0; j < 16; j += W) {
      const Words r = philox(args.seed, sample, block + (uint64_t)j);
      for (int pair = 0; pair < 2; ++pair) {
        VecF first, second;
        normals(r.w[2 * pair], r.w[2 * pair + 1], &first, &second);
        store(out + at + 32 * pair + j, first);
        store(out + at + 32 * pair + 16 + j, second);
      }
    }
    if (args.mask != nullptr)
      for (int64_t i = 0; i < live; ++i)
        if (args.mask[begin + at + i] == 0) out[at + i] = 0.0f;
  }
}
void noise(const NesArgs& args, uint64_t sample, int64_t begin, int64_t n, double* out) {
  for (int64_t at = 0; at < n; at += kGroup) {
    const uint64_t block = (uint64_t)((begin + at) / kGroup) * 16;
    for (int j = 0; j < 16; j += W) {
      const Words r = philox(args.seed, sample, block + (uint64_t)j);
      uint32_t words[4][W];
      for (int c = 0; c < 4; ++c) store(words[c], r.w[c]);
      for (int i = 0; i < W; ++i)
        for (int pair = 0; pair < 2; ++pair) {
          const double radius = std::sqrt(-2.0 * std::log(((double)words[2 * pair][i] + 0.5) * 0x1p-32));
          const double angle = 6.283185307179586477 * ((double)words[2 * pair + 1][i] * 0x1p-32);
          out[at + 32 * pair + j + i] = radius * std::cos(angle);
          out[at + 32 * pair + 16 + j + i] = radius * std::sin(angle);
        }
    }
    if (args.mask != nullptr)
      for (int64_t i = 0; i < std::min(kGroup, n - at); ++i)
        if (args.mask[begin + at + i] == 0) out[at + i] = 0.0;
  }
}

template <class T>
void perturb(const NesArgs& args, const Parallel& parallel) {
  const int64_t parts = (args.count + kTask - 1) / kTask, tasks = parts * args.samples;
  const Parallel serial = serial_parallel();
  for_each_task(args.count * args.samples < kSerial ? serial : parallel, tasks, [&](int64_t task) {
    const int64_t sample = task / parts, first = task % parts * kTask, last = std::min(args.count, first + kTask);
    T* memory = static_cast<T*>(thread_scratch(sizeof(T) * 3 * kChunk));
    T *step = memory, *x = memory + kChunk, *moved = memory + 2 * kChunk;
    for (int64_t at = first; at < last; at += kChunk) {
      const int64_t n = std::min(kChunk, last - at);
      noise(args, (uint64_t)(args.start + sample), at, n, step);
      load_row(args.x, args.dtype, at, 1, n, x);
      for (int64_t i = 0; i < n; ++i) moved[i] = x[i] + (T)args.sigma * step[i];
      store_row(args.out, args.dtype, sample * args.count + at, 1, n, moved);
      for (int64_t i = 0; i < n; ++i) moved[i] = x[i] - (T)args.sigma * step[i];
      store_row(args.out, args.dtype, (args.samples + sample) * args.count + at, 1, n, moved);
    }
  });
}

template <class T>
void gradient(const NesArgs& args, const Parallel& parallel) {
  const int64_t tasks = (args.count + kChunk - 1) / kChunk;
  const Parallel serial = serial_parallel();
  for_each_task(args.count * args.samples < kSerial ? serial : parallel, tasks, [&](int64_t task) {
    const int64_t at = task * kChunk, n = std::min(kChunk, args.count - at);
    T* memory = static_cast<T*>(thread_scratch(sizeof(T) * 2 * kChunk));
    T *total = memory, *step = memory + kChunk;
    std::fill(total, total + n, T(0));
    for (int64_t s = 0; s < args.samples; ++s) {
      const T weight = (T)args.weights[s];
      if (weight == T(0)) continue;
      noise(args, (uint64_t)(args.start + s), at, n, step);
      for (int64_t i = 0; i < n; ++i) total[i] += weight * step[i];
    }
    std::memcpy(static_cast<T*>(args.sum) + at, total, (size_t)n * sizeof(T));
  });
}

void perturb_any(const NesArgs& args, const Parallel& parallel) {
  args.dtype == DType::f64 ? perturb<double>(args, parallel) : perturb<float>(args, parallel);
}
void gradient_any(const NesArgs& args, const Parallel& parallel) {
  args.dtype == DType::f64 ? gradient<double>(args, parallel) : gradient<float>(args, parallel);
}

}  // namespace

extern const NesKernels kNes;
const NesKernels kNes = {perturb_any, gradient_any};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
