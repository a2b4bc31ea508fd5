// From token log-probabilities to the loss of a preference batch, in double and in one thread, since
// a batch has few answer tokens.  It reads the objective's table and needs no vocabulary.
#include <algorithm>
#include <cmath>

#include "realign_kernels.h"

namespace {

constexpr int kTermSize = 9;

double log_sigmoid(double x) { return std::fmin(x, 0.0) - std::log1p(std::exp(-std::fabs(x))); }

double sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

struct Link {
  double loss;
  double slope;  // d loss / d contrast
};

struct Term {
  const double* coefficients;  // 4
  double weight, beta, offset, smoothing;
  int kind;
  bool is_per_token;

  explicit Term(const double* row)
      : coefficients(row),
        weight(row[4]),
        beta(row[5]),
        offset(row[6]),
        smoothing(row[7]),
        kind(static_cast<int>(row[8]) % 3),
        is_per_token(row[8] >= 2) {}  // the code of ipo, and codes of links by length

  Link link(double contrast) const {
    if (kind == 1) {
      const double gap = 1 - beta * contrast;
      // Not fmax, which would turn a NaN into a loss of 0. The slope at NaN is that of relu.
      return {gap <= 0 ? 0.0 : gap, gap <= 0 ? 0.0 : -beta};
    }
    if (kind == 2) {
      const double gap = contrast - 1 / (2 * beta);
      return {gap * gap, 2 * gap};
    }
    const double x = beta * contrast - offset;
    // Skipped for a smoothing of 0: 0 * log_sigmoid(-x) is NaN where x is inf.
    double loss = -(1 - smoothing) * log_sigmoid(x);
    if (smoothing > 0) loss -= smoothing * log_sigmoid(-x);
    return {loss, beta * (smoothing * sigmoid(x) - (1 - smoothing) * sigmoid(-x))};
  }
};

template <typename T>
void sum_sequences(const RealignPairs& pairs) {
  const int64_t num_sequences = pairs.num_cells * pairs.num_pairs;
  std::fill(pairs.logps, pairs.logps + num_sequences, 0.0);
  std::fill(pairs.counts, pairs.counts + num_sequences, int64_t{0});
  const T* token_logps = static_cast<const T*>(pairs.token_logps);
  for (int64_t i = 0; i < pairs.num_tokens; ++i) {
    if (pairs.labels[i] == pairs.ignore_index) continue;
    const int64_t sequence = pairs.sequence_ids != nullptr ? pairs.sequence_ids[i] : i / pairs.tokens_per_sequence;
    // The caller has checked the ids, unless checks are turned off.
    if (sequence < 0 || sequence >= num_sequences) continue;
    pairs.logps[sequence] += static_cast<double>(token_logps[i]);
    ++pairs.counts[sequence];
  }
  if (!pairs.is_double)
    for (int64_t s = 0; s < num_sequences; ++s) pairs.logps[s] = static_cast<float>(pairs.logps[s]);
}

class Pair {
 public:
  Pair(const RealignPairs& pairs, int64_t p) : pairs_(pairs), p_(p) {
    for (int64_t cell = 0; cell < pairs.num_cells; ++cell) {
      const int64_t i = index(cell);
      is_present_[cell] = pairs.counts[i] > 0;
      const double reference = pairs.ref_logps != nullptr ? pairs.ref_logps[i] : 0.0;
      log_ratio_[cell] = is_present_[cell] ? pairs.logps[i] - reference : 0.0;
      pairs.rewards[i] = pairs.beta * log_ratio_[cell];
      pairs.coefficients[i] = 0;
    }
    pairs.text_margins[p] = margin(1, pairs.beta);
    pairs.image_margins[p] = margin(2, pairs.image_beta);
  }

  // Returns the pair's loss, and adds its derivative divided by the number of pairs to coefficients.
  double run() const {
    double loss = 0;
    for (int64_t t = 0; t < pairs_.num_terms; ++t) loss += add(Term(pairs_.terms + t * kTermSize));
    if (pairs_.nll_weight > 0 && is_present_[0]) {
      const double count = static_cast<double>(pairs_.counts[index(0)]);
      loss -= pairs_.nll_weight * pairs_.logps[index(0)] / count;
      pairs_.coefficients[index(0)] -= pairs_.nll_weight / count / static_cast<double>(pairs_.num_pairs);
    }
    return loss;
  }

 private:
  int64_t index(int64_t cell) const { return cell * pairs_.num_pairs + p_; }

  double margin(int64_t cell, double beta) const {
    if (cell >= pairs_.num_cells || !is_present_[0] || !is_present_[cell]) return 0;
    return beta * (log_ratio_[0] - log_ratio_[cell]);
  }

  double add(const Term& term) const {
    double contrast = 0;
    for (int64_t cell = 0; cell < 4; ++cell) {
      if (term.coefficients[cell] == 0) continue;
      if (!is_present_[cell]) return 0;
      contrast += factor(term, cell) * log_ratio_[cell];
    }
    const Link link = term.link(contrast);
    const double slope = term.weight * link.slope / static_cast<double>(pairs_.num_pairs);
    for (int64_t cell = 0; cell < 4; ++cell)
      if (term.coefficients[cell] != 0) pairs_.coefficients[index(cell)] += slope * factor(term, cell);
    return term.weight * link.loss;
  }

  double factor(const Term& term, int64_t cell) const {
    const double count = static_cast<double>(pairs_.counts[index(cell)]);
    return term.is_per_token ? term.coefficients[cell] / count : term.coefficients[cell];
  }

  const RealignPairs& pairs_;
  const int64_t p_;
  bool is_present_[4];
  double log_ratio_[4];
};

}  // namespace

extern "C" void realign_pair_loss(const RealignPairs* pairs) {
  if (pairs->is_double)
    sum_sequences<double>(*pairs);
  else
    sum_sequences<float>(*pairs);
  double total = 0;
  for (int64_t p = 0; p < pairs->num_pairs; ++p) total += Pair(*pairs, p).run();
  *pairs->loss = pairs->num_pairs > 0 ? total / static_cast<double>(pairs->num_pairs) : 0.0;
}
