// Quadratic and linear programmes over non-negative numbers and over the simplex, at one ISA level (see simplex.h).
#include "transfuse/simplex.h"

#include "nonnegative.h"

namespace transfuse {
namespace TRANSFUSE_ISA {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kSerialWork = 20000;  // multiply-adds in all below which waking other threads does not pay

bool finite(const double* p, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += p[i] * 0.0;  // NaN for infinities too
  return sum == 0.0;
}

double largest(const double* p, int64_t count) {
  double top = 0.0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, std::fabs(p[i]));
  return top;
}

double dot(const double* a, const double* b, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// Runs body(problem) for all of them, some at a time, on one thread if they are little work together.
template <class F>
void for_each_problem(int64_t problems, int64_t work, const Parallel& parallel, const F& body) {
  const int64_t block = std::max<int64_t>(1, kSerialWork / std::max<int64_t>(1, work));
  const int64_t tasks = (problems + block - 1) / block;
  const Parallel serial = serial_parallel();
  for_each_task(tasks == 1 ? serial : parallel, tasks, [&](int64_t task) {
    for (int64_t i = task * block; i < std::min(problems, (task + 1) * block); ++i) body(i);
  });
}

// ---- quadratic programmes over non-negative numbers ---------------------------------------------------------------

void nonnegative(const NonnegativeArgs& args, const Parallel& parallel) {
  const int64_t n = args.n;
  for_each_problem(args.problems, n * n * n, parallel, [&](int64_t i) {
    const double *g = args.g + i * n * n, *q = args.q + i * n;
    double* x = args.x + i * n;
    if (!finite(g, n * n) || !finite(q, n)) {
      std::fill(x, x + n, kNaN);
      args.residual[i] = kNaN;
      return;
    }
    double* memory = static_cast<double*>(thread_scratch(sizeof(double) * (size_t)Nonnegative::memory(n)));
    Nonnegative solver(n, memory);
    const Outcome outcome = solver.solve(g, q, args.iterations, args.tolerance, x, nullptr);
    args.residual[i] = outcome == Outcome::unbounded ? std::numeric_limits<double>::infinity() : solver.residual();
  });
}

// ---- the point of smallest norm of a convex hull ------------------------------------------------------------------

// Orthonormal directions d with C d = 0 and sum d = 0, as rows of `out`, for the n x n matrix C; how many there are.
// A Cholesky factorisation with pivoting, of the matrix scaled to a diagonal of 1, finds the null vectors. `l` has room
// for n + 1 rows, the others for one.
int64_t flat_directions(int64_t n, const double* c, double* l, double* scale, double* left, int64_t* kept,
                        double* out) {
  int64_t rank = 0, count = 0;
  double* y = l + n * n;
  for (int64_t i = 0; i < n; ++i) {
    left[i] = c[i * n + i] > 0.0 ? 1.0 : 0.0;
    scale[i] = left[i] > 0.0 ? 1.0 / std::sqrt(c[i * n + i]) : 1.0;
  }
  for (; rank < n; ++rank) {
    const int64_t pivot = std::max_element(left, left + n) - left;
    if (left[pivot] <= 64.0 * kEpsilon * (double)n) break;
    const double root = std::sqrt(left[pivot]), *own = l + pivot * n;
    for (int64_t i = 0; i < n; ++i) {
      if (left[i] < 0.0 || i == pivot) continue;
      double* row = l + i * n;
      row[rank] = (c[i * n + pivot] * scale[i] * scale[pivot] - dot(own, row, rank)) / root;
      left[i] = std::max(0.0, left[i] - row[rank] * row[rank]);
    }
    l[pivot * n + rank] = root;
    left[pivot] = -1.0;  // in the factor
    kept[rank] = pivot;
  }
  for (int64_t j = 0; j < n; ++j) {
    if (left[j] < 0.0) continue;
    double* d = out + count++ * n;
    std::fill(d, d + n, 0.0);
    for (int64_t k = rank; k-- > 0;) {
      double value = l[j * n + k];
      for (int64_t i = k + 1; i < rank; ++i) value -= l[kept[i] * n + k] * y[i];
      y[k] = value / l[kept[k] * n + k];
      d[kept[k]] = -y[k] * scale[kept[k]];
    }
    d[j] = scale[j];
    const double size = largest(d, n);
    for (int64_t i = 0; i < n; ++i) d[i] /= size;
  }
  // Of those whose sum is not 0, one makes the sums of the others 0 and is lost.
  int64_t lost = -1;
  double most = 1e-10;
  const auto total = [&](int64_t r) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += out[r * n + i];
    return sum;
  };
  for (int64_t r = 0; r < count; ++r)
    if (std::fabs(total(r)) > most) most = std::fabs(total(r)), lost = r;
  int64_t found = 0;
  for (int64_t r = 0; r < count; ++r) {
    if (r == lost) continue;
    double* d = l;  // no longer needed
    const double share = lost < 0 ? 0.0 : total(r) / total(lost);
    for (int64_t i = 0; i < n; ++i) d[i] = out[r * n + i] - (lost < 0 ? 0.0 : share * out[lost * n + i]);
    const double before = std::sqrt(dot(d, d, n));
    for (int64_t pass = 0; pass < 2; ++pass)
      for (int64_t k = 0; k < found; ++k) {
        const double* other = out + k * n;
        const double along = dot(d, other, n);
        for (int64_t i = 0; i < n; ++i) d[i] -= along * other[i];
      }
    const double after = std::sqrt(dot(d, d, n));
    if (!(after > 1e-10 * before)) continue;
    // Row `found` is read no more: it is r itself, one before it, or the lost one if that comes first.
    if (found == lost && lost < r) {
      std::copy(out + lost * n, out + (lost + 1) * n, out + r * n);
      lost = r;
    }
    for (int64_t i = 0; i < n; ++i) out[found * n + i] = d[i] / after;
    ++found;
  }
  return found;
}

// Moves w along orthonormal flat directions, staying in the simplex, to its smallest norm:
// min |v|^2 over v >= 0 with v - w flat. Its dual is min_{y >= 0} y' P y / 2 + y' (w - P w) with P the projection onto
// the flat directions, and v = w - P w + P y.
void smallest_norm(int64_t n, double* flat, int64_t count, double* w, double* memory) {
  double *p = memory, *q = p + n * n, *y = q + n;
  Nonnegative solver(n, y + n);
  // A weight that no direction moves but by rounding stays.
  for (int64_t i = 0; i < count * n; ++i)
    if (std::fabs(flat[i]) < 1e-12) flat[i] = 0.0;
  const auto project = [&](const double* v, int64_t i) { return dot(p + i * n, v, n); };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0.0;
      for (int64_t k = 0; k < count; ++k) sum += flat[k * n + i] * flat[k * n + j];
      p[i * n + j] = sum;
    }
  for (int64_t i = 0; i < n; ++i) q[i] = w[i] - project(w, i);
  if (solver.solve(p, q, 10 * n, 0.0, y, nullptr) != Outcome::solved) return;
  double least = 0.0;
  for (int64_t i = 0; i < n; ++i) least = std::min(least, q[i] + project(y, i));
  if (least < -1e-10) return;
  for (int64_t i = 0; i < n; ++i) w[i] = std::max(0.0, q[i] + project(y, i));
}

