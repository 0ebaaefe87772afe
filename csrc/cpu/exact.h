// The *_kernel.h whose results are the same on every instruction set: what each exact_<isa>.cpp compiles, without contraction to FMA.
#pragma once

#include "cpu/engine/pack_kernel.h"
#include "cpu/engine/quantised_kernel.h"
#include "cpu/sample_kernel.h"
