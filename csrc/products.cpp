// Products of bfloat16 matrices with sums in float32, compiled once for each kind of instructions (AMX
// tiles, AVX512-BF16, or plain C++, which tests use): REALIGN_PRODUCTS names the table.
//
// `chunk` terms are summed at a time; the sums of chunks are added in float32, first to last.  Rows
// and columns beyond the edges are zeros in the packed copies, so that no entry of the result depends on
// the number of other entries, or on the number of threads.  The instructions take subnormal numbers
// for zeros; plain C++ does not.
#include "products.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using Bits = uint16_t;  // of a bfloat16

constexpr int64_t chunk = 256;           // terms
constexpr int64_t group = 4 * chunk;     // terms that are packed at once
constexpr int64_t step = 32;             // the terms of a chunk are padded to a multiple of this
constexpr int64_t columns = 32;          // columns of a block that a kernel computes
constexpr int64_t cache_bytes = 1 << 20;  // size of the packed rows that are read again for every panel
constexpr int64_t mark_rows = 16;         // this many rows by `step` terms share a mark
constexpr int64_t packed_rows = 64;       // rows that a thread packs at a time
constexpr int64_t ahead = 128;            // terms of b are prefetched this far ahead

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

float widen(Bits value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

Bits rounded(float value) {
#if defined(__AVX512BF16__)
  return static_cast<Bits>(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0));
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bits>((bits >> 16) | 0x40u);
  return static_cast<Bits>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// ---- kernels: set `rows` by `columns` sums of products of packed rows and a packed panel

#if defined(__AMX_BF16__)

constexpr int64_t rows = 32;
constexpr int64_t widest_panel = 8 * columns;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sets the tile configuration of a thread, and restores the previous one when destroyed.
class Instructions {
 public:
  Instructions() {
    _tile_storeconfig(&before_);
    const TileConfig own;
    _tile_loadconfig(&own);
  }
  ~Instructions() {
    if (before_.palette == 0)
      _tile_release();
    else
      _tile_loadconfig(&before_);
  }

 private:
  TileConfig before_;
};

void multiply(const Bits* a, int64_t a_stride, const Bits* b, int64_t num_terms, float* sums, int64_t stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t a_bytes = a_stride * sizeof(Bits), b_bytes = 2 * columns * sizeof(Bits);
  for (int64_t k = 0; k < num_terms; k += step) {
    const Bits* const b_step = b + k * columns;
    _tile_loadd(6, b_step, b_bytes);
    _tile_loadd(7, b_step + columns, b_bytes);
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, a + 16 * a_stride + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  const int64_t bytes = stride * sizeof(float);
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + 16, bytes);
  _tile_stored(2, sums + 16 * stride, bytes);
  _tile_stored(3, sums + 16 * stride + 16, bytes);
}

#elif defined(__AVX512BF16__)

constexpr int64_t rows = 12;  // 24 registers of sums, 2 of the panel
constexpr int64_t widest_panel = 2 * columns;

struct Instructions {
  Instructions() {}
};

void multiply(const Bits* a, int64_t a_stride, const Bits* b, int64_t num_terms, float* sums, int64_t stride) {
  __m512 total[rows][2];
#pragma GCC unroll 12
  for (int64_t i = 0; i < rows; ++i) total[i][0] = total[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < num_terms; k += 2) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * columns);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k * columns + columns);
#pragma GCC unroll 12
    for (int64_t i = 0; i < rows; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * a_stride + k, sizeof(pair));
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      total[i][0] = _mm512_dpbf16_ps(total[i][0], x, b0);
      total[i][1] = _mm512_dpbf16_ps(total[i][1], x, b1);
    }
  }
#pragma GCC unroll 12
  for (int64_t i = 0; i < rows; ++i) {
    _mm512_storeu_ps(sums + i * stride, total[i][0]);
    _mm512_storeu_ps(sums + i * stride + 16, total[i][1]);
  }
}

#else

constexpr int64_t rows = 4;
constexpr int64_t widest_panel = 2 * columns;

struct Instructions {
  Instructions() {}
};

