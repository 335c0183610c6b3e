// Attention as naive loops in double precision, its derivatives, and the problems they are given. The loops themselves
// are checked by finite differences in attention_selftest.h.
#pragma once

#include "check.h"
#include "transfuse/attention.h"

namespace selftest {

using transfuse::AttentionShape;
using transfuse::Causal;

inline double minus_infinity() { return -std::numeric_limits<double>::infinity(); }

// Bytes of a boolean mask over (batch, head, query, key), axes of 1 broadcast, memory ending with the last element.
struct Mask {
  std::vector<int64_t> held;  // empty = absent
  int64_t stride[4] = {0, 0, 0, 0};
  std::vector<uint8_t> bytes;

  void make(const std::vector<int64_t>& shape, int step) {
    held = shape;
    int64_t at = step, count = 1;
    for (int d = 3; d >= 0; --d) {
      stride[d] = shape[(size_t)d] == 1 ? 0 : at;
      at *= shape[(size_t)d];
      count += (shape[(size_t)d] - 1) * stride[d];
      if (shape[(size_t)d] == 0) held.clear();
    }
    if (!held.empty()) bytes = std::vector<uint8_t>((size_t)count, 0);
  }
  uint8_t& at(int64_t b, int64_t h, int64_t i, int64_t j) {
    return bytes[(size_t)(b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3])];
  }
  bool allows(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return held.empty() || bytes[(size_t)(b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3])] != 0;
  }
  transfuse::View view() const {
    transfuse::View v;
    if (held.empty()) return v;
    v.ptr = bytes.data();
    for (int d = 0; d < 4; ++d) v.stride[d] = stride[d];
    return v;
  }
};

struct Mix {             // a blend partner
  Array other, weights;  // weights absent: `weight` for all
  double weight = 0.5;
  std::vector<int64_t> index;

  double weight_at(int64_t b, int64_t h, int64_t t) const { return weights.exists() ? weights.get(b, h, t) : weight; }
  transfuse::BlendView view() const {
    transfuse::BlendView v;
    if (!other.exists()) return v;
    v.other = other.view();
    v.batch = other.shape()[0];
    v.index = index.empty() ? nullptr : index.data();
    v.weight.view = weights.view();
    v.weight.value = weight;
    return v;
  }
  // The mixed element of x.
  double apply(const Array& x, int64_t b, int64_t h, int64_t t, int64_t d) const {
    if (!other.exists()) return x.get(b, h, t, d);
    const double w = weight_at(b, h, t);
    const int64_t ob = !index.empty() ? index[(size_t)b] : other.shape()[0] == 1 ? 0 : b;
    if (w == 0.0) return x.get(b, h, t, d);
    if (w == 1.0) return other.get(ob, h, t, d);
    return (1.0 - w) * x.get(b, h, t, d) + w * other.get(ob, h, t, d);
  }
};

struct Source {
  Array key, value, bias, key_tangent, value_tangent, bias_tangent;
  Mask mask;
  Mix mix;
  std::vector<int64_t> index;
  int64_t batch = 0, length = 0;
  double scale = 1.0;
  Causal causal = Causal::none;
  int group = 0;

  int64_t batch_of(int64_t b) const { return !index.empty() ? index[(size_t)b] : batch == 1 ? 0 : b; }
  bool allows(int64_t b, int64_t h, int64_t i, int64_t j, int64_t queries) const {
    if (causal == Causal::upper_left && j > i) return false;
    if (causal == Causal::lower_right && j > i + length - queries) return false;
    return mask.allows(b, h, i, j);
  }
  transfuse::SourceView view() const {
    transfuse::SourceView v;
    v.key = key.view();
    v.value = value.view();
    v.batch = batch;
    v.length = length;
    v.index = index.empty() ? nullptr : index.data();
    v.bias = bias.view();
    v.mask = mask.view();
    v.scale = scale;
    v.causal = causal;
    v.group = group;
    v.key_blend = mix.view();
    return v;
  }
};

struct Gate {
  Array tensor;
  double value = 1.0;
  double at(int64_t b, int64_t h, int64_t i) const { return tensor.exists() ? tensor.get(b, h, i) : value; }
};

struct Problem {
  AttentionShape shape{};
  Array query, query_tangent, grad_out, grad_lse;  // grad_lse may be absent
  Mix mix;
  std::vector<Source> sources;
  std::vector<Gate> gates{Gate{}};
  std::string name;

  std::vector<transfuse::SourceView> views() const {
    std::vector<transfuse::SourceView> v;
    for (const Source& s : sources) v.push_back(s.view());
    return v;
  }
  Array like_output(DType t, int64_t width, Layout layout) const {
    return Array(t, {shape.batch, shape.heads, shape.queries, width}, layout);
  }
};

// ---- naive loops ---------------------------------------------------------------------------------------------------

struct Key {  // one key as one query row sees it
  int source;
  int64_t batch, head, j;
  double logit, p;
};

