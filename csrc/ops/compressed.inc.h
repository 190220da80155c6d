/* Compressed experts: which of a token's slots they are, what the token's vectors are, and the way
 * back. A token's vectors lie behind each other, T = 2 D + F numbers: theta1, theta2, theta3. */

enum { FN(TOKENS) = 32 }; /* of a task */

/* Where each of the three vectors begins in a token's T numbers and in an expert's, and how many
 * numbers it has. */
typedef struct {
    int64_t own, stored, count;
} FN(vector);

static void
FN(vectors_at)(const FN(job) * q, FN(vector) at[3])
{
    const molae_compressed *c = &q->l->compressed;

    at[0] = (FN(vector)){0, 0, q->D};
    at[1] = (FN(vector)){q->D, c->e2, q->F};
    at[2] = (FN(vector)){q->D + q->F, c->e3, q->D};
}

/* Whether experts' vectors lie behind each other in the arithmetic's type: as they are summed. */
static int
FN(vectors_together)(const FN(job) * q)
{
    const molae_compressed *c = &q->l->compressed;

    return c->dtype == OWN && c->e2 == q->D && c->e3 == q->D + q->F;
}

/* An expert's vectors behind each other, T numbers: where they are if they lie so, else in room. */
static const REAL *
FN(vectors_of)(const FN(job) * q, int64_t e, REAL *room)
{
    const molae_compressed *c = &q->l->compressed;
    const int64_t from = e * c->stride;
    FN(vector) at[3];

    if (q->ce.has_whole)
        return q->ce.whole + e * (2 * q->D + q->F);
    if (FN(vectors_together)(q))
        return (const REAL *)c->vectors + from;
    FN(vectors_at)(q, at);
    for (int i = 0; i < 3; i++) {
        if (c->dtype == OWN)
            memcpy(room + at[i].own, (const REAL *)c->vectors + from + at[i].stored,
                   (size_t)at[i].count * sizeof(REAL));
#if NARROW_STORAGE
        else
            (void)mli_kernels_get()->bf16_to_f32(
                room + at[i].own, (const uint16_t *)c->vectors + from + at[i].stored, at[i].count);
#endif
    }
    return room;
}

/* Whether slot k of a token comes behind K - n others by weight. */
static int
FN(is_compressed)(const int64_t *index, const REAL *weight, int64_t K, int64_t n, int64_t k)
{
    int64_t before = 0;

    for (int64_t j = 0; j < K; j++)
        before +=
            weight[j] > weight[k] ||
            (weight[j] == weight[k] && (index[j] < index[k] || (index[j] == index[k] && j < k)));
    return before >= K - n;
}

molae_status
FN(molae_split_slots)(int64_t *main_, int64_t *aux, const int64_t *index, const REAL *weight,
                      int64_t N, int64_t K, int64_t E, int64_t n, molae_errinfo *err)
{
    const molae_status rc = mli_index_check(index, N, K, E, err);

    if (rc < 0)
        return rc;
    if (n < 0 || n >= K) {
        err->what = "num_compressed: expected 0 to K - 1";
        err->info = n;
        return MOLAE_E_ARG;
    }
    for (int64_t t = 0; t < N * K; t += K)
        for (int64_t k = 0; k < K; k++) {
            const int is_aux = FN(is_compressed)(index + t, weight + t, K, n, k);
            main_[t + k] = is_aux ? E : index[t + k];
            aux[t + k] = is_aux ? index[t + k] : E;
        }
    return MOLAE_OK;
}

/* What share each of a token's compressed slots has. */
static void
FN(share_slots)(const FN(job) * q, const REAL *weight, int64_t t)
{
    const FN(compressed) *c = &q->ce;
    const int64_t K = q->K, E = q->E;
    REAL sum = 0;
    int64_t met = 0;

    for (int64_t s = t * K; s < (t + 1) * K; s++)
        if (c->aux[s] < E) {
            sum += weight[s];
            met++;
        }
    for (int64_t s = t * K; s < (t + 1) * K; s++)
        if (c->aux[s] == E)
            c->share[s] = 0;
        else
            c->share[s] = sum != 0 ? weight[s] / sum : 1 / (REAL)met;
    c->sum[t] = sum;
    c->met[t] = met;
}

