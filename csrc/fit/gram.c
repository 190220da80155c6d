#include <math.h>

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/par.h"
#include "../base/real.h"
#include "rows.h"

/* Units of work: fixed by shape, never by the thread count. */
enum {
    PANEL = 512, /* rows of one C_e computed by one task */
    BLOCK = 256, /* rows of x gathered at a time */
    TILE = 16,   /* of what is copied below the diagonal */
};

#define REAL float
#define SFX f32
#include "gram.inc.h"
#undef REAL
#undef SFX

#define REAL double
#define SFX f64
#include "gram.inc.h"
