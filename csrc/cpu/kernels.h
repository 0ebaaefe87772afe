// All *_kernel.h: what each kernels_<isa>.cpp compiles once for its instruction set.
#pragma once

#include "cpu/adamw__kernel.h"
#include "cpu/add_layer_norm_kernel.h"
#include "cpu/attention_backward_kernel.h"
#include "cpu/attention_kernel.h"
#include "cpu/cache_append__kernel.h"
#include "cpu/convert_kernel.h"
#include "cpu/cross_entropy_kernel.h"
#include "cpu/decode_attention_kernel.h"
#include "cpu/dropout_kernel.h"
#include "cpu/embedding_kernel.h"
#include "cpu/gelu_kernel.h"
#include "cpu/grad_norm_kernel.h"
#include "cpu/layer_norm_kernel.h"
#include "cpu/partials_kernel.h"
#include "cpu/read_bandwidth_kernel.h"
#include "cpu/transpose_kernel.h"
