// What the self-tests of the torch-free kernels share: a tally, arrays whose memory ends where their last element does
// (so that AddressSanitizer sees a read one element too far), and naive conversions of the storage types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace selftest {

using transfuse::DType;

struct Tally {
  long passed = 0, failed = 0;
};
inline Tally& tally() {
  static Tally t;
  return t;
}
inline void check(bool ok, const std::string& what) {
  ++(ok ? tally().passed : tally().failed);
  if (!ok && tally().failed <= 50) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

// ---- random numbers: one small generator, so that a failing case can be repeated from its number -----------------

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 0x853c49e6748fea9bull) {}
  uint64_t next() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
  bool chance(int percent) { return below(100) < percent; }
  double uniform() { return (double)(next() >> 11) * 0x1p-53 * 2.0 - 1.0; }  // [-1, 1)
  template <class T>
  T pick(const std::vector<T>& values) {
    return values[(size_t)below((int64_t)values.size())];
  }
};

// ---- storage types ------------------------------------------------------------------------------------------------

inline const char* name_of(DType t) {
  switch (t) {
    case DType::f32: return "f32";
    case DType::f64: return "f64";
    case DType::bf16: return "bf16";
    case DType::f16: return "f16";
  }
  return "?";
}

// Distance from 1 to the next number of the type.
inline double epsilon(DType t) {
  switch (t) {
    case DType::f32: return 0x1p-23;
    case DType::f64: return 0x1p-52;
    case DType::bf16: return 0x1p-7;
    case DType::f16: return 0x1p-10;
  }
  return 0;
}
inline DType statistics_of(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

// Rounds to `bits` significant bits, ties to even; `lowest` is the exponent of the smallest normal number.
inline double round_to(double x, int bits, int lowest) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int unit = (exponent - 1 < lowest ? lowest : exponent - 1) - bits + 1;
  return std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
}

inline void store_as(DType t, void* base, int64_t at, double x) {
  switch (t) {
    case DType::f32: static_cast<float*>(base)[at] = (float)x; return;
    case DType::f64: static_cast<double*>(base)[at] = x; return;
    case DType::bf16: {
      const float f = (float)round_to(x, 8, -126);
      uint32_t u;
      std::memcpy(&u, &f, 4);
      static_cast<uint16_t*>(base)[at] = (uint16_t)(u >> 16);
      return;
    }
    case DType::f16: {
      uint16_t sign = std::signbit(x) ? 0x8000 : 0, bits;
      const double a = std::fabs(round_to(x, 11, -14));
      if (std::isnan(x)) {
        bits = 0x7e00;
      } else if (a >= 65536.0) {
        bits = 0x7c00;
      } else if (a < 0x1p-14) {
        bits = (uint16_t)(a * 0x1p24);
      } else {
        int exponent;
        const double fraction = std::frexp(a, &exponent);
        bits = (uint16_t)(((exponent + 14) << 10) + (int)((fraction * 2.0 - 1.0) * 1024.0));
      }
      static_cast<uint16_t*>(base)[at] = (uint16_t)(sign | bits);
      return;
    }
  }
}

inline double load_as(DType t, const void* base, int64_t at) {
  switch (t) {
    case DType::f32: return (double)static_cast<const float*>(base)[at];
    case DType::f64: return static_cast<const double*>(base)[at];
    case DType::bf16: {
      const uint32_t u = (uint32_t)static_cast<const uint16_t*>(base)[at] << 16;
      float f;
      std::memcpy(&f, &u, 4);
      return (double)f;
    }
    case DType::f16: {
      const uint16_t h = static_cast<const uint16_t*>(base)[at];
      const int exponent = h >> 10 & 31, fraction = h & 1023;
      double a;
      if (exponent == 31) {
        a = fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
      } else {
        a = exponent == 0 ? std::ldexp((double)fraction, -24) : std::ldexp((double)(1024 + fraction), exponent - 25);
      }
      return h & 0x8000 ? -a : a;
    }
  }
  return 0;
}

// ---- arrays -------------------------------------------------------------------------------------------------------

// Where elements of a (batch, head, token, channel) array lie.
enum class Layout { heads_first, tokens_first, spread, channels_strided, offset, padded_rows, padded_packs };

// Up to four axes in memory that ends with the last element. What lies between elements is NaN, and must stay it.
class Array {
 public:
  Array() = default;
  Array(DType dtype, std::vector<int64_t> shape, Layout layout = Layout::heads_first,
        std::vector<bool> broadcast = {false, false, false, false})
      : dtype_(dtype), shape_(std::move(shape)) {
    while (shape_.size() < 4) shape_.push_back(1);
    int64_t held[4];
    for (int d = 0; d < 4; ++d) held[d] = d < (int)broadcast.size() && broadcast[(size_t)d] ? 1 : shape_[(size_t)d];
    std::vector<int> order{3, 2, 1, 0};
    if (layout == Layout::tokens_first) order = {3, 1, 2, 0};
    int64_t step = layout == Layout::channels_strided ? 2 : 1;
    for (const int d : order) {
      stride_[d] = d < (int)broadcast.size() && broadcast[(size_t)d] ? 0 : step;
      step *= held[d] > 0 ? held[d] : 1;
      if (layout == Layout::spread && d != 0) step += 3;
      if (layout == Layout::padded_rows && d == 2) step += 3;
      if (layout == Layout::padded_packs && d == 2) step += 16 / transfuse::item_size(dtype);
    }
    if (layout == Layout::offset) offset_ = 5;
    count_ = offset_ + 1;
    for (int d = 0; d < 4; ++d) {
      if (shape_[(size_t)d] == 0) empty_ = true;
      count_ += (held[d] - 1) * stride_[d];
    }
    if (empty_) count_ = offset_ = 0;
    memory_.reset((size_t)(count_ * transfuse::item_size(dtype_)));
    for (int64_t i = 0; i < count_; ++i) store_as(dtype_, memory_.data, i, std::numeric_limits<double>::quiet_NaN());
  }

