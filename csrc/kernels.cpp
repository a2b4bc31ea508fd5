// The vectorised kernels, compiled once for each instruction set: REALIGN_KERNELS names the table.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "lanes.h"

namespace {

template <typename T>
constexpr T infinity = std::numeric_limits<T>::infinity();

float widen(float value) { return value; }
double widen(double value) { return value; }

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

float widen(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

float widen(Float16 value) {
  // The exponent is rebiased by a multiplication, which is right for subnormals too.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  float result;
  std::memcpy(&result, &magnitude, sizeof(result));
  result *= 0x1p112f;
  uint32_t bits;
  if ((value.bits & 0x7c00u) == 0x7c00u) {
    bits = magnitude | 0x7f800000u;
  } else {
    std::memcpy(&bits, &result, sizeof(bits));
  }
  bits |= sign;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// ---- epilogue

template <typename T>
struct Transform {
  T scale, cap, temperature;

  bool is_identity() const { return cap == 0 && scale == 1 && temperature == 1; }
  Vector<T> apply(Vector<T> z) const {
    if (cap == 0) return z * (scale / temperature);
    return tanh_of<T>(z * (scale / cap)) * (cap / temperature);
  }
  // dx/dz as a function of x.
  Vector<T> slope(Vector<T> x) const {
    const T linear = scale / temperature;
    if (cap == 0) return splat<T>(linear);
    const Vector<T> tanh = x * (temperature / cap);
    return (T(1) - tanh * tanh) * linear;
  }
};

// One row of a tile.  `x` is the row's slice of the tile, transformed in place.
template <typename T>
class Row {
 public:
  Row(const RealignTile& tile, int64_t n)
      : tile_(tile),
        n_(n),
        columns_(tile.num_columns),
        x_(static_cast<T*>(tile.logits) + n * tile.logits_stride),
        label_(tile.labels[n] - tile.first_column),
        transform_{static_cast<T>(tile.logit_scale), static_cast<T>(tile.logit_softcap),
                   static_cast<T>(tile.temperature)} {}

  void run() {
    transform();
    const bool has_label = label_ >= 0 && label_ < columns_;
    if (tile_.logit_sum != nullptr) at<T>(tile_.logit_sum) += sum();
    if (has_label) {
      if (tile_.label_logits != nullptr) at<T>(tile_.label_logits) = x_[label_];
      // From here on the label's column counts as absent.
      x_[label_] = -infinity<T>;
    }
    if (tile_.replays) {
      replay();
      return;
    }
    const T top = maximum();
    move_shift(top);
    const int64_t own_top = tile_.top_ids != nullptr ? update_top(top) : -1;
    if (own_top >= 0) x_[own_top] = -infinity<T>;
    accumulate();
    put_at(label_, T(0));
    // A stash keeps the entry, and drops that of the last top token at the end; an accumulator gets an entry
    // when its token is released.
    if (own_top >= 0) put_at(own_top, tile_.released_ids != nullptr ? T(0) : exponential(top));
    if (tile_.tile_shift != nullptr) at<T>(tile_.tile_shift) = at<T>(tile_.shift);
  }

 private:
  static constexpr int lanes = Traits<T>::lanes;

  template <typename U>
  U& at(void* array) const {
    return static_cast<U*>(array)[n_];
  }

  // Calls f(vector, offset) for every full vector of the row, then f for the padded remainder.
  template <typename F>
  void for_each(F f) const {
    int64_t i = 0;
    for (; i + lanes <= columns_; i += lanes) f(load<T>(x_ + i), i, int64_t{lanes});
    if (i < columns_) f(load_some<T>(x_ + i, columns_ - i, -infinity<T>), i, columns_ - i);
  }

  void put(Vector<T> vector, int64_t offset, int64_t count) const {
    if (count == lanes)
      store<T>(x_ + offset, vector);
    else
      store_some<T>(x_ + offset, vector, count);
  }

  void transform() const {
    const T* bias = static_cast<const T*>(tile_.bias);
    if (bias == nullptr && transform_.is_identity()) return;
    for_each([&](Vector<T> z, int64_t i, int64_t count) {
      if (bias != nullptr)
        z += count == lanes ? load<T>(bias + i) : load_some<T>(bias + i, count, T(0));
      put(transform_.apply(z), i, count);
    });
  }

  T sum() const {
    Vector<T> total{};
    for_each([&](Vector<T> x, int64_t, int64_t count) {
      if (count < lanes) {
        T buffer[lanes];
        store<T>(buffer, x);
        x = load_some<T>(buffer, count, T(0));
      }
      total += x;
    });
    return sum_lanes<T>(total);
  }

  // NaN never wins a comparison; it reaches the sums through exp instead.
  T maximum() const {
    Vector<T> largest = splat<T>(-infinity<T>);
    for_each([&](Vector<T> x, int64_t, int64_t) { largest = x > largest ? x : largest; });
    T buffer[lanes];
    store<T>(buffer, largest);
    return *std::max_element(buffer, buffer + lanes);
  }

  void move_shift(T top) const {
    T& shift = at<T>(tile_.shift);
    // The second condition is the start of a row whose label has probability 0.
    if (!(top - shift > static_cast<T>(tile_.bound)) && shift != -infinity<T>) return;
    if (top == -infinity<T>) return;
    const T decay = shift == -infinity<T> ? T(0) : std::exp(shift - top);
    T& rest_sum = at<T>(tile_.rest_sum);
    if (tile_.rest_entropy_sum != nullptr) {
      // -(a e) log(a e) = a (-e log e) - a log(a) e
      const T log_decay = shift - top;
      T& entropy_sum = at<T>(tile_.rest_entropy_sum);
      entropy_sum = decay == 0 ? T(0) : decay * entropy_sum - decay * log_decay * rest_sum;
      at<T>(tile_.rest_square_sum) *= decay * decay;
    }
    rest_sum *= decay;
    scale_row(tile_.accumulator, tile_.accumulator_stride, tile_.accumulator_columns, decay);
    scale_row(tile_.low_rank_accumulator, tile_.low_rank_stride, tile_.low_rank_columns, decay);
    shift = top;
  }

  void scale_row(void* matrix, int64_t stride, int64_t columns, T factor) const {
    if (matrix == nullptr) return;
    T* row = static_cast<T*>(matrix) + n_ * stride;
    for (int64_t i = 0; i < columns; ++i) row[i] *= factor;
  }

  // Returns the column of a new top token, or -1; the old top token joins the sums.
  int64_t update_top(T top) const {
    T& old_top = at<T>(tile_.top_logits);
    int64_t& old_id = tile_.top_ids[n_];
    if (tile_.released_ids != nullptr) tile_.released_ids[n_] = -1;
    if (!(top > old_top)) return -1;
    int64_t column = 0;
    while (x_[column] != top) ++column;
    if (old_top > -infinity<T>) release(old_top, old_id);
    old_top = top;
    old_id = tile_.first_column + column;
    return column;
  }

  void release(T x, int64_t id) const {
    const T log_e = x - at<T>(tile_.shift);
    const T e = exp_of<T>(splat<T>(log_e))[0];
    at<T>(tile_.rest_sum) += e;
    if (tile_.rest_entropy_sum != nullptr) {
      at<T>(tile_.rest_entropy_sum) += e == 0 ? T(0) : -e * log_e;
      at<T>(tile_.rest_square_sum) += e * e;
    }
    if (tile_.released_ids == nullptr) return;
    tile_.released_ids[n_] = id;
    at<T>(tile_.released_values) = exponential(x);
  }

  void accumulate() const {
    const T shift = at<T>(tile_.shift);
    // If all x so far are -inf, every exponential is 0; -inf - -inf would give NaN.
    const T finite_shift = shift == -infinity<T> ? T(0) : shift;
    const bool has_statistics = tile_.rest_entropy_sum != nullptr;
    const bool keeps = tile_.keeps_exponentials;
    Vector<T> sums{}, entropy_sums{}, square_sums{};
    for_each([&](Vector<T> x, int64_t i, int64_t count) {
      const Vector<T> log_e = x - finite_shift;
      const Vector<T> e = exp_of<T>(log_e);
      sums += e;
      if (has_statistics) {
        entropy_sums += e == 0 ? Vector<T>{} : -e * log_e;
        square_sums += e * e;
      }
      if (keeps) put(e * transform_.slope(x), i, count);
    });
    at<T>(tile_.rest_sum) += sum_lanes<T>(sums);
    if (has_statistics) {
      at<T>(tile_.rest_entropy_sum) += sum_lanes<T>(entropy_sums);
      at<T>(tile_.rest_square_sum) += sum_lanes<T>(square_sums);
    }
  }

  void replay() const {
    const T shift = at<T>(tile_.shift);
    const T finite_shift = shift == -infinity<T> ? T(0) : shift;
    for_each([&](Vector<T> x, int64_t i, int64_t count) {
      put(exp_of<T>(x - finite_shift) * transform_.slope(x), i, count);
    });
    put_at(label_, T(0));
    if (tile_.top_ids != nullptr) put_at(tile_.top_ids[n_] - tile_.first_column, T(0));
  }

  // Not left to exp(-inf): with a softcap the slope there is -inf, and 0 * -inf is NaN.
  void put_at(int64_t column, T value) const {
    if (tile_.keeps_exponentials && column >= 0 && column < columns_) x_[column] = value;
  }

  // e * phi of one logit.
  T exponential(T x) const {
    return exp_of<T>(splat<T>(x - at<T>(tile_.shift)))[0] * transform_.slope(splat<T>(x))[0];
  }

  const RealignTile& tile_;
  const int64_t n_;
  const int64_t columns_;
  T* const x_;
  const int64_t label_;
  const Transform<T> transform_;
};

template <typename T>
void run_epilogue(const RealignTile& tile) {
#pragma omp parallel for schedule(static) num_threads(tile.num_threads)
  for (int64_t n = 0; n < tile.num_rows; ++n) Row<T>(tile, n).run();
}

void epilogue(const RealignTile* tile) {
  if (tile->is_double)
    run_epilogue<double>(*tile);
  else
    run_epilogue<float>(*tile);
}

// ---- rows of the weight

// Calls f with a typed pointer to the weight.
template <typename F>
void with_type(int32_t weight_type, const void* weight, F f) {
  switch (weight_type) {
    case REALIGN_FLOAT32:
      return f(static_cast<const float*>(weight));
    case REALIGN_FLOAT64:
      return f(static_cast<const double*>(weight));
    case REALIGN_BFLOAT16:
      return f(static_cast<const Bfloat16*>(weight));
    case REALIGN_FLOAT16:
      return f(static_cast<const Float16*>(weight));
  }
}

template <typename T, typename H, typename W>
T dot(const H* a, const W* b, int64_t a_stride, int64_t b_stride, int64_t size) {
  // As many partial sums as lanes; the compiler turns the inner loop into vectors.
  constexpr int lanes = Traits<T>::lanes;
  T sums[lanes] = {};
  int64_t i = 0;
  if (a_stride == 1 && b_stride == 1) {
    for (; i + lanes <= size; i += lanes)
      for (int lane = 0; lane < lanes; ++lane) sums[lane] += static_cast<T>(widen(a[i + lane])) * static_cast<T>(widen(b[i + lane]));
  }
  for (; i < size; ++i) sums[i % lanes] += static_cast<T>(widen(a[i * a_stride])) * static_cast<T>(widen(b[i * b_stride]));
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

// Sums of 256 terms are added in order.  The inner loop runs over rows or over terms, whichever are contiguous.
template <typename T>
void run_vector_product(int32_t num_threads, int32_t adds, int64_t num_rows, int64_t num_terms, const T* a,
                        int64_t row_stride, int64_t term_stride, const T* b, int64_t b_stride, T* out,
                        int64_t out_stride) {
  constexpr int64_t width = 64, chunk = 256;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t begin = 0; begin < num_rows; begin += width) {
    const int64_t count = std::min(width, num_rows - begin);
    T totals[width] = {};
    if (adds)
      for (int64_t i = 0; i < count; ++i) totals[i] = out[(begin + i) * out_stride];
    for (int64_t first = 0; first < num_terms; first += chunk) {
      const int64_t last = std::min(first + chunk, num_terms);
      T sums[width] = {};
      if (row_stride == 1) {
        for (int64_t k = first; k < last; ++k) {
          const T* terms = a + begin + k * term_stride;
          const T factor = b[k * b_stride];
          for (int64_t i = 0; i < count; ++i) sums[i] += terms[i] * factor;
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          const T* terms = a + (begin + i) * row_stride + first * term_stride;
          sums[i] = dot<T>(b + first * b_stride, terms, b_stride, term_stride, last - first);
        }
      }
      for (int64_t i = 0; i < count; ++i) totals[i] += sums[i];
    }
    for (int64_t i = 0; i < count; ++i) out[(begin + i) * out_stride] = totals[i];
  }
}

void vector_product(int32_t is_double, int32_t num_threads, int32_t adds, int64_t num_rows, int64_t num_terms,
                    const void* a, int64_t row_stride, int64_t term_stride, const void* b, int64_t b_stride,
                    void* out, int64_t out_stride) {
  const auto run = [&](const auto* rows, const auto* factors, auto* sums) {
    run_vector_product(num_threads, adds, num_rows, num_terms, rows, row_stride, term_stride, factors, b_stride, sums,
                       out_stride);
  };
  if (is_double)
    run(static_cast<const double*>(a), static_cast<const double*>(b), static_cast<double*>(out));
  else
    run(static_cast<const float*>(a), static_cast<const float*>(b), static_cast<float*>(out));
}

template <typename T, typename H>
void run_label_dot(int32_t num_threads, int64_t num_rows, int64_t hidden_size, const H* hidden,
                   int64_t hidden_stride, int32_t weight_type, const void* weight, int64_t weight_stride,
                   int64_t weight_column_stride, int64_t num_ids, const int64_t* ids, T* out) {
  with_type(weight_type, weight, [&](const auto* rows) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t n = 0; n < num_rows; ++n) {
      if (ids[n] < 0 || ids[n] >= num_ids) continue;
      out[n] += dot<T>(hidden + n * hidden_stride, rows + ids[n] * weight_stride, 1, weight_column_stride,
                       hidden_size);
    }
  });
}

void label_dot(int32_t hidden_type, int32_t num_threads, int64_t num_rows, int64_t hidden_size, const void* hidden,
               int64_t hidden_stride, int32_t weight_type, const void* weight, int64_t weight_stride,
               int64_t weight_column_stride, int64_t num_ids, const int64_t* ids, void* out) {
  const auto run = [&](const auto* rows, auto* sums) {
    run_label_dot(num_threads, num_rows, hidden_size, rows, hidden_stride, weight_type, weight, weight_stride,
                  weight_column_stride, num_ids, ids, sums);
  };
  if (hidden_type == REALIGN_FLOAT64)
    run(static_cast<const double*>(hidden), static_cast<double*>(out));
  else if (hidden_type == REALIGN_BFLOAT16)
    run(static_cast<const Bfloat16*>(hidden), static_cast<float*>(out));
  else
    run(static_cast<const float*>(hidden), static_cast<float*>(out));
}

template <typename T>
void run_combine(int32_t num_threads, int64_t num_rows, int64_t hidden_size, T* accumulator,
                 int64_t accumulator_stride, const T* scale, int32_t weight_type, const void* weight,
                 int64_t weight_stride, int64_t weight_column_stride, int64_t num_ids, const int64_t* ids,
                 const T* coefficient) {
  with_type(weight_type, weight, [&](const auto* rows) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t n = 0; n < num_rows; ++n) {
      T* row = accumulator + n * accumulator_stride;
      const T factor = scale[n], added = coefficient[n];
      if (ids[n] < 0 || ids[n] >= num_ids) {
        if (factor != 1)
          for (int64_t i = 0; i < hidden_size; ++i) row[i] *= factor;
        continue;
      }
      const auto* other = rows + ids[n] * weight_stride;
      if (weight_column_stride == 1)
        for (int64_t i = 0; i < hidden_size; ++i) row[i] = factor * row[i] + added * static_cast<T>(widen(other[i]));
      else
        for (int64_t i = 0; i < hidden_size; ++i)
          row[i] = factor * row[i] + added * static_cast<T>(widen(other[i * weight_column_stride]));
    }
  });
}