void multiply(const Bits* a, int64_t a_stride, const Bits* b, int64_t num_terms, float* sums, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    float total[columns] = {};
    for (int64_t k = 0; k < num_terms; ++k) {
      const float x = widen(a[i * a_stride + k]);
      const Bits* const b_pair = b + k / 2 * 2 * columns + k % 2;
      for (int64_t j = 0; j < columns; ++j) total[j] += x * widen(b_pair[2 * j]);
    }
    std::memcpy(sums + i * stride, total, sizeof(total));
  }
}

#endif

// ---- packing

#if defined(__AVX512BF16__)

// Transposes 16 x 16 lanes of 32 bits.
void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

#endif

class Product {
 public:
  explicit Product(const RealignProduct& given) : p_(given), num_marks_(round_up(given.num_terms, step) / step) {
    const int64_t packed_terms = std::min(group, round_up(std::max<int64_t>(given.num_terms, 1), step));
    // As many rows as stay in the cache while all panels are multiplied; no mark belongs to two such parts.
    constexpr int64_t unit = 4 * rows;
    static_assert(unit % mark_rows == 0 && packed_rows % mark_rows == 0, "one thread writes a mark");
    cached_rows_ = std::max(unit, cache_bytes / int64_t{sizeof(Bits)} / packed_terms / unit * unit);
    cached_rows_ = std::min(cached_rows_, round_up(std::max<int64_t>(given.num_rows, 1), rows));
    // Smaller tasks, if there would be fewer of them than threads.
    panel_ = widest_panel;
    task_rows_ = cached_rows_;
    while (num_tasks() < given.num_threads && panel_ > 2 * columns) panel_ /= 2;
    while (num_tasks() < given.num_threads && task_rows_ > rows) task_rows_ = round_up(task_rows_ / 2, rows);
    const int64_t num_packed = cached_rows_ * packed_terms, num_panels = given.num_threads * panel_ * group;
    int64_t bytes = (num_packed + num_panels) * int64_t{sizeof(Bits)};
    if (given.limits != nullptr) bytes += round_up(given.num_rows, mark_rows) / mark_rows * num_marks_;
    a_ = static_cast<Bits*>(std::aligned_alloc(64, static_cast<std::size_t>(round_up(bytes, 64))));
    panels_ = a_ + num_packed;
    marks_ = reinterpret_cast<uint8_t*>(panels_ + num_panels);
  }
  ~Product() { std::free(a_); }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  // Returns whether there was enough memory.
  bool run() {
    if (a_ == nullptr) return false;
    for (row_ = 0; row_ < p_.num_rows; row_ += cached_rows_)
      for (term_ = 0; term_ < p_.num_terms || term_ == 0; term_ += group) {
        num_terms_ = std::min(group, p_.num_terms - term_);
        end_ = std::min(row_ + cached_rows_, round_up(p_.num_rows, rows));
#pragma omp parallel num_threads(p_.num_threads)
        {
          const Instructions instructions;
#pragma omp for schedule(static)
          for (int64_t m = row_; m < end_; m += packed_rows) pack_rows(m, std::min(m + packed_rows, end_));
#pragma omp for schedule(static)
          for (int64_t task = 0; task < num_tasks(); ++task) {
            const int64_t begin = row_ + task / num_panels() * task_rows_;
            compute(begin, std::min(begin + task_rows_, end_), task % num_panels() * panel_);
          }
        }
      }
    if (p_.limits != nullptr) {
#pragma omp parallel for schedule(static) num_threads(p_.num_threads)
      for (int64_t m = 0; m < p_.num_rows; m += mark_rows) add_remainders(m, std::min(m + mark_rows, p_.num_rows));
    }
    return true;
  }

 private:
  int64_t num_panels() const { return round_up(p_.num_columns, panel_) / panel_; }
  int64_t num_tasks() const { return num_panels() * (round_up(cached_rows_, task_rows_) / task_rows_); }

  template <typename T>
  const T* a(int64_t m, int64_t k) const {
    return static_cast<const T*>(p_.a) + m * p_.a_row_stride + k * p_.a_term_stride;
  }
  const Bits* b(int64_t k, int64_t n) const {
    return static_cast<const Bits*>(p_.b) + k * p_.b_term_stride + n * p_.b_column_stride;
  }
  float limit(int64_t m, int64_t k) const { return p_.limits[p_.limits_are_of_rows ? m : k]; }
  float scaled(int64_t m, int64_t k) const {
    return p_.scale == nullptr ? *a<float>(m, k) : *a<float>(m, k) * p_.scale[k];
  }
  uint8_t& mark(int64_t m, int64_t k) const { return marks_[m / mark_rows * num_marks_ + k / step]; }

