#define _DEFAULT_SOURCE /* madvise, sysconf */

#include "mem.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

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

/* Blocks kept, the one returned last at the end. Nobody waits for the flag, which another thread
 * may have held when this process was forked: without it a block is not kept, or not found. */
enum { KEPT = 128 };
#define KEPT_MOST ((size_t)4 << 30)
static atomic_flag keeping = ATOMIC_FLAG_INIT;
static lent *kept[KEPT];
static int kept_blocks;
static size_t kept_bytes;

/* Takes kept block i out; the flag is held. */
static lent *
take_out(int i)
{
    lent *block = kept[i];

    kept_blocks--;
    kept_bytes -= block->bytes;
    memmove(kept + i, kept + i + 1, (size_t)(kept_blocks - i) * sizeof *kept);
    return block;
}

/* The smallest kept block that serves, or NULL; one of more than twice the size would be wasted. */
static lent *
take_fitting(size_t bytes)
{
    lent *block = NULL;
    int best = -1;

    if (atomic_flag_test_and_set(&keeping))
        return NULL;
    for (int i = 0; i < kept_blocks; i++)
        if (kept[i]->bytes >= bytes && kept[i]->bytes / 2 <= bytes &&
            (best < 0 || kept[i]->bytes < kept[best]->bytes))
            best = i;
    if (best >= 0)
        block = take_out(best);
    atomic_flag_clear(&keeping);
    return block;
}

/* Keeps the block, or none (NULL), and frees the oldest ones beyond `most` bytes. */
static void
keep(lent *block, size_t most)
{
    lent *old[KEPT];
    int n = 0;

    if (atomic_flag_test_and_set(&keeping)) {
        free(block);
        return;
    }
    while (kept_blocks > 0 &&
           (kept_bytes > most - (block ? block->bytes : 0) || kept_blocks == KEPT))
        old[n++] = take_out(0);
    if (block != NULL) {
        kept_bytes += block->bytes;
        kept[kept_blocks++] = block;
    }
    atomic_flag_clear(&keeping);
    while (n > 0)
        free(old[--n]);
}

void *
mli_lend(size_t bytes)
{
    lent *block = take_fitting(bytes);

    if (block != NULL) {
        atomic_fetch_add(&live, 1);
        if (must_fail()) {
            mli_free(block);
            return NULL;
        }
    } else {
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
    lent *block;

    if (p == NULL)
        return;
    block = (lent *)(void *)((char *)p - ALIGN);
    if (block->bytes > mli_kept_limit()) {
        mli_free(block);
        return;
    }
    atomic_fetch_sub(&live, 1);
    keep(block, mli_kept_limit());
}

size_t
mli_kept_limit(void)
{
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    const size_t bytes = pages > 0 && page > 0 ? mli_size_mul((size_t)pages, (size_t)page) / 8 : 0;

    return bytes < KEPT_MOST ? bytes : KEPT_MOST;
}

void
mli_kept_release(void)
{
    keep(NULL, 0);
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
