#include "basis.h"

#include <float.h>
#include <string.h>

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/real.h"

#define REAL float
#define SFX f32
#define REAL_EPSILON FLT_EPSILON
#include "basis.inc.h"
#undef REAL
#undef SFX
#undef REAL_EPSILON

#define REAL double
#define SFX f64
#define REAL_EPSILON DBL_EPSILON
#include "basis.inc.h"
