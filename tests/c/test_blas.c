#include "test.h"

#include "../../csrc/base/blas.h"
#include "../../csrc/base/mem.h"

#include <math.h>
#include <string.h>

#define REAL float
#define SFX f32
#define EPS 0x1p-23
#include "test_blas.inc.h"
#undef REAL
#undef SFX
#undef EPS

#define REAL double
#define SFX f64
#define EPS 0x1p-52
#include "test_blas.inc.h"
#undef REAL
#undef SFX
#undef EPS

static void
library(void)
{
    CHECK(strstr(mli_blas_config(), "OpenBLAS") != NULL);
    CHECK(mli_blas_core()[0] != '\0');
    CHECK(mli_blas_path()[0] != '\0');
    CHECK((mli_blas_prefix()[0] != '\0') == mli_blas_vendored());
}

static void
thread_counts(void)
{
    mli_blas_set_num_threads(2);
    mli_blas_enter();
    CHECK(mli_blas_get_num_threads() == 1);
    mli_blas_enter(); /* overlapping calls: the last restores */
    mli_blas_leave();
    CHECK(mli_blas_get_num_threads() == 1);
    mli_blas_leave();
    CHECK(mli_blas_get_num_threads() == 2);
    mli_blas_set_num_threads(1);
}

void
test_blas(void)
{
    library();
    thread_counts();
    routines_f32();
    routines_f64();
}