  // The rows of a chunk follow each other, padded to `step` terms, and so do the chunks.
  Bits* packed(int64_t m, int64_t first_of_chunk, int64_t stride) const {
    return a_ + first_of_chunk * cached_rows_ + (m - row_) * stride;
  }

  // Packs the rows of the group from `begin` to `end`.
  void pack_rows(int64_t begin, int64_t end) const {
    const int64_t last = std::min(end, p_.num_rows);
    const bool is_transposed = p_.a_type == REALIGN_FLOAT32 && p_.a_row_stride == 1 && p_.a_term_stride != 1;
    if (p_.limits != nullptr)
      for (int64_t m = begin; m < last; m += mark_rows)
        for (int64_t k = term_; k < term_ + num_terms_; k += step) mark(m, k) = 0;
    for (int64_t first = 0; first < num_terms_; first += chunk) {
      const int64_t count = std::min(chunk, num_terms_ - first), stride = round_up(count, step);
      const int64_t k = term_ + first;
      if (!is_transposed) {
        for (int64_t m = begin; m < last; ++m) pack_row(packed(m, first, stride), m, k, count, stride);
        std::fill(packed(std::max(begin, last), first, stride), packed(end, first, stride), Bits{0});
        continue;
      }
      for (int64_t i = 0; i < stride; i += step)
        for (int64_t m = begin; m < end; m += 16)
          pack_transposed(packed(m, first, stride) + i, m, std::min(m + 16, last), std::min(m + 16, end), k + i,
                          std::min(step, count - i), stride);
    }
  }

  // Packs `count` terms of a row, padded with zeros.
  void pack_row(Bits* out, int64_t m, int64_t k, int64_t count, int64_t filled) const {
    std::fill(out + count, out + filled, Bits{0});
    if (p_.a_type == REALIGN_BFLOAT16) {
      if (p_.a_term_stride == 1)
        std::memcpy(out, a<Bits>(m, k), count * sizeof(Bits));
      else
        for (int64_t i = 0; i < count; ++i) out[i] = *a<Bits>(m, k + i);
      return;
    }
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if (p_.a_term_stride == 1 && p_.scale == nullptr && (p_.limits == nullptr || p_.limits_are_of_rows)) {
      const __m512 limits = _mm512_set1_ps(p_.limits == nullptr ? INFINITY : p_.limits[m]);
      for (; i + step <= count; i += step) {
        const __m512 low = _mm512_loadu_ps(a<float>(m, k + i)), high = _mm512_loadu_ps(a<float>(m, k + i + 16));
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        const __mmask16 is_large =
            _mm512_cmp_ps_mask(_mm512_abs_ps(low), limits, _CMP_GE_OQ) |
            _mm512_cmp_ps_mask(_mm512_abs_ps(high), limits, _CMP_GE_OQ);
        if (is_large && p_.limits != nullptr) mark(m, k + i) = 1;
      }
    }
#endif
    for (; i < count; ++i) pack_entry(out + i, m, k + i);
  }

  void pack_entry(Bits* out, int64_t m, int64_t k) const {
    *out = rounded(scaled(m, k));
    if (p_.limits != nullptr && std::fabs(*a<float>(m, k)) >= limit(m, k)) mark(m, k) = 1;
  }

  // Packs up to `step` terms of up to 16 rows whose values are adjacent; zeros from `last` to `end`.
  void pack_transposed(Bits* out, int64_t begin, int64_t last, int64_t end, int64_t k, int64_t count,
                       int64_t stride) const {
#if defined(__AVX512BF16__)
    if (last - begin == 16 && count == step && (p_.limits == nullptr || !p_.limits_are_of_rows)) {
      __m512i pairs[16];
      __mmask16 is_large = 0;
      for (int64_t i = 0; i < 16; ++i) {
        __m512i bits[2];
        for (int64_t j = 0; j < 2; ++j) {
          const int64_t term = k + 2 * i + j;
          __m512 x = _mm512_loadu_ps(a<float>(begin, term));
          if (p_.limits != nullptr)
            is_large |= _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(p_.limits[term]), _CMP_GE_OQ);
          if (p_.scale != nullptr) x = _mm512_mul_ps(x, _mm512_set1_ps(p_.scale[term]));
          bits[j] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
        }
        pairs[i] = _mm512_or_si512(bits[0], _mm512_slli_epi32(bits[1], 16));
      }
      transpose(pairs);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * stride, pairs[i]);
      if (is_large) mark(begin, k) = 1;
      return;
    }
