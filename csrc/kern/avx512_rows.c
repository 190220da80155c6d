/* The f32 products of some tens or hundreds of rows, for AVX-512. */
#include "stream.h"

#include "../base/mem.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

#define TALL 8
#include "avx512.inc.h"
#include "rows.inc.h"

int
mli_kernels_add_avx512_rows(mli_kernels *t)
{
    add_rows(t);
    return 1;
}

#else

int
mli_kernels_add_avx512_rows(mli_kernels *t)
{
    (void)t;
    return 0;
}

#endif
