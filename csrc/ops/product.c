#include "product.h"

#include <string.h>

#include "../base/blas.h"
#include "../base/real.h"
#include "../kern/kern.h"

/* tile (nr,nc) = W[r0 ..][c0 ..] widened. */
static void
widen_tile_f32(float *tile, const void *W, int64_t ldw, molae_dtype t, int64_t r0, int64_t nr,
               int64_t c0, int64_t nc)
{
    const mli_kernels *kern = mli_kernels_get();
    const uint16_t *w = mli_weight_at(W, t, ldw, r0, c0);

    if (nc == ldw) {
        (void)kern->bf16_to_f32(tile, w, nr * nc);
        return;
    }
    for (int64_t r = 0; r < nr; r++)
        (void)kern->bf16_to_f32(tile + r * nc, w + r * ldw, nc);
}

#define REAL float
#define SFX f32
#define OWN MOLAE_F32
#define NARROW_STORAGE 1
#include "product.inc.h"
#undef REAL
#undef SFX
#undef OWN
#undef NARROW_STORAGE

#define REAL double
#define SFX f64
#define OWN MOLAE_F64
#define NARROW_STORAGE 0
#include "product.inc.h"
