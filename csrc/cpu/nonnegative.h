// The active-set solver of min_{x >= 0} x' G x / 2 + q' x (Lawson and Hanson's method in the Gram form of Bro and de
// Jong), with a Cholesky factor that grows by a row when an unknown becomes positive and is updated when one leaves.
// G may be singular: an unknown whose column depends on the positive ones moves along the null direction until another
// becomes 0, and where none does the programme is unbounded along it. Exact up to rounding, finite, deterministic: of
// equal slopes the lowest index enters, of equal steps the first in the set leaves.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr double kEpsilon = 0x1p-52;

// Unknowns as large as this, where the diagonal of G and the largest |q| are 1, mean that the programme is unbounded.
constexpr double kEndless = 1e12;

enum class Outcome { solved, unbounded, stopped };

// One more row of a Cholesky factor of `rank` rows: solves for its entries z, given those of the matrix, and returns
// the square that is left of the diagonal entry. `doubt` is how much of it may be rounding: squared errors e of z,
// carried along as if independent. What is left counts as more than 0 only beyond that.
template <class Entry>
double left_of(int64_t rank, const double* l, int64_t stride, double diagonal, const Entry& entry, double* z, double* e,
               double* doubt) {
  double left = diagonal, square = kEpsilon * diagonal * kEpsilon * diagonal;
  for (int64_t k = 0; k < rank; ++k) {
    const double* row = l + k * stride;
    const double first = entry(k);
    double value = first, error = kEpsilon * first * kEpsilon * first;
    for (int64_t i = 0; i < k; ++i) {
      const double term = row[i] * z[i];
      value -= term;
      error += kEpsilon * term * kEpsilon * term + row[i] * row[i] * e[i];
    }
    z[k] = value / row[k];
    e[k] = error / (row[k] * row[k]);
    left -= z[k] * z[k];
    square += 4.0 * z[k] * z[k] * e[k];
  }
  *doubt = 32.0 * std::sqrt(square);
  return left;
}

class Nonnegative {
 public:
  // Doubles of working memory for n unknowns (the list of indices among them).
  static int64_t memory(int64_t n) { return 2 * n * n + 10 * n; }

  Nonnegative(int64_t n, double* memory) : n_(n) {
    const auto take = [&](int64_t count) {
      double* p = memory;
      memory += count;
      return p;
    };
    g_ = take(n * n);
    l_ = take(n * n);
    d_ = take(n);
    q_ = take(n);
    x_ = take(n);
    s_ = take(n);
    z_ = take(n);
    v_ = take(n);
    e_ = take(n);
    ray_ = take(n);
    at_ = reinterpret_cast<int64_t*>(take(n));
    state_ = reinterpret_cast<int64_t*>(take(n));
  }

  // x and, where unbounded, a direction ray >= 0 along which the objective falls for ever.
  Outcome solve(const double* g, const double* q, int64_t iterations, double tolerance, double* x, double* ray) {
    scale(g, q);
    std::fill(x_, x_ + n_, 0.0);
    std::fill(state_, state_ + n_, kZero);
    p_ = 0;
    Outcome outcome = Outcome::stopped;
    for (int64_t i = 0; i < iterations; ++i) {
      const int64_t j = steepest(tolerance);
      if (j < 0) {
        outcome = Outcome::solved;
        break;
      }
      if (!enter(j)) {
        outcome = Outcome::unbounded;
        break;
      }
    }
    for (int64_t i = 0; i < n_; ++i) x[i] = x_[i] * d_[i] * size_;
    if (ray != nullptr)
      for (int64_t i = 0; i < n_; ++i) ray[i] = ray_[i] * d_[i];
    return outcome;
  }

  // Largest violation of the optimality conditions by the x that solve() found, in units of the largest |q|.
  double residual() const {
    double worst = 0.0;
    for (int64_t i = 0; i < n_; ++i) {
      double slope = q_[i];
      for (int64_t j = 0; j < n_; ++j) slope += g_[i * n_ + j] * x_[j];
      worst = std::max(worst, x_[i] > 0.0 ? std::fabs(slope) : -slope);
    }
    return worst;
  }

 private:
  static constexpr int64_t kZero = 0, kPositive = 1, kBlocked = 2;

  // Unit diagonal and largest |q| = 1: then tolerances have a meaning.
  void scale(const double* g, const double* q) {
    size_ = 0.0;
    for (int64_t i = 0; i < n_; ++i) {
      const double own = g[i * n_ + i];
      d_[i] = own > 0.0 ? 1.0 / std::sqrt(own) : 1.0;
      q_[i] = q[i] * d_[i];
      size_ = std::max(size_, std::fabs(q_[i]));
    }
    if (size_ == 0.0) size_ = 1.0;
    for (int64_t i = 0; i < n_; ++i) {
      q_[i] /= size_;
      for (int64_t j = 0; j < n_; ++j) g_[i * n_ + j] = 0.5 * (g[i * n_ + j] + g[j * n_ + i]) * d_[i] * d_[j];
    }
  }

  // The unknown at 0 along which the objective falls fastest; -1 if none does.
  int64_t steepest(double tolerance) {
    double total = 1.0;
    for (int64_t k = 0; k < p_; ++k) total += x_[at_[k]];
    const double least = std::max(tolerance, 16.0 * kEpsilon * total);
    int64_t best = -1;
    double most = least;
    for (int64_t j = 0; j < n_; ++j) {
      if (state_[j] != kZero) continue;
      double fall = -q_[j];
      const double* row = g_ + j * n_;
      for (int64_t k = 0; k < p_; ++k) fall -= row[at_[k]] * x_[at_[k]];
      if (fall > most) most = fall, best = j;
    }
    return best;
  }

