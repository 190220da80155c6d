/* What the parts of molae_factor_weighted share: weighted_gram.c knows moments and metrics,
 * weighted.c finds the shared factors, weighted_private.c the experts' own. */
#ifndef MOLAE_FIT_WEIGHTED_H
#define MOLAE_FIT_WEIGHTED_H

#include "../molae.h"

/* A group, from its shared factor to its experts' private ones. In gauge form B is written in the
 * order of perm: B[:, perm] = [I | N] with lead = R, in plain form perm is NULL and lead 0. */
typedef struct {
    double *C;           /* (W,W): pooled moments; those of the run's first group */
    double *N;           /* (R,D-lead): what B has behind the identity, as stored */
    double *U;           /* (R,R), output side: U^T U = B B^T */
    const int32_t *perm; /* (D,) */
    int64_t lead;
    double trace;
    molae_status status;
    const char *what;
    int64_t expert, info;
} mli_weighted_group;

/* What a worker has to itself. */
typedef struct {
    double *L, *T, *Z, *Q; /* (D,D) */
    double *w;             /* (D,) */
    double *H;             /* (W,W): moments of one expert, shrunk */
    double *S;             /* (F,F): the metric on the side of F */
    double *X, *E, *Y, *V; /* (F,D) */
    double *A;             /* (F,R) */
    float *S32;            /* (F,F) */
    double *tmp;
    char *work; /* of LAPACK */
    size_t work_bytes;
} mli_weighted_scratch;

typedef struct {
    const molae_stack *s;
    const molae_factors *out;
    const molae_metric *metric;
    const int64_t *rank;
    molae_form form;
    int64_t W, max_R; /* width of the moments */
    int narrow;       /* products whose errors are of no weight are in f32 */
    int64_t *group_of;
    int64_t runs;       /* of groups of the same experts, which share what their ranks leave open */
    int64_t *first;     /* (runs + 1): groups */
    double *trace;      /* (E,) of the moments */
    double *energy;     /* (E,) in the metric */
    molae_status *load; /* (E,) */
    mli_weighted_group *groups;
    mli_weighted_scratch *workers;
} mli_weighted;

/* C of group g = sum of its moments; the identity where no row reached any of them. H, S: scratch
 * for an expert's moments and its metric of the rows. Where one is not finite, o says which. */
molae_status mli_weighted_pool(const mli_weighted *q, mli_weighted_group *o, int64_t g, double *H,
                               double *S);

/* T = upper triangle of the sum of X_e^T S_e X_e; input side: times omega_e. Energies. */
molae_status mli_weighted_gram(const mli_weighted *q, mli_weighted_group *o, int64_t g,
                               mli_weighted_scratch *t);

/* Output side: Z (k F,D) stacks L_e X_e with L_e^T L_e = H'_e. Energies. LAPACK where an H'_e is
 * not positive definite. */
molae_status mli_weighted_stack(const mli_weighted *q, mli_weighted_group *o, int64_t g,
                                mli_weighted_scratch *t);

/* H = moments of expert e, shrunk towards the pooled ones. */
void mli_weighted_moments(const mli_weighted *q, int64_t e, double *H);

/* Y = S X, X (F,n), with the metric of the expert's rows on the other side: H_e on the output
 * side, S_e on the input side, where it may be left out. *weighed is Y, or X where there is none.
 * S: (F,F), for the metric. */
molae_status mli_weighted_rows(const mli_weighted *q, int64_t e, const double *X, int64_t n,
                               double *S, double *Y, const double **weighed);

/* y = x over a power of two, which is returned, so that the largest |x| comes out at 1 to 2 and
 * products of few factors neither overflow nor vanish in f32. */
double mli_weighted_narrow(float *y, const double *x, int64_t n);

/* The same in f32: S X = s G, G at Y, or at X with s = 1 where there is no S. */
molae_status mli_weighted_rows_narrow(const mli_weighted *q, int64_t e, const float *X, int64_t n,
                                      const mli_weighted_scratch *t, float *Y, const float **G,
                                      double *s);

/* An expert's private factor, its energy and its residual, all of which go to q->out. */
molae_status mli_weighted_private(const mli_weighted *q, int64_t e, const mli_weighted_scratch *t);

#endif
