#include "eigen.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "../base/blas.h"
#include "../base/mem.h"
#include "../base/real.h"
#include "householder.h"

#define REAL float
#define SFX f32
#define REAL_EPSILON FLT_EPSILON
#define REAL_MIN FLT_MIN
#include "eigen.inc.h"
#undef REAL
#undef SFX
#undef REAL_EPSILON
#undef REAL_MIN

#define REAL double
#define SFX f64
#define REAL_EPSILON DBL_EPSILON
#define REAL_MIN DBL_MIN
#include "eigen.inc.h"
