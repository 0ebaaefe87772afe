// All *_kernel.h: what each kernels_<isa>.cpp compiles once for its instruction set.
#pragma once

#include "cpu/cache_append__kernel.h"
#include "cpu/convert_kernel.h"
#include "cpu/decode_attention_kernel.h"
#include "cpu/layer_norm_kernel.h"
#include "cpu/partials_kernel.h"
