#include <math.h>
#include <string.h>

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/par.h"
#include "../base/real.h"
#include "basis.h"
#include "eigen.h"
#include "rows.h"

#define REAL float
#define SFX f32
#include "reduce.inc.h"
#undef REAL
#undef SFX

#define REAL double
#define SFX f64
#include "reduce.inc.h"
