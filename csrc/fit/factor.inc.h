/* Body of factor.c for one precision. */

/* One group on its way from experts to factors. */
typedef struct {
    int64_t e0, k; /* its experts: e0 .. e0+k-1 */
    int64_t m;     /* rows of its stack, k F */
    int64_t p;     /* order of its Gram matrix, min(m, D) */
    int64_t R;
    int whole;      /* the stack is kept whole and the Gram matrix is X X^T, as m < D */
    REAL *X;        /* the chunk being read (MLI_CHUNK, D), or the whole stack (m, D) */
    REAL *gram;     /* (p,p) upper triangle, then eigenvectors as rows */
    REAL *w;        /* (p,): eigenvalues, ascending */
    REAL *B;        /* (R,D) */
    int narrow;     /* gauge form with D-R < R: the solver works on M's short side */
    int complement; /* narrow and not whole: only the discarded eigenvectors are read */
    REAL *P;        /* (R,D): (B B^T)^-1 B, so that A_i = X_i P^T; narrow: (D-R,R), C^-1 M^T */
    REAL *S;        /* (R,R): B B^T; narrow: (D-R,D-R), C = I + M^T M; then its Cholesky factor */
    REAL *M;        /* (R,D-R) */
    REAL *tmp;      /* scratch of a row load */
    char *work;     /* eigensolver, then SVD, then pivoted QR: one after the other */
    double sumsq[LOADS];
    molae_status load[LOADS];
    molae_status status;
    const char *what;
    int64_t info;
} FN(group);

typedef struct {
    const molae_stack *s;
    const molae_factors *out;
    const int64_t *rank;
    molae_form form;
    FN(group) * groups;
    int64_t step;   /* chunk being read: every group is at the same one */
    int64_t chunks; /* chunks an expert */
    int64_t blocks; /* blocks of PRIVATE_ROWS an expert */
    int64_t max_R;
    int64_t *group_of;            /* (E,) */
    double *residual;             /* (E, blocks) */
    molae_status *private_status; /* (E, blocks) */
    REAL *X, *Y, *A, *tmp;        /* scratch of a worker: (workers, ...) */
} FN(job);

/* -------------------------------------------------------------- workspace */

static size_t
FN(group_work_bytes)(int64_t m, int64_t D, int64_t R)
{
    size_t n = FN(mli_eigen_work)(MLI_MIN(m, D), R > 0 ? MLI_MIN(m, D) : 0);

    n = MLI_MAX(n, FN(mli_tsqr_ws)(m, D));
    if (R > 0 && R < D)
        n = MLI_MAX(n, FN(mli_gauge_complement_ws)(R, D));
    return MLI_MAX(n, FN(molae_gauge_ws)(MLI_MAX(R, 1), D));
}

/* The pieces of one group. With p == NULL it only adds up their size, so that size and cut
 * cannot disagree. */
static size_t
FN(group_cut)(FN(group) * q, char **p, const molae_stack *s)
{
    const size_t D = (size_t)s->D, R = (size_t)q->R, gram = (size_t)q->p;
    const size_t rows = (size_t)(q->whole ? q->m : (int64_t)MLI_CHUNK);
    const size_t work = FN(group_work_bytes)(q->m, s->D, q->R);
    size_t n = 0;

    MLI_CUT(n, p, q->X, mli_size_mul(rows, D), sizeof(REAL));
    MLI_CUT(n, p, q->gram, mli_size_mul(gram, gram), sizeof(REAL));
    MLI_CUT(n, p, q->w, gram, sizeof(REAL));
    MLI_CUT(n, p, q->B, mli_size_mul(R, D), sizeof(REAL));
    MLI_CUT(n, p, q->P, mli_size_mul(R, D), sizeof(REAL));
    MLI_CUT(n, p, q->S, mli_size_mul(R, R), sizeof(REAL));
    MLI_CUT(n, p, q->M, mli_size_mul(R, D - R), sizeof(REAL));
    MLI_CUT(n, p, q->tmp, MLI_ROWS_TILE * LOAD_ROWS * LOADS, sizeof(REAL));
    MLI_CUT(n, p, q->work, work, 1);
    return n;
}

