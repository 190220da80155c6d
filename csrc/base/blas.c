/* The only file that names BLAS and LAPACK. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* dladdr */
#endif
#include "blas.h"

#include "mem.h"
#include "real.h"

#include <dlfcn.h>
#include <stdatomic.h>

/* Symbols carry a prefix in the vendored library ("scipy_"), none in a system's. */
#ifndef MLI_BLAS_PREFIX
#define MLI_BLAS_PREFIX
#endif
#ifndef MLI_BLAS_VENDORED
#define MLI_BLAS_VENDORED 0
#endif

#define JOIN2_(a, b) a##b
#define JOIN2(a, b) JOIN2_(a, b)
#define JOIN3_(a, b, c) a##b##c
#define JOIN3(a, b, c) JOIN3_(a, b, c)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define SYM(name) JOIN2(MLI_BLAS_PREFIX, name)

typedef int32_t blasint; /* LP64 */

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112, UPPER = 121, LOWER = 122 };
enum { NON_UNIT = 131, LEFT = 141, RIGHT = 142 };

static int
fits(int64_t n)
{
    return n >= 0 && n <= INT32_MAX;
}

/* LAPACK wants leading dimensions of at least 1 even where nothing is read. */
static blasint
at_least_1(int64_t ld)
{
    return ld > 1 ? (blasint)ld : 1;
}

static molae_status
out_of_range(int64_t m, int64_t n, int64_t k)
{
    return m < 0 || n < 0 || k < 0 ? MOLAE_E_ARG : MOLAE_E_TOO_LARGE;
}

#define REAL float
#define SFX f32
#define P s
#include "blas.inc.h"
#undef REAL
#undef SFX
#undef P

#define REAL double
#define SFX f64
#define P d
#include "blas.inc.h"
#undef REAL
#undef SFX
#undef P

/* ------------------------------------------------------------- the library */

char *SYM(openblas_get_config)(void);
char *SYM(openblas_get_corename)(void);
int SYM(openblas_get_num_threads)(void);
void SYM(openblas_set_num_threads)(int n);

const char *
mli_blas_config(void)
{
    return SYM(openblas_get_config)();
}

const char *
mli_blas_core(void)
{
    return SYM(openblas_get_corename)();
}

const char *
mli_blas_prefix(void)
{
    return TEXT(MLI_BLAS_PREFIX);
}

int
mli_blas_vendored(void)
{
    return MLI_BLAS_VENDORED;
}

const char *
mli_blas_path(void)
{
    /* A data address is what dladdr takes; POSIX has the two convertible. */
    char *(*fn)(void) = SYM(openblas_get_config);
    Dl_info where;

    if (dladdr(*(void **)&fn, &where) == 0 || where.dli_fname == NULL)
        return "";
    return where.dli_fname;
}

int
mli_blas_get_num_threads(void)
{
    return SYM(openblas_get_num_threads)();
}

void
mli_blas_set_num_threads(int n)
{
    SYM(openblas_set_num_threads)(n);
}

/* Calls under way, and the count to restore when the last one leaves. */
static atomic_flag turn = ATOMIC_FLAG_INIT;
static int users;
static int before;

static void
lock(void)
{
    while (atomic_flag_test_and_set(&turn)) {
        /* held for a few instructions */
    }
}

void
mli_blas_enter(void)
{
    lock();
    if (users++ == 0) {
        before = mli_blas_get_num_threads();
        if (before != 1)
            mli_blas_set_num_threads(1);
    }
    atomic_flag_clear(&turn);
}

void
mli_blas_leave(void)
{
    lock();
    if (--users == 0 && before != 1)
        mli_blas_set_num_threads(before);
    atomic_flag_clear(&turn);
}
