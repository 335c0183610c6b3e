#include <cmath>
#include <cstring>
#include <deque>
#include <vector>

#include "cuda_runtime.h"
#include "tensor_core_instructions.h"

namespace emulation {
namespace {

constexpr size_t kBytes = 16;
constexpr unsigned kLanes = 32;

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // nullptr: zeros
};
struct Thread {
  std::vector<Copy> open;  // not in a group yet
  std::deque<std::vector<Copy>> groups;
};
std::vector<Thread> threads;
long begun = 0, pending = 0, conflicts = 0;

Thread& own_thread() {
  if (threads.size() <= threadIdx.x) threads.resize(threadIdx.x + 1);
  return threads[threadIdx.x];
}

void check_aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % kBytes != 0) fail(what);
}

// Every number of a 16-bit type, by its bits.
const float* numbers_of(transfuse::DType dtype) {
  static std::vector<float> tables[2];
  std::vector<float>& table = tables[dtype == transfuse::DType::f16];
  if (table.empty()) {
    for (unsigned bits = 0; bits < 1u << 16; ++bits) {
      const uint16_t half[4] = {(uint16_t)bits};
      table.push_back((float)selftest::load_as(dtype, half, 0));
    }
  }
  return table.data();
}

float cut(double x) {
  const float f = (float)x;
  return std::fabs((double)f) > std::fabs(x) && std::isfinite(f) ? std::nextafterf(f, 0.0f) : f;
}

// sum + x[0] y[0] + ... + x[7] y[7]
float add_products(float sum, const float* x, const float* y) {
  double product[8], plain = (double)sum, largest = std::fabs((double)sum);
  for (int k = 0; k < 8; ++k) {
    product[k] = (double)x[k] * (double)y[k];  // exact
    plain += product[k];
    largest = std::fmax(largest, std::fabs(product[k]));
  }
  if (!std::isfinite(plain) || largest == 0.0) return (float)plain;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 23), units = 1.0 / unit;
  int64_t total = (int64_t)((double)sum * units);  // towards zero
  for (int k = 0; k < 8; ++k) total += (int64_t)(product[k] * units);
  return cut((double)total * unit);
}

}  // namespace

void begin_copy(void* to, const void* from, bool there) {
  check_aligned(to, "cp.async: the target is not a multiple of 16");
  check_aligned(from, "cp.async: the source is not a multiple of 16");
  own_thread().open.push_back(
      {static_cast<unsigned char*>(to), there ? static_cast<const unsigned char*>(from) : nullptr});
  std::memset(to, 0xff, kBytes);
  ++begun;
  ++pending;
}

void end_group() {
  Thread& own = own_thread();
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

void wait_for_groups(int most) {
  Thread& own = own_thread();
  for (; own.groups.size() > (size_t)most; own.groups.pop_front()) {
    for (const Copy& copy : own.groups.front()) {
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, kBytes);
      } else {
        std::memcpy(copy.to, copy.from, kBytes);
      }
      --pending;
    }
  }
}

long copies_begun() { return begun; }
long copies_pending() { return pending; }
long bank_conflicts() { return conflicts; }

void load_four_matrices(uint32_t (&r)[4], const void* row) {
  check_aligned(row, "ldmatrix: a row is not at a multiple of 16");
  transfuse_check_mask(0xffffffffu);
  const unsigned lane = threadIdx.x % kLanes;
  uint64_t* slots = exchange_slots();
  slots[lane] = reinterpret_cast<uintptr_t>(row);
  wait_for_warp();
  if (lane % 8 == 0) {  // 8 rows of 16 bytes are all 32 banks of 4 bytes, once
    unsigned used = 0;
    for (unsigned r = 0; r < 8; ++r) used |= 1u << slots[lane + r] / kBytes % 8;
    conflicts += used != 0xff;
  }
  for (unsigned m = 0; m < 4; ++m) {
    const auto* from = reinterpret_cast<const unsigned char*>((uintptr_t)slots[8 * m + lane / 4]);
    std::memcpy(&r[m], from + lane % 4 * sizeof r[m], sizeof r[m]);
  }
}

void multiply_16_8_16(transfuse::DType dtype, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragment {
    float a[8], b[4];
  } own;
  const float* number = numbers_of(dtype);
  for (int i = 0; i < 8; ++i) own.a[i] = number[a[i / 2] >> 16 * (i % 2) & 0xffff];
  for (int i = 0; i < 4; ++i) own.b[i] = number[b[i / 2] >> 16 * (i % 2) & 0xffff];
  transfuse_check_mask(0xffffffffu);
  const unsigned lane = threadIdx.x % kLanes;
  uint64_t* slots = exchange_slots();
  slots[lane] = reinterpret_cast<uintptr_t>(&own);
  wait_for_warp();
  const auto fragment = [&](unsigned of) { return reinterpret_cast<const Fragment*>((uintptr_t)slots[of]); };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
    float x[16], y[16];
    for (unsigned k = 0; k < 16; ++k) {
      x[k] = fragment(row % 8 * 4 + k % 8 / 2)->a[k % 2 + (row >= 8 ? 2 : 0) + (k >= 8 ? 4 : 0)];
      y[k] = fragment(column * 4 + k % 8 / 2)->b[k % 2 + (k >= 8 ? 2 : 0)];
    }
    d[i] = add_products(add_products(d[i], x, y), x + 8, y + 8);
  }
  wait_for_warp();  // fragments lie on their threads' stacks
}

}  // namespace emulation