/* All experts' vectors as they are summed: one expert a task. */
static molae_status
FN(whole_task)(void *arg, int64_t e, int32_t worker)
{
    const FN(job) *q = arg;

    (void)worker;
    (void)FN(vectors_of)(q, e, q->ce.whole + e * (2 * q->D + q->F));
    return MOLAE_OK;
}

/* theta (T) = or += the sum of share[i] v[i]. */
static inline void
FN(add_up)(REAL *restrict theta, const REAL *const *v, const REAL *share, const int count,
           int64_t T, int first)
{
    for (int64_t j = 0; j < T; j++) {
        REAL sum = first ? 0 : theta[j];
        for (int i = 0; i < count; i++)
            sum += share[i] * v[i][j];
        theta[j] = sum;
    }
}

/* A token's vectors, a few of its experts' at a time. */
static void
FN(token_vectors)(const FN(job) * q, int64_t t, REAL *theta, REAL *room)
{
    const FN(compressed) *c = &q->ce;
    const int64_t T = 2 * q->D + q->F;
    const REAL *v[MLI_SUMMED];
    REAL share[MLI_SUMMED];
    int count = 0, first = 1;

    for (int64_t s = t * q->K; s < (t + 1) * q->K; s++) {
        if (c->aux[s] < q->E) {
            v[count] = FN(vectors_of)(q, c->aux[s], room + count * T);
            share[count++] = c->share[s];
        }
        if (count == MLI_SUMMED || (count > 0 && s + 1 == (t + 1) * q->K)) {
            switch (count) { /* a count that the compiler knows */
            case 1:
                FN(add_up)(theta, v, share, 1, T, first);
                break;
            case 2:
                FN(add_up)(theta, v, share, 2, T, first);
                break;
            case 3:
                FN(add_up)(theta, v, share, 3, T, first);
                break;
            default:
                FN(add_up)(theta, v, share, MLI_SUMMED, T, first);
            }
            first = count = 0;
        }
    }
    for (int64_t j = 0; first && j < T; j++)
        theta[j] = 1; /* all of them are sentinels */
}

static void
FN(scale_to)(REAL *restrict to, const REAL *restrict x, const REAL *restrict by, int64_t n)
{
    for (int64_t j = 0; j < n; j++)
        to[j] = x[j] * by[j];
}

/* Vectors of some tokens, and what gate and up read. */
static molae_status
FN(vectors_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(job) *q = arg;
    const FN(compressed) *c = &q->ce;
    const int64_t D = q->D, T = 2 * D + q->F, end = MLI_MIN((index + 1) * FN(TOKENS), q->N);

    for (int64_t t = index * FN(TOKENS); t < end; t++) {
        REAL *theta = c->theta + t * T;
        FN(token_vectors)(q, t, theta, c->room + worker * MLI_SUMMED * T);
        FN(scale_to)(c->x_gate + t * D, q->x + t * D, theta, D);
        FN(scale_to)(c->x_up + t * D, q->x + t * D, theta + D + q->F, D);
    }
    return MOLAE_OK;
}

/* A chunk of N tokens whose input is in q->x: what runs of it, what that reads, and its routing. */
static molae_status
FN(chunk_begin)(const molae_ctx *ctx, FN(job) * q, const int64_t *index, const REAL *weight,
                int64_t N, molae_errinfo *err)
{
    FN(compressed) *c = &q->ce;
    molae_status rc = MOLAE_OK;

    q->N = N;
    q->in[MLI_GATE] = q->in[MLI_UP] = q->x;
    if (q->l->compressed.n > 0) {
        MLI_TRY(FN(molae_split_slots)(c->main, c->aux, index, weight, N, q->K, q->E,
                                      q->l->compressed.n, err));
        for (int64_t t = 0; t < N; t++)
            FN(share_slots)(q, weight, t);
        index = c->main;
        q->in[MLI_GATE] = c->x_gate;
        q->in[MLI_UP] = c->x_up;
        c->has_whole = 0;
        if (!FN(vectors_together)(q) && N * q->l->compressed.n >= q->E) {
            MLI_TRY(mli_parallel_for(ctx, q->E, FN(whole_task), q));
            c->has_whole = 1;
        }
        q->scale = c->theta + q->D;
        MLI_TRY(mli_parallel_for(ctx, mli_ceil_div(N, FN(TOKENS)), FN(vectors_task), q));
    }
    MLI_TRY(FN(job_route)(q, index, weight, err));
done:
    return rc;
}

/* ------------------------------------------------------------------ the way back */

