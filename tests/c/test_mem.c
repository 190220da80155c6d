#include "test.h"

#include "../../csrc/base/mem.h"

#include <string.h>

static void
sizes(void)
{
    CHECK(mli_size_mul(3, 5) == 15);
    CHECK(mli_size_mul(SIZE_MAX / 2, 3) == SIZE_MAX);
    CHECK(mli_size_mul(SIZE_MAX, 0) == SIZE_MAX); /* overflow is sticky */
    CHECK(mli_size_add(3, 5) == 8);
    CHECK(mli_size_add(SIZE_MAX - 1, 2) == SIZE_MAX);
    CHECK(mli_size_add(SIZE_MAX, 0) == SIZE_MAX);
    CHECK(mli_carve_size(1, 1) % 64 == 0);
    CHECK(mli_carve_size(1, 1) == mli_carve_size(64, 1));
    CHECK(mli_carve_size(65, 1) > mli_carve_size(64, 1));
    CHECK(mli_carve_size(SIZE_MAX, 1) == SIZE_MAX);
    CHECK(mli_carve_size(SIZE_MAX - 70, 1) == SIZE_MAX ||
          mli_carve_size(SIZE_MAX - 70, 1) % 64 == 0);
    CHECK(mli_carve_size(SIZE_MAX / 4, 8) == SIZE_MAX);
}

static void
blocks(void)
{
    int64_t before = mli_mem_live();
    void *p = mli_alloc(0), *q = mli_alloc(100);

    CHECK(p != NULL && q != NULL && p != q);
    CHECK((uintptr_t)p % 64 == 0 && (uintptr_t)q % 64 == 0);
    CHECK(mli_mem_live() == before + 2);
    memset(q, 1, 100);
    mli_free(p);
    mli_free(q);
    mli_free(NULL);
    CHECK(mli_mem_live() == before);
    CHECK(mli_alloc(SIZE_MAX) == NULL);
    CHECK(mli_alloc(SIZE_MAX - 128) == NULL);
    CHECK(mli_mem_live() == before);
}

static void
failing(void)
{
    void *p, *q;

    mli_mem_fail_after(2);
    p = mli_alloc(8);
    q = mli_alloc(8);
    CHECK(p != NULL);
    CHECK(q == NULL);
    mli_free(q);
    q = mli_alloc(8); /* only the one fails */
    CHECK(q != NULL);
    mli_free(p);
    mli_free(q);
    mli_mem_fail_after(1);
    mli_mem_fail_after(0);
    p = mli_alloc(8);
    CHECK(p != NULL);
    mli_free(p);
}

static void
carving(void)
{
    size_t total =
        mli_size_add(mli_carve_size(3, sizeof(float)), mli_carve_size(5, sizeof(double)));
    char *block = mli_alloc(total), *p = block;
    float *a = mli_carve(&p, 3, sizeof(float));
    double *b = mli_carve(&p, 5, sizeof(double));

    CHECK((char *)a == block);
    CHECK((uintptr_t)b % 64 == 0);
    CHECK((size_t)(p - block) == total);
    for (int i = 0; i < 3; i++)
        a[i] = 1.0f;
    for (int i = 0; i < 5; i++)
        b[i] = 2.0;
    CHECK(a[2] == 1.0f && b[0] == 2.0);
    p = block; /* the same block again, cut otherwise */
    b = mli_carve(&p, 9, sizeof(double));
    b[8] = 3.0;
    CHECK(b[8] == 3.0);
    mli_free(block);
}

static void
lending(void)
{
    const int64_t before = mli_mem_live();
    char *p = mli_lend(1000), *q = mli_lend(10);

    CHECK((uintptr_t)p % 64 == 0 && (uintptr_t)q % 64 == 0 && p != q);
    CHECK(mli_mem_live() == before + 2);
    memset(p, 1, 1000);
    memset(q, 1, 10);
    mli_return(p); /* both are kept */
    mli_return(q);
    mli_return(NULL);
    CHECK(mli_mem_live() == before);
    q = mli_lend(900);
    CHECK(q == p && mli_mem_live() == before + 1);
    memset(q, 1, 1000);
    mli_return(q);
    q = mli_lend(1001); /* too small */
    CHECK(q != NULL && q != p);
    memset(q, 1, 1001);
    mli_return(q);
    CHECK((q = mli_lend(950)) == p); /* the smaller of two that serve */
    mli_return(q);
    q = mli_lend(499); /* both would be wasted */
    CHECK(q != NULL && q != p);
    mli_return(q);
    mli_mem_fail_after(1);
    CHECK(mli_lend(1000) == NULL && mli_mem_live() == before); /* reuse fails as well */
    mli_mem_fail_after(1);
    CHECK(mli_lend(5000) == NULL && mli_mem_live() == before);
    CHECK(mli_lend(SIZE_MAX) == NULL && mli_lend(SIZE_MAX - 70) == NULL);
    q = mli_lend(mli_kept_limit() + 1);
    CHECK(q != NULL);
    mli_return(q);                  /* too large to keep */
    for (size_t i = 0; i < 20; i++) /* more bytes than are kept */
        mli_return(mli_lend(mli_kept_limit() / 4 + (i << 28)));
    for (size_t i = 0; i < 300; i++) /* more blocks: none serves the next */
        mli_return(mli_lend((size_t)1 << (i % 2 ? 12 : 20)));
    mli_kept_release();
    mli_kept_release();
    CHECK(mli_mem_live() == before);
}

void
test_mem(void)
{
    sizes();
    blocks();
    failing();
    carving();
    lending();
}
