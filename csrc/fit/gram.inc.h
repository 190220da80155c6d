/* Body of gram.c for one precision. */

typedef struct {
    REAL *C; /* (E,W,W) */
    const void *x;
    molae_dtype io;
    const REAL *weight; /* (N,K) */
    int64_t *ptr;       /* (E+1): an expert's slots in `slots` */
    int64_t *slots;     /* (N K) */
    REAL *gathered;     /* (workers, BLOCK, W) */
    int64_t E, W, rows; /* rows of x */
    int64_t slots_a_row;
} FN(moments);

static size_t
FN(moments_cut)(FN(moments) * q, char **p, int64_t N, int64_t K, int64_t workers)
{
    const size_t slots = mli_size_mul((size_t)N, (size_t)K);
    const size_t block = mli_size_mul((size_t)workers * BLOCK, (size_t)q->W);
    size_t n = 0;

    MLI_CUT(n, p, q->ptr, (size_t)q->E + 1, sizeof(int64_t));
    MLI_CUT(n, p, q->slots, slots, sizeof(int64_t));
    MLI_CUT(n, p, q->gathered, block, sizeof(REAL));
    return n;
}

size_t
FN(molae_second_moments_ws)(const molae_ctx *ctx, int64_t N, int64_t K, int64_t E, int64_t W)
{
    FN(moments) q = {.E = E, .W = W};

    return N < 0 || K < 1 || E < 1 || W < 1 ? 0 : FN(moments_cut)(&q, NULL, N, K, ctx->num_threads);
}

/* ---------------------------------------------------------------- checks */

static molae_status
FN(finite_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(moments) *q = arg;
    const int64_t r0 = index * BLOCK, nr = MLI_MIN((int64_t)BLOCK, q->rows - r0);
    REAL *row = q->gathered + (int64_t)worker * BLOCK * q->W;

    return FN(mli_widen)(row, q->x, q->io, r0 * q->W, nr * q->W) ? MOLAE_OK : MOLAE_E_NONFINITE;
}

static molae_status
FN(check_finite)(const molae_ctx *ctx, FN(moments) * q, int64_t slots, molae_errinfo *err)
{
    const int64_t blocks = (q->rows + BLOCK - 1) / BLOCK;
    const molae_status rc = mli_parallel_for(ctx, blocks, FN(finite_task), q);

    if (rc < 0) {
        err->what = "x: NaN or Inf";
        for (err->info = 0; FN(mli_widen)(q->gathered, q->x, q->io, err->info * q->W, q->W);)
            err->info++;
        return rc;
    }
    for (int64_t i = 0; i < slots; i++)
        if (!isfinite(q->weight[i])) {
            err->what = "top_k_weights: NaN or Inf";
            err->info = i;
            return MOLAE_E_NONFINITE;
        }
    return MOLAE_OK;
}

/* --------------------------------------------------------------- moments */

/* The lower triangle's copy of a panel: D (ni,W) starts on the diagonal of a square of width n. By
 * tiles, turned in a place of their own: rows of a power of two fall on each other in a cache. */
static void
FN(mirror)(REAL *D, int64_t ni, int64_t n, int64_t W)
{
    REAL turned[TILE][TILE];

    for (int64_t i0 = 0; i0 < ni; i0 += TILE)
        for (int64_t j0 = i0; j0 < n; j0 += TILE) {
            const int64_t ie = MLI_MIN(i0 + TILE, ni), je = MLI_MIN(j0 + TILE, n);
            for (int64_t i = i0; i < ie; i++)
                for (int64_t j = j0; j < je; j++)
                    turned[j - j0][i - i0] = D[i * W + j];
            for (int64_t j = j0; j < je; j++)
                for (int64_t i = i0; i < MLI_MIN(ie, j); i++)
                    D[j * W + i] = turned[j - j0][i - i0];
        }
}

/* Rows i0 .. of one expert's C, from the diagonal on, and their copy below it. */
static molae_status
FN(moments_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(moments) *q = arg;
    const int64_t W = q->W, e = index % q->E, i0 = index / q->E * PANEL;
    const int64_t n = W - i0, ni = MLI_MIN((int64_t)PANEL, n), end = q->ptr[e + 1];
    REAL *X = q->gathered + (int64_t)worker * BLOCK * W;
    REAL *C = q->C + (e * W + i0) * W + i0;
    molae_status rc = MOLAE_OK;

    if (q->ptr[e] == end)
        goto done;
    for (int64_t s0 = q->ptr[e]; s0 < end; s0 += BLOCK) {
        const int64_t nr = MLI_MIN((int64_t)BLOCK, end - s0);
        for (int64_t r = 0; r < nr; r++) {
            const int64_t slot = q->slots[s0 + r];
            REAL *row = X + r * n;
            (void)FN(mli_widen)(row, q->x, q->io, slot / q->slots_a_row * W + i0, n);
            for (int64_t j = 0; j < n; j++)
                row[j] *= q->weight[slot];
        }
        MLI_TRY(FN(mli_syrk)(1, ni, nr, 1, X, n, 1, C, W));
        if (n > ni)
            MLI_TRY(FN(mli_gemm)(1, 0, ni, n - ni, nr, 1, X, n, X + ni, n, 1, C + ni, W));
    }
    FN(mirror)(C, ni, n, W);
done:
    return rc;
}

molae_status
FN(molae_second_moments)(const molae_ctx *ctx, REAL *C, double *mass, int64_t *count, const void *x,
                         molae_dtype io, int per_slot, const int64_t *index, const REAL *weight,
                         int64_t N, int64_t K, int64_t E, int64_t W, void *ws, size_t ws_bytes,
                         molae_errinfo *err)
{
    FN(moments) q = {.C = C, .x = x, .io = io, .weight = weight, .E = E, .W = W};
    char *p = ws;
    molae_status rc = MOLAE_OK;

    *err = (molae_errinfo){NULL, -1, -1, -1};
    if (W < 1 || N < 0 || K < 1 || E < 1) {
        err->what = "x: expected rows that are not empty";
        return MOLAE_E_SHAPE;
    }
    if (ws_bytes < FN(molae_second_moments_ws)(ctx, N, K, E, W)) {
        err->what = "ws: too small";
        return MOLAE_E_ARG;
    }
    (void)FN(moments_cut)(&q, &p, N, K, ctx->num_threads);
    q.rows = per_slot ? N * K : N;
    q.slots_a_row = per_slot ? 1 : K;
    MLI_TRY(molae_route(q.ptr, q.slots, index, N, K, E, err));
    MLI_TRY(FN(check_finite)(ctx, &q, N * K, err));
    err->what = "matrix product failed";
    MLI_TRY(mli_parallel_for(ctx, (W + PANEL - 1) / PANEL * E, FN(moments_task), &q));
    err->what = NULL;
    for (int64_t e = 0; e < E; e++) {
        count[e] += q.ptr[e + 1] - q.ptr[e];
        for (int64_t s = q.ptr[e]; s < q.ptr[e + 1]; s++)
            mass[e] += (double)weight[q.slots[s]] * (double)weight[q.slots[s]];
    }
done:
    return rc;
}
