#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/fit/eigen.h"

#include <math.h>
#include <string.h>

enum { KINDS = 9 }; /* of matrices */

#define REAL float
#define SFX f32
#define EPS 0x1p-23
#define TINY 0x1p-110
#include "test_eigen.inc.h"
#undef REAL
#undef SFX
#undef EPS
#undef TINY

#define REAL double
#define SFX f64
#define EPS 0x1p-52
#define TINY 0x1p-1000
#include "test_eigen.inc.h"
#undef REAL
#undef SFX
#undef EPS
#undef TINY

void
test_eigen(void)
{
    eigenproblems_f32();
    eigenproblems_f64();
}
