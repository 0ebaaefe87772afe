// Every kernel, for the instruction set of this file's name (flags: setup.py)
#define GPTFAST_ISA plain
#include "cpu/kernels.h"
