#include <math.h>
#include <string.h>

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/par.h"
#include "../base/real.h"
#include "basis.h"
#include "eigen.h"
#include "gauge.h"
#include "rows.h"
#include "stack.h"

/* Units of work: fixed by shape, never by the thread count. */
enum {
    LOAD_ROWS = 128, /* rows read by one task */
    LOADS = MLI_CHUNK / LOAD_ROWS,
    PANEL = 512,        /* rows of a Gram matrix computed by one task */
    PRIVATE_ROWS = 512, /* rows of A_i computed by one task */
};

static int64_t
ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

#define REAL float
#define SFX f32
#include "factor.inc.h"
#undef REAL
#undef SFX

#define REAL double
#define SFX f64
#include "factor.inc.h"
