/* A minimal runner: each file has one function that makes checks; main.c calls them all. */
#ifndef MOLAE_TEST_H
#define MOLAE_TEST_H

#include <stdint.h>
#include <stdio.h>

extern long test_checks, test_failures;

#define CHECK(cond)                                                            \
    do {                                                                       \
        test_checks++;                                                         \
        if (!(cond)) {                                                         \
            test_failures++;                                                   \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #cond); \
        }                                                                      \
    } while (0)

/* Uniform in -1..1, the same sequence for the same seed everywhere. */
static inline double
test_random(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)(*seed >> 11) * 0x1p-52 - 1.0;
}

void test_mem(void);
void test_par(void);
void test_blas(void);
void test_eigen(void);
void test_fit(void);
void test_gram(void);
void test_solve(void);
void test_adamw(void);
void test_vectors(void);
void test_weighted(void);
void test_kern(void);
void test_ops(void);
void test_products(void);
void test_decode(void);

#endif
