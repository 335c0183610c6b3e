// The window map of window_attention: which tokens share a window, and where each stands in it.
#pragma once

#include <cstdint>
#include <vector>

#include "transfuse/attention.h"

namespace transfuse {

constexpr int kMaxWindowAxes = 3;

// How windows lie on a grid of tokens. On each axis, with period P = size, or size rounded up to whole windows when
// `pad`: a cyclic or split token y stands at (y - shift) mod P, an anchored one at y + (-shift mod window); its window
// is that position div window, its slot the remainder.
struct WindowGrid {
  enum class Wrap : int {
    cyclic = 0,    // tokens that come round the edge share the window of their neighbours there
    split = 1,     // as cyclic, but the window falls in two at the seam
    anchored = 2,  // nothing comes round: windows at the border are cut off
  };
  enum class Bias : int { none = 0, full = 1, relative = 2 };
  int axes = 0;
  int64_t size[kMaxWindowAxes], window[kMaxWindowAxes], shift[kMaxWindowAxes];
  Wrap wrap = Wrap::cyclic;
  bool pad = false;
  Bias bias = Bias::none;

  int64_t tokens() const;
  // Elements of the bias of one head: L * L for L slots, or the product of 2 window - 1 over the axes.
  int64_t bias_codes() const;
};

// Owns the tables that a Windows points to. Windows are ordered by row, tokens in a window by slot.
struct WindowMap {
  std::vector<int32_t> tokens, query_code, key_code;
  std::vector<int64_t> offsets;
  int64_t codes = 0;
  explicit WindowMap(const WindowGrid& grid);
  Windows view() const;
};

}  // namespace transfuse