void combine(int32_t is_double, int32_t num_threads, int64_t num_rows, int64_t hidden_size, void* accumulator,
             int64_t accumulator_stride, const void* scale, int32_t weight_type, const void* weight,
             int64_t weight_stride, int64_t weight_column_stride, int64_t num_ids, const int64_t* ids,
             const void* coefficient) {
  if (is_double)
    run_combine(num_threads, num_rows, hidden_size, static_cast<double*>(accumulator), accumulator_stride,
                static_cast<const double*>(scale), weight_type, weight, weight_stride, weight_column_stride, num_ids,
                ids, static_cast<const double*>(coefficient));
  else
    run_combine(num_threads, num_rows, hidden_size, static_cast<float*>(accumulator), accumulator_stride,
                static_cast<const float*>(scale), weight_type, weight, weight_stride, weight_column_stride, num_ids,
                ids, static_cast<const float*>(coefficient));
}

template <typename T, typename H>
void run_add_entries(int32_t num_threads, int64_t num_columns, int64_t hidden_size, T* out, int64_t out_stride,
                     const int64_t* starts, const int64_t* order, const T* coefficient, const H* hidden,
                     int64_t hidden_stride, int64_t num_rows) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t v = 0; v < num_columns; ++v) {
    T* sum = out + v * out_stride;
    for (int64_t e = starts[v]; e < starts[v + 1]; ++e) {
      const T factor = coefficient[order[e]];
      const H* row = hidden + (order[e] % num_rows) * hidden_stride;
      for (int64_t i = 0; i < hidden_size; ++i) sum[i] += factor * widen(row[i]);
    }
  }
}

void add_entries(int32_t hidden_type, int32_t num_threads, int64_t num_columns, int64_t hidden_size, void* out,
                 int64_t out_stride, const int64_t* starts, const int64_t* order, const void* coefficient,
                 const void* hidden, int64_t hidden_stride, int64_t num_rows) {
  const auto run = [&](const auto* rows, const auto* factors, auto* sums) {
    run_add_entries(num_threads, num_columns, hidden_size, sums, out_stride, starts, order, factors, rows, hidden_stride,
                    num_rows);
  };
  const auto run_in_float = [&](const auto* rows) {
    run(rows, static_cast<const float*>(coefficient), static_cast<float*>(out));
  };
  if (hidden_type == REALIGN_FLOAT64)
    run(static_cast<const double*>(hidden), static_cast<const double*>(coefficient), static_cast<double*>(out));
  else if (hidden_type == REALIGN_BFLOAT16)
    run_in_float(static_cast<const Bfloat16*>(hidden));
  else
    run_in_float(static_cast<const float*>(hidden));
}

}  // namespace

const Kernels REALIGN_KERNELS = {epilogue, label_dot, combine, add_entries, vector_product};