#endif
    for (int64_t m = begin; m < end; ++m) {
      Bits* const row = out + (m - begin) * stride;
      std::fill(row, row + step, Bits{0});
      for (int64_t i = 0; i < count && m < last; ++i) pack_entry(row + i, m, k + i);
    }
  }

  // Packs a panel of b: pairs of terms, [terms / 2][columns][2], for each `columns` of it and each chunk.
  // It is read in the direction in which it is contiguous.
  void pack_panel(Bits* out, int64_t n) const {
    const int64_t width = round_up(std::min(panel_, p_.num_columns - n), columns);
    for (int64_t first = 0; first < num_terms_; first += chunk) {
      const int64_t count = std::min(chunk, num_terms_ - first), filled = round_up(count, step);
      const auto part = [&](int64_t k, int64_t j) {
        return out + first * panel_ + j / columns * columns * filled + k * columns + j % columns * 2;
      };
      if (p_.b_column_stride == 1)
        for (int64_t k = 0; k < filled; k += 2)
          for (int64_t j = 0; j < width; j += columns) pack_pair(part(k, j), term_ + first + k, count - k, n + j);
      else
        for (int64_t j = 0; j < width; j += 16)
          for (int64_t k = 0; k < filled; k += step)
            pack_block(part(k, j), term_ + first + k, std::min(step, count - k), n + j);
    }
  }

  // Packs two terms of `columns` columns; missing ones are zeros.
  void pack_pair(Bits* out, int64_t k, int64_t num_terms, int64_t n) const {
    const int64_t num_columns = std::min(columns, p_.num_columns - n);
#if defined(__AVX512BF16__)
    if (num_terms >= 2 && num_columns == columns) {
      __builtin_prefetch(b(k + ahead, n));
      __builtin_prefetch(b(k + ahead + 1, n));
      const __m512i even = _mm512_loadu_si512(b(k, n)), odd = _mm512_loadu_si512(b(k + 1, n));
      const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
      const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
      const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
      _mm512_storeu_si512(out, _mm512_permutex2var_epi64(low, first, high));
      _mm512_storeu_si512(out + columns, _mm512_permutex2var_epi64(low, second, high));
      return;
    }
#endif
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t j = 0; j < columns; ++j)
        out[2 * j + i] = i < num_terms && j < num_columns ? *b(k + i, n + j) : Bits{0};
  }

  // Packs `step` terms of 16 columns; missing ones are zeros.
  void pack_block(Bits* out, int64_t k, int64_t num_terms, int64_t n) const {
    const int64_t num_columns = std::min<int64_t>(16, p_.num_columns - n);
#if defined(__AVX512BF16__)
    if (num_terms == step && num_columns == 16 && p_.b_term_stride == 1) {
      __m512i pairs[16];
      for (int64_t j = 0; j < 16; ++j) {
        pairs[j] = _mm512_loadu_si512(b(k, n + j));
        __builtin_prefetch(b(k + ahead, n + j));
      }
      transpose(pairs);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + 2 * columns * i, pairs[i]);
      return;
    }
