#include "householder.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/real.h"
#include "../kern/kern.h"

size_t
mli_turn_back_scratch(int64_t n, int64_t count)
{
    const size_t block = (size_t)MLI_REFLECTORS;
    size_t numbers = mli_size_mul(block, (size_t)n); /* V, S and T, U and U T */

    numbers = mli_size_add(numbers, 2 * block * block);
    return mli_size_add(numbers, mli_size_mul(2 * block, (size_t)count));
}

#define REAL float
#define SFX f32
#define REAL_EPSILON FLT_EPSILON
#define REAL_MIN FLT_MIN
#define SYMV f32_symv
#include "householder.inc.h"
#undef REAL
#undef SFX
#undef REAL_EPSILON
#undef REAL_MIN
#undef SYMV

#define REAL double
#define SFX f64
#define REAL_EPSILON DBL_EPSILON
#define REAL_MIN DBL_MIN
#define SYMV f64_symv
#include "householder.inc.h"
