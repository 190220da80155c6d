/* Memory: 64-byte aligned, counted, and cut from one block. The only caller of malloc is mem.c. */
#ifndef MOLAE_BASE_MEM_H
#define MOLAE_BASE_MEM_H

#include <stddef.h>
#include <stdint.h>

/* 64-byte aligned block of at least `bytes` (never NULL for 0 bytes), or NULL. */
void *mli_alloc(size_t bytes);

/* Frees what mli_alloc returned; NULL is a no-op. */
void mli_free(void *p);

/* As mli_alloc and mli_free, for what a call needs once and for large results. Blocks given back
 * are kept for the next call, up to mli_kept_limit() bytes in all: fresh pages cost as much as a
 * tenth of the products that fill them. Kept blocks do not count as live; mli_kept_release frees
 * them. */
void *mli_lend(size_t bytes);
void mli_return(void *p);
size_t mli_kept_limit(void); /* an eighth of the machine's memory, at most 4 GiB */
void mli_kept_release(void);

/* Blocks handed out by mli_alloc or mli_lend and not yet taken back. */
int64_t mli_mem_live(void);

/* Test hook: the n-th mli_alloc from now fails (1 = the next one); 0 switches it off. */
void mli_mem_fail_after(int64_t n);

/* Size arithmetic for workspaces. SIZE_MAX means overflow and is sticky. */
size_t mli_size_mul(size_t a, size_t b);
size_t mli_size_add(size_t a, size_t b);

/* Bytes that mli_carve takes for n items of `size` bytes (rounded up to 64), sticky on overflow. */
size_t mli_carve_size(size_t n, size_t size);

/* Cuts n items of `size` bytes off the block at *p and moves *p on. *p must be 64-byte aligned. */
void *mli_carve(char **p, size_t n, size_t size);

/* One piece of a block, in functions that size it (p == NULL) and cut it (p != NULL) with the same
 * lines, so that the two cannot disagree. */
#define MLI_CUT(total, p, field, count, size)                               \
    do {                                                                    \
        const size_t cut_items = (count);                                   \
        (total) = mli_size_add((total), mli_carve_size(cut_items, (size))); \
        if ((p) != NULL)                                                    \
            (field) = mli_carve((p), cut_items, (size));                    \
    } while (0)

#endif