static FN(group) FN(group_of_stack)(const molae_stack *s, int64_t g, const int64_t *rank)
{
    FN(group) q = {0};

    q.e0 = s->group_ptr[g];
    q.k = s->group_ptr[g + 1] - q.e0;
    q.m = q.k * s->F;
    q.p = MLI_MIN(q.m, s->D);
    q.R = rank ? rank[g] : 0;
    q.whole = q.m < s->D;
    return q;
}

/* The pieces that belong to no group; as group_cut. */
static size_t
FN(job_cut)(FN(job) * q, char **p, const molae_stack *s, int64_t workers)
{
    const size_t E = (size_t)s->E, D = (size_t)s->D, T = (size_t)workers;
    const size_t cells = mli_size_mul(E, (size_t)q->blocks);
    size_t n = 0;

    MLI_CUT(n, p, q->groups, (size_t)s->G, sizeof(FN(group)));
    MLI_CUT(n, p, q->group_of, E, sizeof(int64_t));
    MLI_CUT(n, p, q->residual, cells, sizeof(double));
    MLI_CUT(n, p, q->private_status, cells, sizeof(molae_status));
    MLI_CUT(n, p, q->X, mli_size_mul(T * PRIVATE_ROWS, D), sizeof(REAL));
    MLI_CUT(n, p, q->Y, mli_size_mul(T * PRIVATE_ROWS, D), sizeof(REAL));
    MLI_CUT(n, p, q->A, mli_size_mul(T * PRIVATE_ROWS, (size_t)q->max_R), sizeof(REAL));
    MLI_CUT(n, p, q->tmp, T * PRIVATE_ROWS * MLI_ROWS_TILE, sizeof(REAL));
    return n;
}

static FN(job) FN(job_of_stack)(const molae_stack *s, const int64_t *rank)
{
    FN(job) job = {0};

    job.s = s;
    job.rank = rank;
    job.chunks = ceil_div(s->F, MLI_CHUNK);
    job.blocks = ceil_div(s->F, PRIVATE_ROWS);
    for (int64_t g = 0; rank != NULL && g < s->G; g++)
        job.max_R = MLI_MAX(job.max_R, rank[g]);
    return job;
}

size_t
FN(molae_factor_ws)(const molae_ctx *ctx, const molae_stack *s, const int64_t *rank)
{
    molae_errinfo err;
    FN(job) job = FN(job_of_stack)(s, rank);
    size_t n;

    if (mli_stack_check(s, rank, &err) < 0)
        return 0; /* the call itself says what is wrong */
    n = FN(job_cut)(&job, NULL, s, ctx->num_threads);
    for (int64_t g = 0; g < s->G; g++) {
        FN(group) q = FN(group_of_stack)(s, g, rank);
        n = mli_size_add(n, FN(group_cut)(&q, NULL, s));
    }
    return n;
}

/* ------------------------------------------------------------ Gram matrix */

/* Rows of X that the current step covers: expert, first row in the expert, count; 0 when the
 * group has no more chunks. */
static int64_t
FN(step_rows)(const FN(job) * job, const FN(group) * q, int64_t *expert, int64_t *r0)
{
    const int64_t i = job->step / job->chunks;

    *expert = q->e0 + i;
    *r0 = (job->step % job->chunks) * MLI_CHUNK;
    return i < q->k ? MLI_MIN((int64_t)MLI_CHUNK, job->s->F - *r0) : 0;
}

