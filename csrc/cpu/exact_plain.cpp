// The kernels whose bits are prescribed, for the instruction set of this file's name (flags: setup.py)
#define GPTFAST_ISA plain
#include "cpu/exact.h"
