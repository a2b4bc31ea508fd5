// The C interface of the CPU kernels: plain pointers and sizes, no torch.
//
// Letters: N rows (answer tokens), D hidden size, V vocabulary.  `is_double` says whether untyped
// pointers point to float (0) or double (1).  Strides count elements.  No function allocates
// memory that outlives the call, throws, or keeps state; results do not depend on num_threads.
#pragma once

#include <cstdint>

#define REALIGN_ABI_VERSION 3

extern "C" {

// Storage types of weights.
enum RealignType { REALIGN_FLOAT32 = 0, REALIGN_FLOAT64 = 1, REALIGN_BFLOAT16 = 2, REALIGN_FLOAT16 = 3 };

// One tile of logits and the state of its rows.  Pointers marked * may be null.
struct RealignTile {
  int32_t is_double;
  int32_t num_threads;
  int64_t num_rows;
  int64_t num_columns;
  int64_t first_column;  // id of the tile's first column, in the numbering of `labels`
  // (N, columns): raw logits in; exponentials times phi out where `keeps_exponentials`, else unspecified.
  void* logits;
  int64_t logits_stride;
  int32_t keeps_exponentials;
  int32_t replays;      // 1: shifts are final, nothing is summed, the entries of label and top become 0
  const void* bias;     // * (columns,)
  const int64_t* labels;  // (N,)
  double logit_scale;
  double logit_softcap;  // 0: none
  double temperature;
  double bound;  // a logit more than this above the shift moves the shift
  void* shift;   // (N,)
  void* rest_sum;  // (N,): sum of exp(x - shift), label left out
  void* tile_shift;  // * (N,): the shift that this tile's exponentials are relative to
  void* accumulator;  // * (N, accumulator_columns): rescaled when the shift moves
  int64_t accumulator_columns;
  int64_t accumulator_stride;
  void* low_rank_accumulator;  // * the same for the low-rank factor
  int64_t low_rank_columns;
  int64_t low_rank_stride;
  void* logit_sum;     // * (N,): sum of x, label included
  void* label_logits;  // * (N,): x at the label, as this tile has it
  // With e = exp(x - shift); both or neither.
  void* rest_entropy_sum;  // * (N,): sum of -e * log(e)
  void* rest_square_sum;   // * (N,): sum of e ** 2
  // The largest x except the label's, and the lowest id that has it; both or neither.  If given, this
  // top token is left out of all sums and exponentials, like the label.
  void* top_logits;      // * (N,)
  int64_t* top_ids;      // * (N,): in a replay, the entries to become 0
  // Where a token of this tile replaces an earlier top token: the id of the earlier one, or -1, and
  // its exponential times phi, which is to be added back to the accumulators.
  int64_t* released_ids;  // * (N,)
  void* released_values;  // * (N,)
};

// One preference batch.  S = num_cells * num_pairs; a term is a row of `terms`: four coefficients,
// weight, beta, offset, label smoothing, link (0 logsigmoid, 1 hinge, 2 ipo; per token from 2 on:
// 3 logsigmoid, 4 hinge).
struct RealignPairs {
  int32_t is_double;
  int64_t num_tokens;
  int64_t tokens_per_sequence;  // of the padded form; not read where sequence_ids is given
  const void* token_logps;      // (tokens,)
  const int64_t* labels;        // (tokens,)
  int64_t ignore_index;
  const int64_t* sequence_ids;  // * (tokens,)
  int64_t num_cells;
  int64_t num_pairs;
  const double* ref_logps;  // * (cells, pairs)
  const double* terms;      // (num_terms, 9)
  int64_t num_terms;
  double nll_weight;
  double beta;        // of rewards and text margins
  double image_beta;  // of image margins
  double* loss;       // (1,)
  double* logps;      // (cells, pairs)
  int64_t* counts;    // (cells, pairs)
  double* rewards;    // (cells, pairs)
  double* text_margins;   // (pairs,)
  double* image_margins;  // (pairs,)
  double* coefficients;   // (cells, pairs): derivative of the loss with respect to logps
};

// out = a @ b, or out += a @ b: a (rows, terms), b (terms, columns) in bfloat16, out (rows, columns) and
// all sums in float32.  A float32 `a` is rounded to bfloat16; for entries that reach a limit, the
// rounding error is multiplied and added too, so that a few large entries keep all digits.
struct RealignProduct {
  int32_t num_threads;
  int32_t adds;
  int64_t num_rows;
  int64_t num_columns;
  int64_t num_terms;
  int32_t a_type;  // REALIGN_BFLOAT16 or REALIGN_FLOAT32
  const void* a;
  int64_t a_row_stride;
  int64_t a_term_stride;
  const float* scale;   // * (terms,): multiplies the columns of a float32 `a` before they are rounded
  const float* limits;  // * the limits, on the entries of a float32 `a` before they are scaled
  int32_t limits_are_of_rows;  // 1: limits are (rows,); 0: (terms,)
  const void* b;
  int64_t b_term_stride;
  int64_t b_column_stride;
  float* out;
  int64_t out_stride;
};

int32_t realign_abi_version();

// The instruction set in use: "avx512", "avx2" or "baseline".
const char* realign_instruction_set();

// The instructions for products of bfloat16: "amx" or "avx512", in tests "portable", or "none" where a BLAS in
// float32 is faster and realign_product must not be called.
const char* realign_product_set();

// Returns whether there was memory for the packed copies: 1 MiB, and 0.5 MiB per thread.
int32_t realign_product(const RealignProduct* product);

// Asks for large pages for memory that is about to be written for the first time: every page costs a fault.
void realign_use_large_pages(void* start, int64_t num_bytes);

// Folds a tile into the sums of its rows.
void realign_epilogue(const RealignTile* tile);

// out[n] += dot(hidden[n], weight[ids[n]]); rows whose id is outside [0, num_ids) are left alone.  Hidden
// states are REALIGN_FLOAT32, REALIGN_FLOAT64 or REALIGN_BFLOAT16; `out` is double where they are, else float.
void realign_label_dot(int32_t hidden_type, int32_t num_threads, int64_t num_rows, int64_t hidden_size,
                       const void* hidden, int64_t hidden_stride, int32_t weight_type, const void* weight,
                       int64_t weight_stride, int64_t weight_column_stride, int64_t num_ids,
                       const int64_t* ids, void* out);

// accumulator[n] = scale[n] * accumulator[n] + coefficient[n] * weight[ids[n]]; without the second
// summand where the id is outside [0, num_ids).
void realign_combine(int32_t is_double, int32_t num_threads, int64_t num_rows, int64_t hidden_size,
                     void* accumulator, int64_t accumulator_stride, const void* scale, int32_t weight_type,
                     const void* weight, int64_t weight_stride, int64_t weight_column_stride,
                     int64_t num_ids, const int64_t* ids, const void* coefficient);

// out[v] += sum over e in [starts[v], starts[v + 1]) of coefficient[order[e]] * hidden[order[e] % num_rows].
// Hidden states are REALIGN_FLOAT32, REALIGN_FLOAT64 or REALIGN_BFLOAT16, as in realign_label_dot; `out` and
// coefficients are double where hidden states are, else float.
void realign_add_entries(int32_t hidden_type, int32_t num_threads, int64_t num_columns, int64_t hidden_size,
                         void* out, int64_t out_stride, const int64_t* starts, const int64_t* order,
                         const void* coefficient, const void* hidden, int64_t hidden_stride, int64_t num_rows);

// out[m] = sum over k of a[m, k] * b[k], or out[m] += that sum.
void realign_vector_product(int32_t is_double, int32_t num_threads, int32_t adds, int64_t num_rows,
                            int64_t num_terms, const void* a, int64_t row_stride, int64_t term_stride,
                            const void* b, int64_t b_stride, void* out, int64_t out_stride);

// Sums per sequence, log-ratios, terms, loss, and the coefficient of every sequence.
void realign_pair_loss(const RealignPairs* pairs);

}