static molae_status
FN(load_task)(void *arg, int64_t index, int32_t worker)
{
    FN(job) *job = arg;
    FN(group) *q = &job->groups[index / LOADS];
    const int64_t sub = index % LOADS;
    int64_t e, r0;
    const int64_t rows = FN(step_rows)(job, q, &e, &r0);
    const int64_t nr = MLI_MIN((int64_t)LOAD_ROWS, rows - sub * LOAD_ROWS);
    const int64_t at = q->whole ? (e - q->e0) * job->s->F + r0 : 0;

    (void)worker;
    q->sumsq[sub] = 0;
    q->load[sub] = MOLAE_OK;
    if (nr > 0)
        q->load[sub] = FN(mli_rows_load)(q->X + (at + sub * LOAD_ROWS) * job->s->D, job->s, e,
                                         r0 + sub * LOAD_ROWS, nr,
                                         q->tmp + sub * MLI_ROWS_TILE * LOAD_ROWS, &q->sumsq[sub]);
    return MOLAE_OK;
}

/* Rows i0 .. of the Gram matrix's upper triangle, one panel of one group. */
static molae_status
FN(panel_task)(void *arg, int64_t index, int32_t worker)
{
    FN(job) *job = arg;
    FN(group) *q = &job->groups[index % job->s->G]; /* long panels of all groups first */
    const int64_t D = job->s->D, p = q->p;
    const int64_t i0 = index / job->s->G * PANEL;
    const int64_t ni = MLI_MIN((int64_t)PANEL, p - i0);
    const int64_t right = p - i0 - ni;
    REAL *C = q->gram + i0 * p + i0;
    int64_t e, r0;
    const int64_t rows = FN(step_rows)(job, q, &e, &r0);
    molae_status rc = MOLAE_OK;

    (void)worker;
    if (ni <= 0 || rows == 0)
        goto done;
    if (!q->whole) { /* G += X[:, i]^T X[:, i..] */
        const REAL *X = q->X + i0, *next = X + ni, beta = job->step > 0;
        MLI_TRY(FN(mli_syrk)(1, ni, rows, 1, X, D, beta, C, p));
        MLI_TRY(FN(mli_gemm)(1, 0, ni, right, rows, 1, X, D, next, D, beta, C + ni, p));
    } else if (job->step == q->k * job->chunks - 1) { /* the stack is complete: G = X X^T */
        const REAL *X = q->X + i0 * D, *next = X + ni * D;
        MLI_TRY(FN(mli_syrk)(0, ni, D, 1, X, D, 0, C, p));
        MLI_TRY(FN(mli_gemm)(0, 1, ni, right, D, 1, X, D, next, D, 0, C + ni, p));
    }
done:
    return rc;
}

/* Reads every expert once and leaves each group's Gram matrix and the experts' energies. */
static molae_status
FN(accumulate)(const molae_ctx *ctx, FN(job) * job, molae_errinfo *err)
{
    const molae_stack *s = job->s;
    int64_t steps = 0, panels = 0;

    for (int64_t g = 0; g < s->G; g++) {
        steps = MLI_MAX(steps, job->groups[g].k * job->chunks);
        panels = MLI_MAX(panels, ceil_div(job->groups[g].p, PANEL));
    }
    memset(job->out->energy, 0, (size_t)s->E * sizeof(double));
    for (job->step = 0; job->step < steps; job->step++) {
        molae_status rc = mli_parallel_for(ctx, s->G * LOADS, FN(load_task), job);
        if (rc < 0)
            return rc;
        for (int64_t g = 0; g < s->G; g++) {
            const FN(group) *q = &job->groups[g];
            int64_t e, r0;
            if (FN(step_rows)(job, q, &e, &r0) == 0)
                continue;
            for (int sub = 0; sub < LOADS; sub++) {
                job->out->energy[e] += q->sumsq[sub];
                if (q->load[sub] < 0) {
                    err->expert = e;
                    err->what = "NaN or Inf in the weights";
                    return q->load[sub];
                }
            }
        }
        rc = mli_parallel_for(ctx, s->G * panels, FN(panel_task), job);
        if (rc < 0) {
            err->what = "matrix product failed";
            return rc;
        }
    }
    return MOLAE_OK;
}

/* ------------------------------------------------------------------ basis */

