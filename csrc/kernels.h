// The kernels that exist once for each instruction set.
#pragma once

#include "realign_kernels.h"

struct Kernels {
  decltype(&realign_epilogue) epilogue;
  decltype(&realign_label_dot) label_dot;
  decltype(&realign_combine) combine;
  decltype(&realign_add_entries) add_entries;
  decltype(&realign_vector_product) vector_product;
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