// Keys of one group that row i may attend to, with their probabilities; returns the log-sum-exp.
inline double naive_row(const Problem& p, int group, int64_t b, int64_t h, int64_t i, std::vector<Key>& keys) {
  keys.clear();
  double top = minus_infinity();
  const AttentionShape& s = p.shape;
  std::vector<double> q((size_t)s.key_dim);
  for (int64_t d = 0; d < s.key_dim; ++d) q[(size_t)d] = p.mix.apply(p.query, b, h, i, d);
  for (size_t n = 0; n < p.sources.size(); ++n) {
    const Source& source = p.sources[n];
    if (source.group != group) continue;
    const int64_t sb = source.batch_of(b), kh = h / (s.heads / s.kv_heads);
    for (int64_t j = 0; j < source.length; ++j) {
      if (!source.allows(b, h, i, j, s.queries)) continue;
      double dot = 0;
      for (int64_t d = 0; d < s.key_dim; ++d) dot += q[(size_t)d] * source.mix.apply(source.key, sb, kh, j, d);
      double logit = source.scale * dot;
      if (source.bias.exists()) logit += source.bias.get(b, h, i, j);
      if (logit == minus_infinity()) continue;
      top = std::fmax(top, logit);
      keys.push_back({(int)n, sb, kh, j, logit, 0.0});
    }
  }
  if (keys.empty()) return minus_infinity();
  double sum = 0;
  for (Key& key : keys) sum += key.p = std::exp(key.logit - top);
  for (Key& key : keys) key.p /= sum;
  return top + std::log(sum);
}

inline double largest_logit(const Problem& p) {
  double top = 0;
  std::vector<Key> keys;
  p.query.each([&](int64_t b, int64_t h, int64_t i, int64_t d) {
    if (d != 0) return;
    for (size_t g = 0; g < p.gates.size(); ++g) {
      naive_row(p, (int)g, b, h, i, keys);
      for (const Key& key : keys) top = std::fmax(top, std::fabs(key.logit));
    }
  });
  return top;
}

struct Forward {
  Array out, lse;
};
inline Forward naive_forward(const Problem& p) {
  Forward f{p.like_output(DType::f64, p.shape.value_dim, Layout::heads_first),
            p.like_output(DType::f64, 1, Layout::heads_first)};
  f.out.fill(0.0);
  std::vector<Key> keys;
  f.lse.each([&](int64_t b, int64_t h, int64_t i, int64_t) {
    for (size_t g = 0; g < p.gates.size(); ++g) {
      const double lse = naive_row(p, (int)g, b, h, i, keys), gate = p.gates[g].at(b, h, i);
      f.lse.set(b, h, i, 0, lse);
      if (gate == 0.0) continue;
      for (const Key& key : keys)
        for (int64_t d = 0; d < p.shape.value_dim; ++d)
          f.out.add(b, h, i, d, gate * key.p * p.sources[(size_t)key.source].value.get(key.batch, key.head, key.j, d));
    }
  });
  return f;
}

struct Gradients {
  Array query;
  std::vector<Array> keys, values, biases;
};
inline Gradients no_gradients(const Problem& p) {
  Gradients g;
  g.query = p.like_output(DType::f64, p.shape.key_dim, Layout::heads_first);
  g.query.fill(0.0);
  for (const Source& s : p.sources) {
    g.keys.emplace_back(DType::f64, s.key.shape());
    g.values.emplace_back(DType::f64, s.value.shape());
    g.keys.back().fill(0.0);
    g.values.back().fill(0.0);
    g.biases.emplace_back();
    if (!s.bias.exists()) continue;
    std::vector<bool> reduced;
    for (int d = 0; d < 4; ++d) reduced.push_back(s.bias.stride(d) == 0);
    g.biases.back() = Array(DType::f64, s.bias.shape(), Layout::heads_first, reduced);
    g.biases.back().fill(0.0);
  }
  return g;
}