/* Singular values and the top-R right singular vectors of the group's stack, from its rows. */
static molae_status
FN(basis_by_svd)(FN(job) * job, FN(group) * q, double *spectrum)
{
    const molae_stack *s = job->s;
    FN(mli_tsqr) t;
    molae_status rc = MOLAE_OK;

    FN(mli_tsqr_init)(&t, q->m, s->D, q->work);
    for (int64_t e = q->e0; e < q->e0 + q->k; e++)
        for (int64_t r0 = 0; r0 < s->F; r0 += MLI_CHUNK) {
            const int64_t nr = MLI_MIN((int64_t)MLI_CHUNK, s->F - r0);
            MLI_TRY(FN(mli_rows_load)(t.rows + t.used * s->D, s, e, r0, nr, q->tmp, NULL));
            MLI_TRY(FN(mli_tsqr_push)(&t, nr));
        }
    MLI_TRY(FN(mli_tsqr_finish)(&t));
    for (int64_t j = 0; j < q->p; j++)
        spectrum[j] = (double)t.s[j];
    if (q->complement) /* goes where the eigensolver leaves it */
        memcpy(q->gram, t.V + q->R * s->D, (size_t)((s->D - q->R) * s->D) * sizeof(REAL));
    else
        memcpy(q->B, t.V, (size_t)q->R * (size_t)s->D * sizeof(REAL));
    rc = MOLAE_W_PRECISION;
done:
    q->info = t.info;
    return rc;
}

/* spectrum (D,), zero beyond p, and B (R,D) spanning the top-R right singular subspace; or, for a
 * group marked complement, D-R rows of gram that span what is left out. */
static molae_status
FN(basis)(FN(job) * job, FN(group) * q, double *spectrum)
{
    const int64_t D = job->s->D, p = q->p, R = q->R;
    const int full = R == D; /* nothing is discarded: any basis will do, and I is exact */
    const int64_t lo = q->complement ? 0 : p - R; /* eigenvectors that are read */
    const int64_t count = full ? 0 : q->complement ? p - R : R;
    molae_status rc;

    rc = FN(mli_eigen)(p, q->gram, q->w, lo, count, q->work, FN(group_work_bytes)(q->m, D, R),
                       &q->info);
    if (rc < 0)
        return rc;
    for (int64_t j = 0; j < D; j++)
        spectrum[j] = j < p ? sqrt(MLI_MAX((double)q->w[p - 1 - j], 0.0)) : 0.0;
    if (count == 0)
        return MOLAE_OK;
    if (FN(mli_gram_too_coarse)(q->w, p, R))
        return FN(basis_by_svd)(job, q, spectrum);
    if (q->complement)
        return MOLAE_OK;
    if (!q->whole) {
        for (int64_t j = 0; j < R; j++)
            memcpy(q->B + j * D, q->gram + (p - 1 - j) * p, (size_t)D * sizeof(REAL));
        return MOLAE_OK;
    }
    /* v_j = X^T u_j / sigma_j; the scale only keeps B B^T well conditioned */
    for (int64_t j = 0; j < R; j++) {
        REAL *u = q->gram + (p - 1 - j) * p;
        for (int64_t i = 0; i < p; i++)
            u[i] /= (REAL)spectrum[j];
    }
    rc = FN(mli_gemm)(0, 0, R, D, p, 1, q->gram + (p - R) * p, p, q->X, D, 0, q->B, D);
    return rc;
}

/* P = (B B^T)^-1 B, by Cholesky. */
static molae_status
FN(solver)(FN(group) * q, int64_t D)
{
    const int64_t R = q->R;
    molae_status rc = MOLAE_OK;

    MLI_TRY(FN(mli_syrk)(0, R, D, 1, q->B, D, 0, q->S, R));
    MLI_TRY(FN(mli_potrf)(R, q->S, R, &q->info));
    memcpy(q->P, q->B, (size_t)R * (size_t)D * sizeof(REAL));
    MLI_TRY(FN(mli_trsm)(1, R, D, q->S, R, q->P, D));
    MLI_TRY(FN(mli_trsm)(0, R, D, q->S, R, q->P, D));
done:
    return rc;
}