int64_t min_norm_memory(int64_t n) { return Nonnegative::memory(n) + 5 * n * n + 11 * n; }

void min_norm_one(int64_t n, const double* given, double* w, double* memory) {
  const double size = largest(given, n * n);
  if (!finite(given, n * n) || size == 0.0) {
    std::fill(w, w + n, finite(given, n * n) ? 1.0 / (double)n : kNaN);
    return;
  }
  if (n == 2) {  // the segment between two points, in closed form
    const double across = given[1] / size + given[2] / size, first = given[0] / size, second = given[3] / size;
    const double length = first + second - across;
    // Where both are the same point, equal weights have the smallest norm.
    w[0] = length > 0.0 ? std::min(1.0, std::max(0.0, (second - 0.5 * across) / length)) : 0.5;
    w[1] = length > 0.0 ? std::min(1.0, std::max(0.0, (first - 0.5 * across) / length)) : 0.5;
    return;
  }
  double *c = memory, *l = c + n * n, *flat = l + (n + 1) * n, *vector = flat + n * n, *ray = vector + n;
  double *scale = ray + n, *left = scale + n;
  int64_t* kept = reinterpret_cast<int64_t*>(left + n);
  int64_t* tied = kept + n;
  double *part = left + 3 * n, *rest = part + n + n * n;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) c[i * n + j] = 0.5 * (given[i * n + j] / size + given[j * n + i] / size);

  // With y >= 0 the minimiser of y' C y / 2 - sum y, w = y / sum y. Where it is unbounded, 0 is in the hull, and the
  // direction is w.
  std::fill(vector, vector + n, -1.0);
  Nonnegative solver(n, rest);
  if (solver.solve(c, vector, 10 * n, 0.0, w, ray) == Outcome::unbounded) std::copy(ray, ray + n, w);
  const auto normalise = [&] {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += w[i];
    for (int64_t i = 0; i < n; ++i) w[i] /= sum;
  };
  normalise();
  // Tasks that tied weights could give something to: those whose slope is that of the optimum. (One that is not, but
  // by little, does no harm: directions that leave the point where it is cannot move weight to it.)
  double value = 0.0, bound = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    double size_of = 0.0;
    vector[i] = dot(c + i * n, w, n);
    for (int64_t j = 0; j < n; ++j) size_of += std::fabs(c[i * n + j]) * w[j];
    ray[i] = size_of;
    value += w[i] * vector[i];
    bound += w[i] * size_of;
  }
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i)
    if (w[i] > 0.0 || vector[i] - value <= 1e-9 * (ray[i] + bound)) tied[m++] = i;
  double* small = part + n;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < m; ++j) small[i * m + j] = c[tied[i] * n + tied[j]];
  // Directions that move neither the point nor the sum: all that tied weights can differ by.
  const int64_t count = flat_directions(m, small, l, scale, left, kept, flat);
  if (count == 0) return;
  for (int64_t i = 0; i < m; ++i) part[i] = w[tied[i]];
  smallest_norm(m, flat, count, part, rest);
  for (int64_t i = 0; i < m; ++i) w[tied[i]] = part[i];
  normalise();
}

