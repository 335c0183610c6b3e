#include "transfuse/windows.h"

#include <algorithm>

namespace transfuse {
namespace {

struct AxisToken {
  int64_t window, slot, coordinate;
};

// The tokens of an axis, ordered by window and slot.
std::vector<AxisToken> axis_tokens(const WindowGrid& grid, int axis) {
  const int64_t size = grid.size[axis], window = grid.window[axis], shift = grid.shift[axis];
  const int64_t period = grid.pad ? (size + window - 1) / window * window : size;
  std::vector<AxisToken> tokens;
  tokens.reserve((size_t)size);
  for (int64_t y = 0; y < size; ++y) {
    if (grid.wrap == WindowGrid::Wrap::anchored) {
      const int64_t position = y + (window - (shift % window + window) % window) % window;
      tokens.push_back({position / window, position % window, y});
      continue;
    }
    const int64_t turned = (shift % period + period) % period;
    const bool wrapped = y < turned;
    const int64_t position = wrapped ? y - turned + period : y - turned;
    const bool split = grid.wrap == WindowGrid::Wrap::split;
    tokens.push_back({split ? 2 * (position / window) + (wrapped ? 1 : 0) : position / window, position % window, y});
  }
  std::sort(tokens.begin(), tokens.end(), [](const AxisToken& a, const AxisToken& b) {
    return a.window != b.window ? a.window < b.window : a.slot < b.slot;
  });
  return tokens;
}

// First indices of the windows in a sorted axis, and its length at the end.
std::vector<size_t> axis_windows(const std::vector<AxisToken>& tokens) {
  std::vector<size_t> starts;
  for (size_t i = 0; i < tokens.size(); ++i)
    if (i == 0 || tokens[i].window != tokens[i - 1].window) starts.push_back(i);
  starts.push_back(tokens.size());
  return starts;
}

}  // namespace

int64_t WindowGrid::tokens() const {
  int64_t n = 1;
  for (int a = 0; a < axes; ++a) n *= size[a];
  return n;
}

int64_t WindowGrid::bias_codes() const {
  int64_t slots = 1, offsets = 1;
  for (int a = 0; a < axes; ++a) {
    slots *= window[a];
    offsets *= 2 * window[a] - 1;
  }
  return bias == Bias::none ? 0 : bias == Bias::full ? slots * slots : offsets;
}

WindowMap::WindowMap(const WindowGrid& grid) {
  // A grid of fewer axes is one whose first axes have a single token.
  std::vector<AxisToken> axes[kMaxWindowAxes];
  std::vector<size_t> starts[kMaxWindowAxes];
  int64_t size[kMaxWindowAxes], slot_stride[kMaxWindowAxes], offset_stride[kMaxWindowAxes], centre = 0, slots = 1;
  int64_t slot_step = 1, offset_step = 1;
  for (int k = kMaxWindowAxes - 1; k >= 0; --k) {
    const int axis = k - (kMaxWindowAxes - grid.axes);
    axes[k] = axis >= 0 ? axis_tokens(grid, axis) : std::vector<AxisToken>{{0, 0, 0}};
    starts[k] = axis_windows(axes[k]);
    size[k] = axis >= 0 ? grid.size[axis] : 1;
    const int64_t window = axis >= 0 ? grid.window[axis] : 1;
    slot_stride[k] = slot_step;
    offset_stride[k] = offset_step;
    centre += (window - 1) * offset_step;
    slot_step *= window;
    offset_step *= 2 * window - 1;
  }
  slots = slot_step;
  codes = grid.bias_codes();
  const size_t count = (size_t)grid.tokens();
  tokens.reserve(count);
  if (codes > 0) {
    query_code.reserve(count);
    key_code.reserve(count);
  }
  offsets.push_back(0);
  for (size_t wt = 0; wt + 1 < starts[0].size(); ++wt)
    for (size_t wy = 0; wy + 1 < starts[1].size(); ++wy)
      for (size_t wx = 0; wx + 1 < starts[2].size(); ++wx) {
        for (size_t t = starts[0][wt]; t < starts[0][wt + 1]; ++t)
          for (size_t y = starts[1][wy]; y < starts[1][wy + 1]; ++y)
            for (size_t x = starts[2][wx]; x < starts[2][wx + 1]; ++x) {
              const AxisToken &a = axes[0][t], &b = axes[1][y], &c = axes[2][x];
              tokens.push_back((int32_t)((a.coordinate * size[1] + b.coordinate) * size[2] + c.coordinate));
              if (grid.bias == WindowGrid::Bias::full) {
                const int64_t slot = a.slot * slot_stride[0] + b.slot * slot_stride[1] + c.slot * slot_stride[2];
                query_code.push_back((int32_t)(slot * slots));
                key_code.push_back((int32_t)slot);
              } else if (grid.bias == WindowGrid::Bias::relative) {
                const int64_t at = a.slot * offset_stride[0] + b.slot * offset_stride[1] + c.slot * offset_stride[2];
                query_code.push_back((int32_t)(at + centre));
                key_code.push_back((int32_t)-at);
              }
            }
        offsets.push_back((int64_t)tokens.size());
      }
}

Windows WindowMap::view() const {
  Windows w;
  w.tokens = tokens.data();
  w.offsets = offsets.data();
  w.count = (int64_t)offsets.size() - 1;
  w.query_code = query_code.data();
  w.key_code = key_code.data();
  w.codes = codes;
  return w;
}

}  // namespace transfuse