/* The same least squares for B = [I | M] Pi through the short side of M. With X Pi^T = [X1 | X2]
 * and C = I + M^T M, Woodbury's identity turns X B^T (B B^T)^-1 into X1 + (X2 - X1 M) C^-1 M^T:
 * 4 R (D-R) flops a row instead of 2 R D. Leaves P = C^-1 M^T (D-R,R). */
static molae_status
FN(solver_narrow)(FN(group) * q, int64_t D)
{
    const int64_t R = q->R, rest = D - R;
    molae_status rc = MOLAE_OK;

    MLI_TRY(FN(mli_syrk)(1, rest, R, 1, q->M, rest, 0, q->S, rest));
    for (int64_t j = 0; j < rest; j++)
        q->S[j * rest + j] += 1;
    MLI_TRY(FN(mli_potrf)(rest, q->S, rest, &q->info));
    FN(mli_transpose)(q->P, q->M, R, rest, 1);
    MLI_TRY(FN(mli_trsm)(1, rest, R, q->S, rest, q->P, R));
    MLI_TRY(FN(mli_trsm)(0, rest, R, q->S, rest, q->P, R));
done:
    return rc;
}

/* From the spectrum to everything the private factors need: B rounded to the storage type in the
 * asked form, and the solver. */
static molae_status
FN(shared_factor)(FN(job) * job, FN(group) * q, int64_t g)
{
    const int64_t D = job->s->D, R = q->R;
    const molae_dtype t = job->s->dtype;
    molae_status rc = MOLAE_OK;
    int finite;

    q->what = "eigenvalues of the Gram matrix did not converge";
    MLI_TRY(FN(basis)(job, q, job->out->spectrum + g * D));
    job->out->used_svd[g] = rc == MOLAE_W_PRECISION;
    if (job->rank != NULL && job->form == MOLAE_FORM_GAUGE)
        for (int64_t j = 0; j < D; j++)
            job->out->perm[g][j] = (int32_t)j;
    if (R == 0)
        goto done;
    if (R == D) {
        memset(q->B, 0, (size_t)R * (size_t)D * sizeof(REAL));
        for (int64_t j = 0; j < D; j++)
            q->B[j * D + j] = 1;
        if (job->form == MOLAE_FORM_PLAIN)
            (void)FN(mli_round)(job->out->shared[g], t, q->B, R * D);
        goto done; /* A_i = X_i */
    }
    q->what = "pivoted QR of the basis failed";
    if (job->form == MOLAE_FORM_GAUGE) {
        int32_t *perm = job->out->perm[g];
        if (q->complement)
            MLI_TRY(FN(mli_gauge_complement)(q->M, perm, q->gram, R, D, q->work, &q->info));
        else
            MLI_TRY(FN(mli_gauge)(q->M, perm, q->B, R, D, q->work, &q->info));
        finite = FN(mli_round)(job->out->shared[g], t, q->M, R * (D - R));
        if (!q->narrow) /* the narrow solver needs M alone */
            FN(mli_ungauge)(q->B, q->M, perm, R, D);
    } else {
        finite = FN(mli_round)(job->out->shared[g], t, q->B, R * D);
    }
    q->what = "the shared factor overflows the storage type";
    MLI_TRY(finite ? MOLAE_OK : MOLAE_E_NONFINITE);
    q->what = "the basis is not of full rank";
    MLI_TRY(q->narrow ? FN(solver_narrow)(q, D) : FN(solver)(q, D));
done:
    if (rc >= 0)
        q->what = NULL;
    return rc;
}

static molae_status
FN(shared_task)(void *arg, int64_t g, int32_t worker)
{
    FN(job) *job = arg;

    (void)worker;
    job->groups[g].status = FN(shared_factor)(job, &job->groups[g], g);
    return MOLAE_OK;
}

