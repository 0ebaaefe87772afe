// Every kernel, for the instruction set of this file's name (flags: setup.py)
#define GPTFAST_ISA avx512
#include "cpu/kernels.h"
