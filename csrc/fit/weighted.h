/* What the two halves of molae_factor_weighted share: weighted.c finds the shared factors,
 * weighted_private.c the experts' own. */
#ifndef MOLAE_FIT_WEIGHTED_H
#define MOLAE_FIT_WEIGHTED_H

#include "../molae.h"

/* A group, from its shared factor to its experts' private ones. In gauge form B is written in the
 * order of perm: B[:, perm] = [I | N] with lead = R, in plain form perm is NULL and lead 0. */
typedef struct {
    double *C;           /* (W,W): pooled moments */
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
    double *L, *T, *Z;     /* (D,D) */
    double *w;             /* (D,) */
    double *H;             /* (W,W): moments of one expert, shrunk */
    double *S;             /* (F,F): the metric on the side of F */
    double *X, *E, *Y, *V; /* (F,D) */
    double *A;             /* (F,R) */
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
    int64_t *group_of;
    double *trace;      /* (E,) of the moments */
    double *energy;     /* (E,) in the metric */
    molae_status *load; /* (E,) */
    mli_weighted_group *groups;
    mli_weighted_scratch *workers;
} mli_weighted;

/* H = moments of expert e, shrunk towards the pooled ones. */
void mli_weighted_moments(const mli_weighted *q, int64_t e, double *H);

/* Y = S X, X (F,n), with the metric of the expert's rows on the other side: H_e on the output
 * side, S_e on the input side, where it may be left out. *weighed is Y, or X where there is none.
 * S: (F,F), for the metric. */
molae_status mli_weighted_rows(const mli_weighted *q, int64_t e, const double *X, int64_t n,
                               double *S, double *Y, const double **weighed);

/* An expert's private factor, its energy and its residual, all of which go to q->out. */
molae_status mli_weighted_private(const mli_weighted *q, int64_t e, const mli_weighted_scratch *t);

#endif