void min_norm(const MinNormArgs& args, const Parallel& parallel) {
  const int64_t n = args.n;
  for_each_problem(args.problems, 4 * n * n * n, parallel, [&](int64_t i) {
    double* memory = static_cast<double*>(thread_scratch(sizeof(double) * (size_t)min_norm_memory(n)));
    min_norm_one(n, args.c + i * n * n, args.w + i * n, memory);
  });
}

// ---- linear programmes of Pareto descent --------------------------------------------------------------------------

constexpr double kFeasible = 1e-12;  // of rows whose largest entry is 1
constexpr int64_t kRows = 2 * kParetoMost + 1;

struct Programme {
  int64_t n = 0, rows = 0;
  double row[kRows][kParetoMost];  // row . w >= 0; the first n are w >= 0
  double objective[kParetoMost];

  // row . w >= bound, made homogeneous by sum w = 1.
  void add(const double* normal, double bound) {
    double* r = row[rows];
    for (int64_t i = 0; i < n; ++i) r[i] = normal[i] - bound;
    const double size = largest(r, n);
    if (size == 0.0) return;
    for (int64_t i = 0; i < n; ++i) r[i] /= size;
    ++rows;
  }
};

Programme programme(int64_t n, const double* c, const double* a, bool guide) {
  Programme p;
  p.n = n;
  for (int64_t i = 0; i < n; ++i) {
    double unit[kParetoMost] = {};
    unit[i] = 1.0;
    p.add(unit, 0.0);
  }
  const double most = *std::max_element(a, a + n);
  for (int64_t j = 0; j < n; ++j) {
    if (!guide || !(most > 0.0) || a[j] == most) {
      p.add(c + j * n, 0.0);
    } else if (a[j] <= 0.0) {
      p.add(c + j * n, a[j]);
    }
  }
  if (!guide) p.add(a, std::min(most, 0.0));
  for (int64_t i = 0; i < n; ++i) {
    p.objective[i] = guide ? a[i] : 0.0;
    for (int64_t j = 0; !guide && j < n; ++j) p.objective[i] += c[j * n + i];
  }
  const double size = largest(p.objective, n);
  for (int64_t i = 0; size > 0.0 && i < n; ++i) p.objective[i] /= size;
  return p;
}

