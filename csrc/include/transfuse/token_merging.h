// Token merging: arguments of the kernels. Tokens are (batch, token, channel) with any strides.
//
// A plan is three integer arrays per batch entry. rows[i] is the row of the merged tensor that holds token i; order
// lists the tokens row by row, the one that gave the row its place first and the others in ascending order; start[r] is
// where row r begins in it. Merging is a sum over segments of `order`, unmerging a gather by `rows`: each is the
// other's transpose, for every weighting below.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

// Vectors shorter than this count as zero: they have similarity 0 to everything.
constexpr double kMergeSmallestNorm = 1e-12;

// Cosine nearest neighbours. `row_token` and `column_token` pick tokens (nullptr: all of them, in order). Rows without
// an allowed column get similarity -inf and index -1; a NaN loses against every number.
struct NearestArgs {
  DType dtype = DType::f32;
  int64_t batch = 0, rows = 0, columns = 0, depth = 0;
  View x, reference;  // strides (batch, token, channel)
  const int64_t* row_token = nullptr;
  const int64_t* column_token = nullptr;
  const uint8_t* mask = nullptr;  // columns that may be chosen; strides (batch, column)
  int64_t mask_stride[2] = {0, 0};
  bool exclude_self = false;
  void* similarity = nullptr;  // (batch, rows) float, double for double
  int64_t* index = nullptr;    // (batch, rows)
};

struct MatchArgs {
  DType dtype = DType::f32;
  int64_t batch = 0, tokens = 0, depth = 0;
  View metric;
  const int64_t* destination = nullptr;  // different tokens in ascending order; checked by the caller
  int64_t destinations = 0;
  const int64_t* protect = nullptr;  // likewise
  int64_t protects = 0;
  int64_t merged = 0;  // at most the number of sources that are not protected
  int64_t *rows = nullptr, *order = nullptr, *start = nullptr;
};

// What a row is of the tokens of its segment, apart from a scale per token: their sum, their mean, or the first alone.
// `average` (segments only, and without a transpose): their mean with the scale as weights, 0 if these sum to 0.
enum class Weighting : int { sum = 0, mean = 1, first = 2, average = 3 };

struct PlanView {
  int64_t batch = 0, tokens = 0, rows = 0;
  const int64_t *row = nullptr, *order = nullptr, *start = nullptr;
  int64_t row_stride = 0, order_stride = 0, start_stride = 0;  // between batch entries
};

struct MergeArgs {
  DType dtype = DType::f32;
  int64_t depth = 0;
  PlanView plan;
  View in;                      // merge: (batch, token, channel); gather: (batch, row, channel)
  const void* scale = nullptr;  // (batch, tokens) float, double for double; nullptr: 1
  int64_t scale_stride = 0;
  Weighting weighting = Weighting::sum;
  void* out = nullptr;        // contiguous
  int64_t* winner = nullptr;  // amax: (batch, rows, channel) token of the largest number, or nullptr
};

struct PushArgs {
  DType dtype = DType::f32;
  int64_t batch = 0, tokens = 0, references = 0, depth = 0;
  View x, reference;
  const void* similarity = nullptr;  // (batch, tokens), contiguous
  const int64_t* index = nullptr;    // (batch, tokens), contiguous
  double alpha = 0.0, threshold = 0.0;
  void* out = nullptr;  // contiguous
};

// Those that return bool: false if the plan or the index named a token or row that does not exist.
struct TokenMergingKernels {
  void (*nearest)(const NearestArgs&, const Parallel&);
  void (*match)(const MatchArgs&, const Parallel&);
  bool (*segments)(const MergeArgs&, const Parallel&);
  bool (*amax)(const MergeArgs&, const Parallel&);
  bool (*gather)(const MergeArgs&, const Parallel&);
  bool (*push)(const PushArgs&, const Parallel&);
};

const TokenMergingKernels& token_merging_kernels();

// The CUDA kernels, in a library of their own. Every pointer is device memory; `stream` is a cudaStream_t of the
// current device. What names a token or row that does not exist becomes zeros (or stays, for push): to say so, the host
// would have to wait. Each returns the message of an error, or nullptr.
const char* merge_segments_cuda(const MergeArgs&, void* stream);
const char* merge_amax_cuda(const MergeArgs&, void* stream);
const char* merge_gather_cuda(const MergeArgs&, void* stream);
const char* push_tokens_cuda(const PushArgs&, void* stream);
// Without row_token and column_token. `working`: room for as many doubles as nearest_tokens_cuda_working says.
const char* nearest_tokens_cuda(const NearestArgs&, void* working, void* stream);
int64_t nearest_tokens_cuda_working(const NearestArgs&);

}  // namespace transfuse
