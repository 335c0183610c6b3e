#include <algorithm>
#include <array>
#include <cstddef>
#include <deque>
#include <limits>
#include <vector>

#include "../../../csrc/cuda/hopper.h"
#include "cuda_runtime.h"

namespace emulation {
namespace {

using transfuse::DType;
using transfuse::kPanelBytes;
using transfuse::kSwizzleBytes;

struct Copy {
  unsigned char* to;
  const CUtensorMap* map;
  Phases* barrier;
  int corner[4];
};
struct Started {
  Product product;
  std::array<float, 32> rows;  // of registers: two rows of 16
  std::array<uint32_t, 4> given;
  std::vector<float> before;  // the result's registers, if no product under way writes them
};
struct ThreadProducts {
  std::vector<Started> open;                // not in a group yet
  std::deque<std::vector<Started>> groups;  // under way, the oldest first
  uint64_t waits = 0;                       // how often the thread has waited for some
  bool fenced = false;                      // since the last wait

  bool writes(const float* result) const {
    const auto same = [&](const Started& s) { return s.product.result == result; };
    return std::any_of(open.begin(), open.end(), same) ||
           std::any_of(groups.begin(), groups.end(), [&](const std::vector<Started>& group) {
             return std::any_of(group.begin(), group.end(), same);
           });
  }
};
struct Named {
  int arrived = 0, threads = 0;
  uint64_t generation = 0;
};

std::vector<Copy> copies;
std::vector<uint64_t> allowed;  // by warp: how many of its waits for products may end
uint64_t turns = 0;
std::vector<ThreadProducts> products;
std::array<Named, 16> named;

// The 128-byte swizzle: 16-byte pieces of a row exchanged by the row's number in its group of 8.
uint32_t swizzled(uint32_t address) { return address ^ (address / kPanelBytes % 8 * 16); }

float number_at(DType type, const void* base, size_t at) { return (float)selftest::load_as(type, base, (int64_t)at); }

// Row `line` and depth k of an operand whose rows hold the depth; or k and column `line` of one with a row for each k.
float operand(DType type, uint64_t descriptor, bool rows_hold_depth, int line, int k) {
  const auto field = [&](int bit) { return (uint32_t)(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 62 != 1) fail("a matrix descriptor without the 128-byte swizzle");
  const uint32_t panels = field(16), groups = field(32);
  const uint32_t offset = rows_hold_depth ? (uint32_t)(line / 8) * groups + (uint32_t)(line % 8 * kPanelBytes + k * 2)
                                          : (uint32_t)(line / 64) * panels + (uint32_t)(line % 64 * 2) +
                                                (uint32_t)(k / 8) * groups + (uint32_t)(k % 8 * kPanelBytes);
  return number_at(type, at_shared_address(swizzled(field(0) + offset)), 0);
}

void perform(const Copy& c) {
  const CUtensorMap& map = *c.map;
  const uint32_t start = shared_address(c.to);
  if (start % kSwizzleBytes != 0) fail("a tile is copied to a place that is not aligned to its swizzle");
  for (uint32_t row = 0; row < map.box[1]; ++row)
    for (uint32_t channel = 0; channel < map.box[0]; ++channel) {
      const int64_t at[4] = {c.corner[0] + channel, c.corner[1] + (int64_t)row, c.corner[2], c.corner[3]};
      int64_t offset = 0;
      bool inside = true;
      for (int d = 0; d < 4; ++d) {
        inside = inside && at[d] >= 0 && at[d] < (int64_t)map.size[d];
        offset += at[d] * (int64_t)map.stride[d];
      }
      unsigned char* to = at_shared_address(swizzled(start + row * kPanelBytes + channel * 2));
      if (inside)
        std::memcpy(to, map.base + offset, 2);
      else
        std::memset(to, 0, 2);
    }
  complete(c.barrier, map.box[0] * map.box[1] * 2);
}

// This thread's part of a product: rows lane / 4 and 8 more of its warp's 16, two of every eight columns.
void perform(const Started& s) {
  const Product& p = s.product;
  const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32 % 4;
  if (p.registers != nullptr && !std::equal(s.given.begin(), s.given.end(), p.registers))
    fail("registers were changed while a product was reading them");
  if (!s.before.empty()) {
    if (!std::all_of(p.result, p.result + p.columns / 2, [](float x) { return std::isnan(x); }))
      fail("registers were written while a product was writing them");
    std::copy(s.before.begin(), s.before.end(), p.result);
  }
  float left[2][16];
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 16; ++k)
      left[r][k] = p.registers != nullptr ? s.rows[(size_t)(16 * r + k)]
                                          : operand(p.type, p.left, true, 16 * warp + lane / 4 + 8 * r, k);
  for (int i = 0; i < p.columns / 2; i += 4)
    for (int c = 0; c < 2; ++c) {
      const int column = i * 2 + lane % 4 * 2 + c;
      double sum[2] = {0.0, 0.0};
      for (int k = 0; k < 16; ++k) {
        const float right = operand(p.type, p.right, p.registers == nullptr, column, k);
        for (int r = 0; r < 2; ++r) sum[r] += (double)left[r][k] * (double)right;
      }
      for (int r = 0; r < 2; ++r) {
        float& result = p.result[i + 2 * r + c];
        result = (float)(sum[r] + (p.add ? (double)result : 0.0));
      }
    }
}

void end_phase_if_over(Phases* b) {
  if (b->left != 0 || b->bytes != 0) return;
  b->parity ^= 1;
  b->left = b->members;
}

void begin() {
  copies.clear();
  products.assign(blockDim.x, {});
  allowed.assign((blockDim.x + 31) / 32, 0);
  named = {};
}
// All threads wait: one of the copies ends, or one warp's products do, whichever the turn falls on.
bool step() {
  std::vector<size_t> warps;
  for (size_t w = 0; w < allowed.size(); ++w)
    if (products[w * 32].waits > allowed[w]) warps.push_back(w);
  const size_t choices = copies.size() + warps.size();
  if (choices == 0) return false;
  turns = turns * 6364136223846793005u + 1442695040888963407u;
  const size_t chosen = (size_t)(turns >> 33) % choices;
  if (chosen >= copies.size()) {
    ++allowed[warps[chosen - copies.size()]];
    return true;
  }
  const Copy next = copies[chosen];
  copies.erase(copies.begin() + (ptrdiff_t)chosen);
  perform(next);
  return true;
}
void end() {
  if (!copies.empty()) fail("a block ended before the copies that it started");
  for (const ThreadProducts& t : products)
    if (!t.open.empty() || !t.groups.empty()) fail("a thread ended before its products");
  for (const Named& n : named)
    if (n.arrived != 0) fail("threads came to a named barrier that was not completed");
}

[[maybe_unused]] const bool installed = (set_machinery({begin, step, end}), true);

}  // namespace

void complete(Phases* b, uint32_t bytes) {
  if (b->bytes < bytes) fail("more bytes were copied than a barrier expects");
  b->bytes -= bytes;
  end_phase_if_over(b);
}

void arrive(Phases* b, uint32_t bytes) {
  if (b->initialised == 0 || b->left == 0) fail("a barrier that is not initialised, or that too many arrive at");
  b->bytes += bytes;
  --b->left;
  end_phase_if_over(b);
}

void wait_for_phase(Phases* b, uint32_t parity) {
  struct Wanted {
    const Phases* barrier;
    uint32_t parity;
  } wanted{b, parity};
  wait_until(
      [](const void* w) {
        const auto* own = static_cast<const Wanted*>(w);
        return own->barrier->parity != own->parity;
      },
      &wanted);
}

void arrive_named(int number, int threads, bool wait) {
  Named& n = named[(size_t)number];
  if (number < 1 || number > 15 || threads % 32 != 0 || (n.arrived != 0 && n.threads != threads))
    fail("a named barrier is used with other numbers of threads");
  n.threads = threads;
  struct Wanted {
    const Named* barrier;
    uint64_t generation;
  } wanted{&n, n.generation};
  if (++n.arrived == threads) {
    n.arrived = 0;
    ++n.generation;
  }
  if (!wait) return;
  wait_until(
      [](const void* w) {
        const auto* own = static_cast<const Wanted*>(w);
        return own->barrier->generation != own->generation;
      },
      &wanted);
}

void copy_tile(unsigned char* to, const CUtensorMap* map, Phases* b, const int (&corner)[4]) {
  const Copy copy{to, map, b, {corner[0], corner[1], corner[2], corner[3]}};
  if (order() == Order::forward)
    copies.push_back(copy);
  else
    perform(copy);
}

void fence_products() { products[threadIdx.x].fenced = true; }

void start_product(const Product& product) {
  ThreadProducts& own = products[threadIdx.x];
  if (!own.fenced) fail("products after a wait without a fence");
  Started s{product, {}, {}, {}};
  if (!own.writes(product.result)) {
    s.before.assign(product.result, product.result + product.columns / 2);
    std::fill(product.result, product.result + product.columns / 2, std::numeric_limits<float>::quiet_NaN());
  }
  if (product.registers != nullptr) {
    // A row's 16 numbers are with four threads: pairs of columns 2 (lane % 4), of both rows, and the same 8 further.
    std::copy(product.registers, product.registers + 4, s.given.begin());
    const unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 4; ++i) {
      uint64_t* slots = exchange_slots();
      slots[lane] = product.registers[i];
      wait_for_warp();
      for (unsigned t = 0; t < 4; ++t) {
        const uint32_t pair = (uint32_t)slots[lane / 4 * 4 + t];
        for (unsigned c = 0; c < 2; ++c) {
          const uint64_t bits = pair >> 16 * c;
          s.rows[16 * (i % 2) + 8 * (i / 2) + 2 * t + c] = number_at(product.type, &bits, 0);
        }
      }
    }
  }
  own.open.push_back(s);
}

void commit_products() {
  ThreadProducts& own = products[threadIdx.x];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

void wait_for_products(int pending) {
  ThreadProducts& own = products[threadIdx.x];
  if (!own.open.empty()) fail("products are waited for that are not in a group");
  own.fenced = false;
  if ((int)own.groups.size() <= pending) return;
  const struct Wait {
    const uint64_t* allowed;
    uint64_t number;
  } wait{&allowed[threadIdx.x / 32], ++own.waits};
  wait_until(
      [](const void* w) {
        const auto* own_wait = static_cast<const Wait*>(w);
        return *own_wait->allowed >= own_wait->number;
      },
      &wait);
  while ((int)own.groups.size() > pending) {
    for (const Started& s : own.groups.front()) perform(s);
    own.groups.pop_front();
  }
  wait_for_warp();  // a warp waits as one
}

}  // namespace emulation