/* -------------------------------------------------------- private factors */

/* Y = X Pi^T: columns in the order of the gauge form. */
static void
FN(permute_columns)(REAL *Y, const REAL *X, const int32_t *perm, int64_t nr, int64_t D)
{
    for (int64_t r = 0; r < nr; r++)
        for (int64_t c = 0; c < D; c++)
            Y[r * D + c] = X[r * D + perm[c]];
}

/* A (nr,R) = X B^T (B B^T)^-1. */
static molae_status
FN(private_rows)(const FN(job) * job, const FN(group) * q, const int32_t *perm, REAL *A,
                 const REAL *X, REAL *Y, int64_t nr)
{
    const int64_t D = job->s->D, R = q->R, rest = D - R;
    molae_status rc = MOLAE_OK;

    if (R == D) {
        memcpy(A, X, (size_t)(nr * D) * sizeof(REAL));
    } else if (q->narrow) {
        FN(permute_columns)(Y, X, perm, nr, D);
        for (int64_t r = 0; r < nr; r++)
            memcpy(A + r * R, Y + r * D, (size_t)R * sizeof(REAL));
        MLI_TRY(FN(mli_gemm)(0, 0, nr, rest, R, -1, Y, D, q->M, rest, 1, Y + R, D));
        MLI_TRY(FN(mli_gemm)(0, 0, nr, R, rest, 1, Y + R, D, q->P, R, 1, A, R));
    } else {
        MLI_TRY(FN(mli_gemm)(0, 1, nr, R, D, 1, X, D, q->P, D, 0, A, R));
    }
done:
    return rc;
}

/* *sum = ||X - A B||^2 of a block of rows; X and Y are overwritten. */
static molae_status
FN(residual_rows)(const FN(job) * job, const FN(group) * q, const int32_t *perm, const REAL *A,
                  REAL *X, REAL *Y, int64_t nr, double *sum)
{
    const int64_t D = job->s->D, R = q->R, rest = D - R;
    molae_status rc = MOLAE_OK;

    if (job->form == MOLAE_FORM_GAUGE) { /* the identity part is a subtraction */
        FN(permute_columns)(Y, X, perm, nr, D);
        for (int64_t r = 0; r < nr; r++)
            for (int64_t j = 0; j < R; j++)
                Y[r * D + j] -= A[r * R + j];
        if (rest > 0)
            MLI_TRY(FN(mli_gemm)(0, 0, nr, rest, R, -1, A, R, q->M, rest, 1, Y + R, D));
        *sum = FN(mli_sumsq)(Y, nr * D);
    } else {
        MLI_TRY(FN(mli_gemm)(0, 0, nr, D, R, -1, A, R, q->B, D, 1, X, D));
        *sum = FN(mli_sumsq)(X, nr * D);
    }
done:
    return rc;
}

/* A block of rows of one A_i, and its part of ||X_i - A_i B||^2. */
static molae_status
FN(private_task)(void *arg, int64_t index, int32_t worker)
{
    FN(job) *job = arg;
    const molae_stack *s = job->s;
    const int64_t D = s->D, e = index / job->blocks, r0 = index % job->blocks * PRIVATE_ROWS;
    const int64_t g = job->group_of[e];
    const FN(group) *q = &job->groups[g];
    const int64_t R = q->R, nr = MLI_MIN((int64_t)PRIVATE_ROWS, s->F - r0);
    REAL *X = job->X + (int64_t)worker * PRIVATE_ROWS * D;
    REAL *Y = job->Y + (int64_t)worker * PRIVATE_ROWS * D;
    REAL *A = job->A + (int64_t)worker * PRIVATE_ROWS * job->max_R;
    REAL *tmp = job->tmp + (int64_t)worker * PRIVATE_ROWS * MLI_ROWS_TILE;
    const int32_t *perm = job->form == MOLAE_FORM_GAUGE ? job->out->perm[g] : NULL;
    char *dst;
    molae_status rc = MOLAE_OK;

    if (R == 0)
        return MOLAE_OK;
    dst =
        (char *)job->out->private_[g] + (size_t)((e - q->e0) * s->F * R) * mli_dtype_size(s->dtype);
    MLI_TRY(FN(mli_rows_load)(X, s, e, r0, nr, tmp, NULL));
    MLI_TRY(FN(private_rows)(job, q, perm, A, X, Y, nr));
    MLI_TRY(FN(mli_rows_store)(dst, s, r0, nr, R, A, tmp));
    if (job->out->residual != NULL)
        MLI_TRY(FN(residual_rows)(job, q, perm, A, X, Y, nr, &job->residual[index]));
done:
    job->private_status[index] = rc;
    return MOLAE_OK;
}