typedef struct {
    FN(job) * q;
    const FN(molae_experts_grads) * d;
} FN(compress_back);

/* Of some tokens the gradient of their vectors, of x, and of the compressed slots' weights. */
static molae_status
FN(vectors_back_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(compress_back) *b = arg;
    const FN(job) *q = b->q;
    const FN(compressed) *c = &q->ce;
    const int64_t D = q->D, F = q->F, K = q->K, T = 2 * D + F;
    const int64_t end = MLI_MIN((index + 1) * FN(TOKENS), q->N);

    for (int64_t t = index * FN(TOKENS); t < end; t++) {
        const REAL *theta = c->theta + t * T, *dg = c->dx_gate + t * D, *du = c->dx_up + t * D;
        const REAL *x = q->x + t * D;
        REAL *d = c->dtheta + t * T, mean = 0;
        memset(d + D, 0, (size_t)F * sizeof(REAL));
        for (int64_t s = t * K; s < (t + 1) * K; s++)
            for (int64_t j = 0; c->main[s] < q->E && j < F; j++)
                d[D + j] += c->dscale[c->row_of[s] * F + j];
        for (int64_t j = 0; j < D; j++) {
            d[j] = dg[j] * x[j];
            d[D + F + j] = du[j] * x[j];
        }
        for (int64_t j = 0; b->d->dx != NULL && j < D; j++)
            b->d->dx[t * D + j] += dg[j] * theta[j] + du[j] * theta[D + F + j];
        if (b->d->dweight == NULL || c->met[t] == 0 || c->sum[t] == 0)
            continue;
        for (int64_t s = t * K; s < (t + 1) * K; s++) { /* by the share, and from it */
            const REAL *v;
            REAL sum = 0;
            if (c->aux[s] == q->E)
                continue;
            v = FN(vectors_of)(q, c->aux[s], c->room + worker * MLI_SUMMED * T);
            for (int64_t j = 0; j < T; j++)
                sum += d[j] * v[j];
            c->dshare[s] = sum;
            mean += c->share[s] * sum;
        }
        for (int64_t s = t * K; s < (t + 1) * K; s++)
            if (c->aux[s] < q->E)
                b->d->dweight[s] += (c->dshare[s] - mean) / c->sum[t];
    }
    return MOLAE_OK;
}

/* Adds to the gradient of one expert's vectors what each of its tokens has, in their order. */
static molae_status
FN(vectors_grad_task)(void *arg, int64_t e, int32_t worker)
{
    const FN(compress_back) *b = arg;
    const FN(job) *q = b->q;
    const FN(compressed) *c = &q->ce;
    const int64_t T = 2 * q->D + q->F, stride = q->l->compressed.stride;
    FN(vector) at[3];

    (void)worker;
    FN(vectors_at)(q, at);
    for (int64_t i = c->ptr[e]; i < c->ptr[e + 1]; i++) {
        const int64_t s = c->rows[i];
        const REAL *d = c->dtheta + s / q->K * T;
        for (int k = 0; k < 3; k++)
            for (int64_t j = 0; j < at[k].count; j++)
                b->d->vectors[e * stride + at[k].stored + j] += c->share[s] * d[at[k].own + j];
    }
    return MOLAE_OK;
}

/* Where the rows of slots are, and room for what gate and up send back. */
static molae_status
FN(compress_back_begin)(FN(job) * q, molae_errinfo *err)
{
    FN(compressed) *c = &q->ce;
    const size_t bytes = (size_t)(q->N * q->D) * sizeof(REAL);

    memset(c->dx_gate, 0, bytes);
    memset(c->dx_up, 0, bytes);
    for (int64_t i = 0; i < q->expert_ptr[q->E]; i++)
        c->row_of[q->rows[i]] = i;
    return molae_route(c->ptr, c->rows, c->aux, q->N, q->K, q->E, err);
}

static molae_status
FN(compress_back_end)(const molae_ctx *ctx, FN(job) * q, const FN(molae_experts_grads) * d)
{
    FN(compress_back) b = {q, d};
    molae_status rc;

    rc = mli_parallel_for(ctx, mli_ceil_div(q->N, FN(TOKENS)), FN(vectors_back_task), &b);
    if (rc >= 0 && d->vectors != NULL)
        rc = mli_parallel_for(ctx, q->E, FN(vectors_grad_task), &b);
    return rc;
}