#endif
    for (int64_t i = 0; i < step; ++i)
      for (int64_t j = 0; j < 16; ++j)
        out[i / 2 * 2 * columns + 2 * j + i % 2] = i < num_terms && j < num_columns ? *b(k + i, n + j) : Bits{0};
  }

  // Computes the rows from `begin` to `end` of the panel that starts at column n.
  void compute(int64_t begin, int64_t end, int64_t n) const {
    Bits* const packed_panel = panels_ + thread_number() * panel_ * group;
    pack_panel(packed_panel, n);
    alignas(64) float sums[rows * widest_panel] = {}, partial[rows * columns];
    const int64_t num_columns = std::min(panel_, p_.num_columns - n);
    const bool starts_at_out = p_.adds || term_ > 0;
    for (int64_t m = begin; m < end; m += rows) {
      const int64_t num_rows = std::min(rows, p_.num_rows - m);
      float* const out = p_.out + m * p_.out_stride + n;
      if (starts_at_out)
        for (int64_t i = 0; i < num_rows; ++i) std::copy_n(out + i * p_.out_stride, num_columns, sums + i * panel_);
      for (int64_t first = 0; first < num_terms_; first += chunk) {
        const int64_t filled = round_up(std::min(chunk, num_terms_ - first), step);
        for (int64_t j = 0; j < num_columns; j += columns) {
          const Bits* const packed_columns = packed_panel + first * panel_ + j * filled;
          if (first == 0 && !starts_at_out) {
            multiply(packed(m, first, filled), filled, packed_columns, filled, sums + j, panel_);
            continue;
          }
          multiply(packed(m, first, filled), filled, packed_columns, filled, partial, columns);
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t column = 0; column < columns; ++column)
              sums[i * panel_ + j + column] += partial[i * columns + column];
        }
      }
      for (int64_t i = 0; i < num_rows; ++i) std::copy_n(sums + i * panel_, num_columns, out + i * p_.out_stride);
    }
  }

  // Adds the rounding errors of the large entries of a, times their rows of b.
  void add_remainders(int64_t begin, int64_t end) const {
    for (int64_t k = 0; k < p_.num_terms; k += step) {
      if (!mark(begin, k)) continue;
      const int64_t last = std::min(k + step, p_.num_terms);
      if (p_.a_term_stride == 1)
        for (int64_t m = begin; m < end; ++m)
          for (int64_t i = k; i < last; i += 16) {
            uint32_t large = find_large(m, i, std::min<int64_t>(16, last - i), true);
            for (; large != 0; large &= large - 1) add_remainder(m, i + __builtin_ctz(large));
          }
      else
        for (int64_t i = k; i < last; ++i)
          for (uint32_t large = find_large(begin, i, end - begin, false); large != 0; large &= large - 1)
            add_remainder(begin + __builtin_ctz(large), i);
    }
  }

  // Returns one bit for each of up to 16 entries, along terms or rows: whether it reaches its limit.
  uint32_t find_large(int64_t m, int64_t k, int64_t count, bool along_terms) const {
#if defined(__AVX512BF16__)
    if (count == 16 && (along_terms || p_.a_row_stride == 1)) {
      const bool is_one = along_terms == (p_.limits_are_of_rows != 0);
      const __m512 limits = is_one ? _mm512_set1_ps(limit(m, k)) : _mm512_loadu_ps(&p_.limits[along_terms ? k : m]);
      return _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_loadu_ps(a<float>(m, k))), limits, _CMP_GE_OQ);
    }
#endif
    uint32_t large = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = along_terms ? m : m + i, term = along_terms ? k + i : k;
      large |= static_cast<uint32_t>(std::fabs(*a<float>(row, term)) >= limit(row, term)) << i;
    }
    return large;
  }

  void add_remainder(int64_t m, int64_t k) const {
    const float x = scaled(m, k), remainder = x - widen(rounded(x));
    if (remainder != 0 && std::isfinite(remainder)) add_multiple(p_.out + m * p_.out_stride, remainder, b(k, 0));
  }

  void add_multiple(float* out, float factor, const Bits* row) const {
    if (p_.b_column_stride == 1)
      for (int64_t n = 0; n < p_.num_columns; ++n) out[n] += factor * widen(row[n]);
    else
      for (int64_t n = 0; n < p_.num_columns; ++n) out[n] += factor * widen(row[n * p_.b_column_stride]);
  }

  const RealignProduct& p_;
  const int64_t num_marks_;  // per mark_rows rows
  int64_t cached_rows_, panel_, task_rows_;
  Bits* a_;         // the packed rows of a group
  Bits* panels_;    // one for each thread
  uint8_t* marks_;  // whether any entry of mark_rows rows by step terms is large
  int64_t row_ = 0, end_ = 0;          // the cached rows
  int64_t term_ = 0, num_terms_ = 0;   // the group
};

int32_t product(const RealignProduct* given) { return Product(*given).run(); }

}  // namespace

extern const Products REALIGN_PRODUCTS{product};