  // z = L^-1 (column j of G on the set); the square that is left of its diagonal entry.
  double project(int64_t j) {
    return left_of(p_, l_, n_, g_[j * n_ + j], [&](int64_t k) { return g_[j * n_ + at_[k]]; }, z_, e_, &doubt_);
  }
  bool independent(double left) const { return left > doubt_; }

  // v <- L^-T v on the set.
  void back_substitute(double* v) const {
    for (int64_t k = p_; k-- > 0;) {
      double value = v[k];
      for (int64_t i = k + 1; i < p_; ++i) value -= l_[i * n_ + k] * v[i];
      v[k] = value / l_[k * n_ + k];
    }
  }

  void append(int64_t j, double left) {
    double* row = l_ + p_ * n_;
    std::copy(z_, z_ + p_, row);
    row[p_] = std::sqrt(left);
    at_[p_++] = j;
    state_[j] = kPositive;
  }

  // Takes entry k out of the set: the rows below lose a column, which a rank-one update makes good.
  void remove(int64_t k, int64_t state) {
    x_[at_[k]] = 0.0;
    state_[at_[k]] = state;
    for (int64_t i = k; i + 1 < p_; ++i) {
      at_[i] = at_[i + 1];
      const double* old = l_ + (i + 1) * n_;
      double* row = l_ + i * n_;
      v_[i] = old[k];
      for (int64_t c = 0; c < k; ++c) row[c] = old[c];
      for (int64_t c = k; c <= i; ++c) row[c] = old[c + 1];
    }
    --p_;
    for (int64_t c = k; c < p_; ++c) {
      double* pivot = l_ + c * n_ + c;
      const double length = std::sqrt(*pivot * *pivot + v_[c] * v_[c]);
      const double cosine = length / *pivot, sine = v_[c] / *pivot;
      *pivot = length;
      for (int64_t i = c + 1; i < p_; ++i) {
        double* entry = l_ + i * n_ + c;
        *entry = (*entry + sine * v_[i]) / cosine;
        v_[i] = cosine * v_[i] - sine * *entry;
      }
    }
  }

  // Lets unknown j become positive and goes to the optimum over the set that results. False: unbounded.
  bool enter(int64_t j) {
    const double left = project(j);
    bool fresh = independent(left);
    if (fresh) {
      append(j, left);
    } else {
      for (int64_t k = 0; k < p_; ++k) v_[k] = -z_[k];
      back_substitute(v_);
      double step = std::numeric_limits<double>::infinity();
      int64_t leaving = -1;
      for (int64_t k = 0; k < p_; ++k) {
        if (v_[k] >= 0.0) continue;
        const double room = x_[at_[k]] / -v_[k];
        if (room < step) step = room, leaving = k;
      }
      if (leaving < 0) {
        std::fill(ray_, ray_ + n_, 0.0);
        for (int64_t k = 0; k < p_; ++k) ray_[at_[k]] = v_[k];
        ray_[j] = 1.0;
        return false;
      }
      for (int64_t k = 0; k < p_; ++k) x_[at_[k]] = std::max(0.0, x_[at_[k]] + step * v_[k]);
      remove(leaving, kZero);
      const double rest = project(j);
      if (!independent(rest)) {  // by rounding alone
        state_[j] = kBlocked;
        return true;
      }
      append(j, rest);
      x_[j] = step;
    }
    while (p_ > 0) {
      for (int64_t k = 0; k < p_; ++k) {
        double value = -q_[at_[k]];
        const double* row = l_ + k * n_;
        for (int64_t i = 0; i < k; ++i) value -= row[i] * s_[i];
        s_[k] = value / row[k];
      }
      back_substitute(s_);
      if (fresh && s_[p_ - 1] <= 0.0) {
        // The slope that let it enter was rounding.
        remove(p_ - 1, kBlocked);
        return true;
      }
      fresh = false;
      double step = 1.0;
      int64_t leaving = -1;
      for (int64_t k = 0; k < p_; ++k) {
        if (s_[k] > 0.0) continue;
        const double x = x_[at_[k]], room = x / (x - s_[k]);
        if (leaving < 0 || room < step) step = x == 0.0 ? 0.0 : room, leaving = k;
      }
      for (int64_t k = 0; k < p_; ++k) x_[at_[k]] += step * (s_[k] - x_[at_[k]]);
      if (leaving < 0) {
        for (int64_t k = 0; k < p_; ++k) x_[at_[k]] = s_[k];
        // Of a curvature along s that is rounding alone.
        if (*std::max_element(s_, s_ + p_) > kEndless) {
          std::copy(x_, x_ + n_, ray_);
          return false;
        }
        break;
      }
      remove(leaving, kZero);
      for (int64_t k = 0; k < p_; ++k) x_[at_[k]] = std::max(0.0, x_[at_[k]]);
    }
    for (int64_t i = 0; i < n_; ++i)
      if (state_[i] == kBlocked) state_[i] = kZero;
    return true;
  }

  int64_t n_, p_ = 0;
  double size_ = 1.0, doubt_ = 0.0;
  double *g_, *l_, *d_, *q_, *x_, *s_, *z_, *v_, *e_, *ray_;
  int64_t *at_, *state_;
};

}  // namespace
}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
