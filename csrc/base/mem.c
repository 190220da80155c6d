#define _DEFAULT_SOURCE /* madvise */

#include "mem.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ALIGN ((size_t)64)

/* Matrices of megabytes are walked by column and row: huge pages spare the address cache. */
#define HUGE_PAGE ((size_t)2 << 20)
#define HUGE_BLOCK (2 * HUGE_PAGE)

/* Under AddressSanitizer each carved piece is followed by a poisoned gap, so that a kernel that
 * runs over the end of its scratch is caught at once. */
#if defined(__SANITIZE_ADDRESS__)
#define MLI_GUARD ALIGN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MLI_GUARD ALIGN
#endif
#endif
#ifdef MLI_GUARD
#include <sanitizer/asan_interface.h>
#else
#define MLI_GUARD ((size_t)0)
#endif

static atomic_int_fast64_t live;
static atomic_int_fast64_t fail_after;

/* 1 if the test hook says that this allocation fails. */
static int
must_fail(void)
{
    int_fast64_t left = atomic_load(&fail_after);
    while (left > 0) {
        if (atomic_compare_exchange_weak(&fail_after, &left, left - 1))
            return left == 1;
    }
    return 0;
}

void *
mli_alloc(size_t bytes)
{
    size_t rounded = mli_carve_size(bytes, 1);
    void *p;

    if (rounded > (size_t)PTRDIFF_MAX || must_fail()) /* no object is larger */
        return NULL;
    if (rounded == 0)
        rounded = ALIGN;
    if (rounded >= HUGE_BLOCK) {
        p = aligned_alloc(HUGE_PAGE, rounded + (HUGE_PAGE - rounded % HUGE_PAGE) % HUGE_PAGE);
#ifdef MADV_HUGEPAGE
        if (p != NULL) /* advice: a kernel that knows no huge pages says so, and nothing is lost */
            (void)madvise(p, rounded, MADV_HUGEPAGE);
#endif
    } else {
        p = aligned_alloc(ALIGN, rounded);
    }
    if (p == NULL)
        return NULL;
#ifdef MLI_DEBUG
    memset(p, 0xFF, rounded); /* all ones is a NaN in every float type */
#endif
    atomic_fetch_add(&live, 1);
    return p;
}

void
mli_free(void *p)
{
    if (p == NULL)
        return;
    atomic_fetch_sub(&live, 1);
    free(p);
}

/* A lent block begins 64 bytes after this. */
typedef struct {
    size_t bytes;
} lent;

static _Atomic(lent *) kept;

void *
mli_lend(size_t bytes)
{
    lent *block = atomic_exchange(&kept, NULL);

    if (block != NULL) {
        atomic_fetch_add(&live, 1);
        if (block->bytes < bytes) {
            mli_free(block);
            block = NULL;
        } else if (must_fail()) {
            mli_free(block);
            return NULL;
        }
    }
    if (block == NULL) {
        block = mli_alloc(mli_size_add(bytes, ALIGN));
        if (block == NULL)
            return NULL;
        block->bytes = bytes;
    }
#if defined(ASAN_UNPOISON_MEMORY_REGION)
    ASAN_UNPOISON_MEMORY_REGION((char *)block + ALIGN, block->bytes);
#endif
#ifdef MLI_DEBUG
    memset((char *)block + ALIGN, 0xFF, block->bytes);
#endif
    return (char *)block + ALIGN;
}

void
mli_return(void *p)
{
    lent *block, *none = NULL;

    if (p == NULL)
        return;
    block = (lent *)(void *)((char *)p - ALIGN);
    if (block->bytes <= MLI_SCRATCH_KEPT && atomic_compare_exchange_strong(&kept, &none, block))
        atomic_fetch_sub(&live, 1);
    else
        mli_free(block);
}

void
mli_scratch_release(void)
{
    lent *block = atomic_exchange(&kept, NULL);

    if (block != NULL) {
        atomic_fetch_add(&live, 1);
        mli_free(block);
    }
}

int64_t
mli_mem_live(void)
{
    return (int64_t)atomic_load(&live);
}

void
mli_mem_fail_after(int64_t n)
{
    atomic_store(&fail_after, n > 0 ? n : 0);
}

size_t
mli_size_mul(size_t a, size_t b)
{
    size_t c;
    if (a == SIZE_MAX || b == SIZE_MAX || __builtin_mul_overflow(a, b, &c))
        return SIZE_MAX;
    return c;
}

size_t
mli_size_add(size_t a, size_t b)
{
    size_t c;
    if (a == SIZE_MAX || b == SIZE_MAX || __builtin_add_overflow(a, b, &c))
        return SIZE_MAX;
    return c;
}

size_t
mli_carve_size(size_t n, size_t size)
{
    size_t bytes = mli_size_add(mli_size_mul(n, size), ALIGN - 1);
    if (bytes == SIZE_MAX)
        return SIZE_MAX;
    return mli_size_add(bytes & ~(ALIGN - 1), MLI_GUARD);
}

void *
mli_carve(char **p, size_t n, size_t size)
{
    char *piece = *p;
    size_t step = mli_carve_size(n, size);

#if defined(ASAN_POISON_MEMORY_REGION)
    ASAN_UNPOISON_MEMORY_REGION(piece, n * size);
    ASAN_POISON_MEMORY_REGION(piece + n * size, step - n * size);
#endif
    *p = piece + step;
    return piece;
}