  bool exists() const { return !shape_.empty(); }
  bool empty() const { return empty_; }
  DType dtype() const { return dtype_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t stride(int d) const { return stride_[d]; }
  int64_t at(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return offset_ + a * stride_[0] + b * stride_[1] + c * stride_[2] + d * stride_[3];
  }
  double get(int64_t a, int64_t b, int64_t c, int64_t d = 0) const {
    return load_as(dtype_, memory_.data, at(a, b, c, d));
  }
  void set(int64_t a, int64_t b, int64_t c, int64_t d, double x) { store_as(dtype_, memory_.data, at(a, b, c, d), x); }
  void add(int64_t a, int64_t b, int64_t c, int64_t d, double x) { set(a, b, c, d, get(a, b, c, d) + x); }

  template <class F>
  void each(const F& body) const {
    for (int64_t a = 0; a < shape_[0]; ++a)
      for (int64_t b = 0; b < shape_[1]; ++b)
        for (int64_t c = 0; c < shape_[2]; ++c)
          for (int64_t d = 0; d < shape_[3]; ++d) body(a, b, c, d);
  }
  void fill(double x) {
    each([&](int64_t a, int64_t b, int64_t c, int64_t d) { set(a, b, c, d, x); });
  }
  void randomize(Random& random, double size = 1.0) {
    each([&](int64_t a, int64_t b, int64_t c, int64_t d) { set(a, b, c, d, size * random.uniform()); });
  }
  double largest() const {
    double top = 0;
    each([&](int64_t a, int64_t b, int64_t c, int64_t d) { top = std::fmax(top, std::fabs(get(a, b, c, d))); });
    return top;
  }
  // Whether everything between the elements still is NaN.
  bool gaps_untouched() const {
    std::vector<char> used((size_t)count_, 0);
    each([&](int64_t a, int64_t b, int64_t c, int64_t d) { used[(size_t)at(a, b, c, d)] = 1; });
    for (int64_t i = 0; i < count_; ++i)
      if (used[(size_t)i] == 0 && !std::isnan(load_as(dtype_, memory_.data, i))) return false;
    return true;
  }
  bool same_bytes(const Array& other) const {
    return count_ == other.count_ &&
           std::memcmp(memory_.data, other.memory_.data, (size_t)(count_ * transfuse::item_size(dtype_))) == 0;
  }

  void* data() const {
    return empty_ ? nullptr : static_cast<char*>(memory_.data) + offset_ * transfuse::item_size(dtype_);
  }
  transfuse::View view() const {
    transfuse::View v;
    if (!exists()) return v;
    v.ptr = data();
    v.dtype = dtype_;
    for (int d = 0; d < 4; ++d) v.stride[d] = stride_[d];
    return v;
  }
  transfuse::MutableView mutable_view() {
    transfuse::MutableView v;
    if (!exists()) return v;
    v.ptr = data();
    v.dtype = dtype_;
    for (int d = 0; d < 4; ++d) v.stride[d] = stride_[d];
    return v;
  }

 private:
  struct Memory {
    void* data = nullptr;
    size_t size = 0;
    Memory() = default;
    Memory(const Memory& other) { copy(other); }
    Memory& operator=(const Memory& other) {
      if (this != &other) copy(other);
      return *this;
    }
    ~Memory() { std::free(data); }
    void reset(size_t bytes) {
      std::free(data);
      data = std::malloc(bytes > 0 ? bytes : 1);
      size = bytes;
      if (data == nullptr) std::abort();
    }
    void copy(const Memory& other) {
      reset(other.size);
      if (size > 0) std::memcpy(data, other.data, size);
    }
  };
  DType dtype_ = DType::f32;
  std::vector<int64_t> shape_;
  int64_t stride_[4] = {0, 0, 0, 0};
  int64_t offset_ = 0, count_ = 0;
  bool empty_ = false;
  Memory memory_;
};

// |got - want| <= factor * epsilon * max(1, largest want); NaN where NaN is not wanted fails.
inline void check_close(const Array& got, const Array& want, double factor, double epsilon, const std::string& what) {
  const double band = factor * epsilon * std::fmax(1.0, want.largest());
  double worst = 0;
  bool ok = true;
  got.each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
    const double x = got.get(a, b, c, d), y = want.get(a, b, c, d);
    if (x == y) return;  // infinities
    const double error = std::fabs(x - y);
    if (!(error <= band)) ok = false;
    if (!(error <= worst)) worst = error;
  });
  char text[64];
  std::snprintf(text, sizeof text, ": error %.3g, allowed %.3g", worst, band);
  check(ok, what + text);
}

}  // namespace selftest