// The point where n - 1 rows are 0 and the sum is 1, by elimination; false where there is none or it is not feasible.
bool vertex(const Programme& p, const int64_t* chosen, double* w) {
  const int64_t n = p.n;
  double m[kParetoMost][kParetoMost + 1];
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) m[i][j] = i + 1 < n ? p.row[chosen[i]][j] : 1.0;
    m[i][n] = i + 1 < n ? 0.0 : 1.0;
  }
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (std::fabs(m[i][k]) > std::fabs(m[pivot][k])) pivot = i;
    if (m[pivot][k] == 0.0) return false;
    if (pivot != k)
      for (int64_t j = k; j <= n; ++j) std::swap(m[pivot][j], m[k][j]);
    for (int64_t i = k + 1; i < n; ++i) {
      const double factor = m[i][k] / m[k][k];
      for (int64_t j = k; j <= n; ++j) m[i][j] -= factor * m[k][j];
    }
  }
  for (int64_t k = n; k-- > 0;) w[k] = (m[k][n] - dot(m[k] + k + 1, w + k + 1, n - k - 1)) / m[k][k];
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(w[i] >= -kFeasible)) return false;
    w[i] = std::max(w[i], 0.0);
    sum += w[i];
  }
  for (int64_t i = 0; i < n; ++i) w[i] /= sum;
  for (int64_t r = n; r < p.rows; ++r)
    if (!(dot(p.row[r], w, n) >= -kFeasible)) return false;
  return true;
}

// body(w) for every feasible vertex, in lexicographic order of its rows.
template <class F>
void for_each_vertex(const Programme& p, const F& body) {
  int64_t chosen[kParetoMost];
  double w[kParetoMost];
  const int64_t count = p.n - 1;
  for (int64_t i = 0; i < count; ++i) chosen[i] = i;
  for (;;) {
    if (vertex(p, chosen, w)) body(w);
    int64_t i = count - 1;
    while (i >= 0 && chosen[i] == p.rows - count + i) --i;
    if (i < 0) return;
    ++chosen[i];
    for (int64_t k = i + 1; k < count; ++k) chosen[k] = chosen[k - 1] + 1;
  }
}

void pareto(const ParetoArgs& args, const Parallel& parallel) {
  const int64_t n = args.n;
  int64_t vertices = 1;
  for (int64_t k = 1; k < n; ++k) vertices = vertices * (2 * n + 2 - k) / k;
  for_each_problem(args.problems, vertices * n * n * n, parallel, [&](int64_t i) {
    const double *c = args.c + i * n * n, *a = args.a + i * n;
    double* w = args.w + i * n;
    args.status[i] = finite(c, n * n) && finite(a, n) ? 1 : 2;
    std::fill(w, w + n, args.status[i] == 1 ? 1.0 / (double)n : kNaN);
    if (args.status[i] == 2) return;
    const Programme p = programme(n, c, a, args.guide);
    double best = -std::numeric_limits<double>::infinity(), norm = best;
    for_each_vertex(p, [&](const double* v) { best = std::max(best, dot(p.objective, v, n)); });
    if (!std::isfinite(best)) return;
    args.status[i] = 0;
    norm = std::numeric_limits<double>::infinity();
    for_each_vertex(p, [&](const double* v) {
      const double own = dot(v, v, n);
      if (dot(p.objective, v, n) < best - kFeasible || !(own < norm - kFeasible)) return;
      norm = own;
      std::copy(v, v + n, w);
    });
  });
}

}  // namespace

extern const SimplexKernels kSimplex;
const SimplexKernels kSimplex = {nonnegative, min_norm, pareto};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
