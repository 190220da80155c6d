/* Small inner loops behind one table. The table starts as the portable kernels of ref.c and
 * better ones for the CPU overwrite its entries, so nothing can be missing. */
#ifndef MOLAE_KERN_H
#define MOLAE_KERN_H

#include "../molae.h"

/* An activation with its parameters. */
typedef struct {
    molae_activation kind;
    double alpha, limit;
} mli_act;

typedef struct {
    const char *isa; /* "ref", "avx2", "avx512" */
    /* y[i] = x[i] widened; returns 1 if all n values are finite, else 0 (y is written anyway). */
    int (*bf16_to_f32)(float *y, const uint16_t *x, int64_t n);
    int (*f16_to_f32)(float *y, const uint16_t *x, int64_t n);
    int (*f32_check)(float *y, const float *x, int64_t n); /* a checked copy */
    /* y[i] = x[i] rounded to nearest, ties to even. NaN stays NaN. */
    void (*f32_to_bf16)(uint16_t *y, const float *x, int64_t n);
    void (*f32_to_f16)(uint16_t *y, const float *x, int64_t n);
    /* sum of x[i]^2 in double, in an order that depends on n alone and is the same for every
     * table (16 partial sums, lane i takes x[i], x[i+16], ...; folded in halves). */
    double (*f32_sumsq)(const float *x, int64_t n);
    /* y (m,) = A x for the row-major upper triangle of A (m,m) with rows lda apart, in bands of
     * rows, from the last to the first if backwards is set. y is overwritten and may not overlap
     * A or x. The order of sums depends on m, backwards, the table and how A lies to a cache
     * line. 2 m^2 flops; A is read once. */
    void (*f32_symv)(float *y, const float *A, int64_t lda, const float *x, int64_t m,
                     int backwards);
    void (*f64_symv)(double *y, const double *A, int64_t lda, const double *x, int64_t m,
                     int backwards);
    /* h[i] = act(gate[i], up[i]), see molae_activation. h may be gate or up. */
    void (*act_f32)(float *h, const float *gate, const float *up, int64_t n, const mli_act *act);
    void (*act_f64)(double *h, const double *gate, const double *up, int64_t n, const mli_act *act);
    /* From dh[i], the cotangent of h[i] before the routing weight w: dgate[i] and dup[i] with w,
     * and hw[i] = w h[i] (unless hw is NULL). Returns sum dh[i] h[i], in the order of f32_sumsq.
     * No two arrays overlap. */
    float (*act_grad_f32)(float *dgate, float *dup, float *hw, const float *dh, const float *gate,
                          const float *up, float w, int64_t n, const mli_act *act);
    double (*act_grad_f64)(double *dgate, double *dup, double *hw, const double *dh,
                           const double *gate, const double *up, double w, int64_t n,
                           const mli_act *act);
} mli_kernels;

/* Best table for this CPU less the ISAs named by mli_kernels_disable; chosen once. */
const mli_kernels *mli_kernels_get(void);

/* For tests: the table named, or NULL if the build or the CPU lacks it. */
const mli_kernels *mli_kernels_named(const char *isa);

/* Comma-separated ISA names not to use ("avx512"), before the first mli_kernels_get. Called by
 * the glue with the text of MOLAE_DISABLE_ISA: kernels read no environment. */
void mli_kernels_disable(const char *isas);

#endif