static molae_status
FN(private_factors)(const molae_ctx *ctx, FN(job) * job, molae_errinfo *err)
{
    const molae_stack *s = job->s;
    const int64_t cells = s->E * job->blocks;
    molae_status rc;

    memset(job->residual, 0, (size_t)cells * sizeof(double));
    memset(job->private_status, 0, (size_t)cells * sizeof(molae_status));
    rc = mli_parallel_for(ctx, cells, FN(private_task), job);
    if (rc < 0)
        return rc;
    for (int64_t e = 0; e < s->E; e++) {
        double sum = 0;
        for (int64_t b = 0; b < job->blocks; b++) {
            const molae_status cell = job->private_status[e * job->blocks + b];
            if (cell < 0) {
                err->expert = e;
                err->what = "the private factor overflows the storage type";
                return cell;
            }
            sum += job->residual[e * job->blocks + b];
        }
        if (job->out->residual != NULL)
            job->out->residual[e] = job->groups[job->group_of[e]].R > 0 ? sum : job->out->energy[e];
    }
    return MOLAE_OK;
}

/* ------------------------------------------------------------- the whole */

molae_status
FN(molae_factor_shared)(const molae_ctx *ctx, const molae_factors *out, const molae_stack *s,
                        const int64_t *rank, molae_form form, void *ws, size_t ws_bytes,
                        molae_errinfo *err)
{
    FN(job) job = FN(job_of_stack)(s, rank);
    char *p = ws;
    molae_status rc = mli_stack_check(s, rank, err);

    if (rc < 0)
        return rc;
    if (ws_bytes < FN(molae_factor_ws)(ctx, s, rank)) {
        err->what = "ws: too small";
        return MOLAE_E_ARG;
    }
    job.out = out;
    job.form = form;
    (void)FN(job_cut)(&job, &p, s, ctx->num_threads);
    for (int64_t g = 0; g < s->G; g++) {
        job.groups[g] = FN(group_of_stack)(s, g, rank);
        job.groups[g].narrow = form == MOLAE_FORM_GAUGE && s->D - job.groups[g].R < job.groups[g].R;
        job.groups[g].complement = job.groups[g].narrow && !job.groups[g].whole;
        (void)FN(group_cut)(&job.groups[g], &p, s);
        for (int64_t e = s->group_ptr[g]; e < s->group_ptr[g + 1]; e++)
            job.group_of[e] = g;
    }

    MLI_TRY(FN(accumulate)(ctx, &job, err));
    MLI_TRY(mli_parallel_for(ctx, s->G, FN(shared_task), &job));
    for (int64_t g = 0; g < s->G; g++)
        if (job.groups[g].status != MOLAE_OK) { /* keep the first failure, else a warning */
            if (job.groups[g].status < 0 || rc == MOLAE_OK) {
                rc = job.groups[g].status;
                err->group = g;
                err->info = job.groups[g].info;
                err->what = rc < 0 ? job.groups[g].what
                                   : "the Gram matrix is too coarse for the energy beyond this "
                                     "rank; a direct SVD was used";
            }
            if (rc < 0)
                goto done;
        }
    if (rank != NULL)
        MLI_TRY(FN(private_factors)(ctx, &job, err));
done:
    return rc;
}
