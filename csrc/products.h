// The products that exist once for each kind of instructions.
#pragma once

#include "realign_kernels.h"

#ifdef _OPENMP
#include <omp.h>
inline int thread_number() { return omp_get_thread_num(); }
#else
inline int thread_number() { return 0; }
#endif

struct Products {
  decltype(&realign_product) product;
};

extern const Products products_portable;
extern const Products products_avx512;
extern const Products products_amx;
