// Chooses the instruction set once, when the library is first called.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "products.h"

#ifdef REALIGN_X86
#include <cpuid.h>
#endif
#ifdef REALIGN_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels* kernels;
};

Choice choose() {
#ifdef REALIGN_X86
  // For tests, REALIGN_CPU_ISA=avx2 or baseline asks for less than the machine has.
  const char* wanted = std::getenv("REALIGN_CPU_ISA");
  const auto allows = [&](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
  __builtin_cpu_init();
  if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return {"avx512", &kernels_avx512};
  if (allows("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", &kernels_avx2};
#endif
  return {"baseline", &kernels_baseline};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

struct ProductChoice {
  const char* name;
  const Products* products;
};

#ifdef REALIGN_AMX
// Whether the CPU has AMX tiles for bfloat16, and Linux lets this process use them.
bool has_amx() {
  unsigned a, b, c, d;
  const unsigned bits = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bits) != bits) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

#ifdef REALIGN_AVX512BF16
bool has_avx512bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5) != 0;
}

// Whether a multiplication of bfloat16 pairs takes no longer than one in float32; on Intel's CPUs it takes longer.
bool is_avx512bf16_fast() { return !__builtin_cpu_is("intel"); }
#endif

ProductChoice choose_products() {
  // For tests, REALIGN_CPU_PRODUCTS=amx, avx512, portable or none asks for one of those that run here.
  const char* wanted = std::getenv("REALIGN_CPU_PRODUCTS");
  const auto asks = [&](const char* name) { return wanted != nullptr && std::strcmp(wanted, name) == 0; };
  if (asks("portable")) return {"portable", &products_portable};
  if (asks("none") || std::strcmp(choice().name, "avx512") != 0) return {"none", nullptr};
#ifdef REALIGN_AMX
  if (!asks("avx512") && has_avx512bf16() && has_amx()) return {"amx", &products_amx};
#endif
#ifdef REALIGN_AVX512BF16
  if (!asks("amx") && has_avx512bf16() && (asks("avx512") || is_avx512bf16_fast())) return {"avx512", &products_avx512};
#endif
  return {"none", nullptr};
}

const ProductChoice& product_choice() {
  static const ProductChoice chosen = choose_products();
  return chosen;
}

}  // namespace

extern "C" {

int32_t realign_abi_version() { return REALIGN_ABI_VERSION; }

const char* realign_instruction_set() { return choice().name; }

const char* realign_product_set() { return product_choice().name; }

int32_t realign_product(const RealignProduct* product) { return product_choice().products->product(product); }

void realign_use_large_pages(void* start, int64_t num_bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(num_bytes)) / page * page;
  // Without large pages, or with pages of another size, nothing changes.
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)start, (void)num_bytes;
#endif
}

void realign_epilogue(const RealignTile* tile) { choice().kernels->epilogue(tile); }

void realign_label_dot(int32_t hidden_type, int32_t num_threads, int64_t num_rows, int64_t hidden_size,
                       const void* hidden, int64_t hidden_stride, int32_t weight_type, const void* weight,
                       int64_t weight_stride, int64_t weight_column_stride, int64_t num_ids, const int64_t* ids,
                       void* out) {
  choice().kernels->label_dot(hidden_type, num_threads, num_rows, hidden_size, hidden, hidden_stride, weight_type,
                              weight, weight_stride, weight_column_stride, num_ids, ids, out);
}

void realign_combine(int32_t is_double, int32_t num_threads, int64_t num_rows, int64_t hidden_size,
                     void* accumulator, int64_t accumulator_stride, const void* scale, int32_t weight_type,
                     const void* weight, int64_t weight_stride, int64_t weight_column_stride, int64_t num_ids,
                     const int64_t* ids, const void* coefficient) {
  choice().kernels->combine(is_double, num_threads, num_rows, hidden_size, accumulator, accumulator_stride, scale,
                            weight_type, weight, weight_stride, weight_column_stride, num_ids, ids, coefficient);
}

void realign_add_entries(int32_t hidden_type, int32_t num_threads, int64_t num_columns, int64_t hidden_size, void* out,
                         int64_t out_stride, const int64_t* starts, const int64_t* order, const void* coefficient,
                         const void* hidden, int64_t hidden_stride, int64_t num_rows) {
  choice().kernels->add_entries(hidden_type, num_threads, num_columns, hidden_size, out, out_stride, starts, order,
                                coefficient, hidden, hidden_stride, num_rows);
}

void realign_vector_product(int32_t is_double, int32_t num_threads, int32_t adds, int64_t num_rows,
                            int64_t num_terms, const void* a, int64_t row_stride, int64_t term_stride,
                            const void* b, int64_t b_stride, void* out, int64_t out_stride) {
  choice().kernels->vector_product(is_double, num_threads, adds, num_rows, num_terms, a, row_stride, term_stride, b,
                                   b_stride, out, out_stride);
}

}