struct Tangents {
  Array out, lse;
};
// Tangents of the outputs, and gradients of <grad_out, out> + <grad_lse, lse>; with `second`, of the same of the
// tangents.
inline void naive_derivatives(const Problem& p, bool second, Tangents* tangents, Gradients* gradients) {
  const AttentionShape& s = p.shape;
  if (tangents != nullptr) {
    tangents->out = p.like_output(DType::f64, s.value_dim, Layout::heads_first);
    tangents->lse = p.like_output(DType::f64, 1, Layout::heads_first);
    tangents->out.fill(0.0);
  }
  if (gradients != nullptr) *gradients = no_gradients(p);
  std::vector<Key> keys;
  p.like_output(DType::f64, 1, Layout::heads_first).each([&](int64_t b, int64_t h, int64_t i, int64_t) {
    naive_row(p, 0, b, h, i, keys);
    const size_t n = keys.size();
    std::vector<double> t(n, 0.0), w(n, 0.0), z(n, 0.0);
    double mean_t = 0, mean_w = 0;
    for (size_t m = 0; m < n; ++m) {
      const Key& key = keys[m];
      const Source& source = p.sources[(size_t)key.source];
      if (second || tangents != nullptr) {
        for (int64_t d = 0; d < s.key_dim; ++d)
          t[m] += source.scale * (p.query_tangent.get(b, h, i, d) * source.key.get(key.batch, key.head, key.j, d) +
                                  p.query.get(b, h, i, d) * source.key_tangent.get(key.batch, key.head, key.j, d));
        if (source.bias_tangent.exists()) t[m] += source.bias_tangent.get(b, h, i, key.j);
        mean_t += key.p * t[m];
      }
      for (int64_t d = 0; d < s.value_dim; ++d) {
        w[m] += p.grad_out.get(b, h, i, d) * source.value.get(key.batch, key.head, key.j, d);
        if (second) z[m] += p.grad_out.get(b, h, i, d) * source.value_tangent.get(key.batch, key.head, key.j, d);
      }
      mean_w += key.p * w[m];
    }
    if (tangents != nullptr) {
      tangents->lse.set(b, h, i, 0, mean_t);
      for (size_t m = 0; m < n; ++m) {
        const Key& key = keys[m];
        const Source& source = p.sources[(size_t)key.source];
        for (int64_t d = 0; d < s.value_dim; ++d)
          tangents->out.add(b, h, i, d,
                            key.p * ((t[m] - mean_t) * source.value.get(key.batch, key.head, key.j, d) +
                                     source.value_tangent.get(key.batch, key.head, key.j, d)));
      }
    }
    if (gradients == nullptr) return;
    const double grad_lse = p.grad_lse.exists() ? p.grad_lse.get(b, h, i) : 0.0;
    const double delta = mean_w - grad_lse;
    // rho = sum_j G.out' - mu D written out over the keys.
    double rho = 0;
    for (size_t m = 0; m < n; ++m) rho += keys[m].p * ((t[m] - mean_t) * w[m] + z[m]);
    rho -= mean_t * delta;
    for (size_t m = 0; m < n; ++m) {
      const Key& key = keys[m];
      const Source& source = p.sources[(size_t)key.source];
      const double ds = key.p * (w[m] - delta);
      const double x = second ? key.p * (t[m] * (w[m] - delta) - mean_t * w[m] + z[m] - rho) : ds;
      const double u = second ? key.p * (t[m] - mean_t) : key.p;
      Array &dk = gradients->keys[(size_t)key.source], &dv = gradients->values[(size_t)key.source];
      for (int64_t d = 0; d < s.key_dim; ++d) {
        double for_query = x * source.key.get(key.batch, key.head, key.j, d), for_key = x * p.query.get(b, h, i, d);
        if (second) {
          for_query += ds * source.key_tangent.get(key.batch, key.head, key.j, d);
          for_key += ds * p.query_tangent.get(b, h, i, d);
        }
        gradients->query.add(b, h, i, d, source.scale * for_query);
        dk.add(key.batch, key.head, key.j, d, source.scale * for_key);
      }
      for (int64_t d = 0; d < s.value_dim; ++d) dv.add(key.batch, key.head, key.j, d, u * p.grad_out.get(b, h, i, d));
      if (source.bias.exists()) gradients->biases[(size_t)key.source].add(b, h, i, key.j, x);
    }
  });
}

// <grad_out, out> + <grad_lse, lse>, or the same of the tangents.
inline double naive_objective(const Problem& p, bool second) {
  Tangents t;
  Array out, lse;
  if (second) {
    naive_derivatives(p, true, &t, nullptr);
    out = t.out;
    lse = t.lse;
  } else {
    const Forward f = naive_forward(p);
    out = f.out;
    lse = f.lse;
  }
  double total = 0;
  out.each(
      [&](int64_t b, int64_t h, int64_t i, int64_t d) { total += p.grad_out.get(b, h, i, d) * out.get(b, h, i, d); });
  lse.each([&](int64_t b, int64_t h, int64_t i, int64_t) { total += p.grad_lse.get(b, h, i) * lse.get(b, h, i); });
  return total;
}

inline void check_derivative_of(Problem& p, Array& x, const Array& gradient, bool second, const std::string& what) {
  const double step = 1e-5;
  double worst = 0;
  Random random(7);
  for (int trial = 0; trial < 6; ++trial) {
    int64_t c[4];
    for (int d = 0; d < 4; ++d) c[d] = random.below(x.shape()[(size_t)d]);
    const double kept = x.get(c[0], c[1], c[2], c[3]);
    x.set(c[0], c[1], c[2], c[3], kept + step);
    const double above = naive_objective(p, second);
    x.set(c[0], c[1], c[2], c[3], kept - step);
    const double below = naive_objective(p, second);
    x.set(c[0], c[1], c[2], c[3], kept);
    worst = std::fmax(worst, std::fabs((above - below) / (2 * step) - gradient.get(c[0], c[1], c[2], c[3])));
  }
  check(worst < 1e-7, what + ": finite differences differ by " + std::to_string(worst));
}

}  // namespace selftest
