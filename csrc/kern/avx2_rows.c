/* The f32 products of some tens or hundreds of rows, for AVX2 and FMA. */
#include "stream.h"

#include "../base/mem.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#define TALL 4
#include "avx2.inc.h"
#include "rows.inc.h"

int
mli_kernels_add_avx2_rows(mli_kernels *t)
{
    add_rows(t);
    return 1;
}

#else

int
mli_kernels_add_avx2_rows(mli_kernels *t)
{
    (void)t;
    return 0;
}

#endif
