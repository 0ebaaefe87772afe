// Every kernel, for the instruction set of this file's name (flags: setup.py)
#define GPTFAST_ISA avx2
#include "cpu/kernels.h"
