// The kernels whose bits are prescribed, for the instruction set of this file's name (flags: setup.py)
#define GPTFAST_ISA avx512
#include "cpu/exact.h"
