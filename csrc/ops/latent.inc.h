/* Between tokens and latent rows: project (z = x B^T), combine (experts added up) and lift
 * (y += z B). Each serves forward and, with roles swapped, backward. */

typedef struct {
    FN(job) * q;
    const REAL *src;           /* combine: (S,F) */
    const REAL *in[MLI_ROLES]; /* project: (N,D) */
    REAL *z[MLI_ROLES];        /* latent rows */
    REAL *out;                 /* (N,D) */
    int role;
    int64_t t0, nt; /* lift: its tokens */
} FN(phase);

/* Columns of a piece with nr rows. */
static int64_t
FN(cols)(int64_t nr)
{
    return nr <= MLI_FEW ? MLI_FINE : MLI_COARSE;
}

/* Some rows and columns of z_g = src B^T. */
static molae_status
FN(project_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(phase) *ph = arg;
    const FN(job) *q = ph->q;
    const mli_piece *t = &q->pieces.at[index];
    const FN(role) *r = &q->role[t->role];
    const FN(scratch) *s = &q->scratch[worker];
    const molae_projection *p = r->p;
    const int64_t g = t->unit, R = p->rank[g], D = q->D, rest = D - R;
    const int64_t *token = r->tokens + r->ptr[g] + t->r0;
    const REAL *src = ph->in[t->role];
    REAL *z = ph->z[t->role] + r->at[g] + t->r0 * R + t->c0;

    if (p->form == MOLAE_FORM_GAUGE) {
        const FN(mli_rows) x = {src, D, t->nr, token};
        return FN(mli_product_gauge)(z, R, &x, p->perm[g] + t->c0, t->nc, p->perm[g] + R, rest,
                                     mli_weight_at(p->shared[g], p->dtype, rest, t->c0, 0),
                                     p->dtype, s->X, &s->product);
    } else {
        int64_t ldx;
        const REAL *X = FN(rows_of)(s->X, &ldx, src, D, token, t->nr, 0, D);
        return FN(mli_product_nt)(z, R, 0, X, ldx,
                                  mli_weight_at(p->shared[g], p->dtype, D, t->c0, 0), D, p->dtype,
                                  t->nr, t->nc, D, &s->product);
    }
}

static void
FN(project_pieces)(FN(job) * q, int role)
{
    const FN(role) *r = &q->role[role];

    for (int64_t g = 0; r->width > 0 && g < r->p->G; g++) {
        const int64_t rows = r->ptr[g + 1] - r->ptr[g];
        const mli_piece piece = {.role = role, .unit = g, .nr = rows, .nc = r->p->rank[g]};
        mli_pieces_cut(&q->pieces, piece, MLI_ROWS, FN(cols)(rows));
    }
}

/* ---------------------------------------------------------------- combine */

/* Adds the products of an expert's rows among tokens t0 .. t0+nt-1 to dst: columns c0 .. of rows
 * of the token (R < 0: dense) or of its latent row. Down: H W^T, times the routing weight, with
 * the bias; gate and up, backward: H W. */
static molae_status
FN(combine_expert)(const FN(phase) * ph, const FN(scratch) * s, int64_t e, const mli_piece *t,
                   REAL *dst)
{
    const FN(job) *q = ph->q;
    const FN(role) *r = &q->role[ph->role];
    const molae_projection *p = r->p;
    const int down = ph->role == MLI_DOWN, latent = t->unit >= 0;
    const int64_t R = mli_rank(p, e), k = latent || R < 0 ? q->F : 0; /* 0: bias alone */
    const int64_t width = latent ? R : q->D, nc = t->nc, ld = nc + MLI_PAD;
    const int64_t end = q->expert_ptr[e + 1];
    const REAL *bias = down && !latent ? FN(bias_piece)(p, e, q->D, t->c0, nc, s->line) : NULL;
    const void *W = k == 0 ? NULL
                    : down ? mli_weight_at(p->private_[e], p->dtype, q->F, t->c0, 0)
                           : mli_weight_at(p->private_[e], p->dtype, width, 0, t->c0);
    int64_t lo = mli_lower_bound(q->rows, q->expert_ptr[e], end, t->r0 * q->K);
    const int64_t hi = mli_lower_bound(q->rows, lo, end, (t->r0 + t->nr) * q->K);
    molae_status rc = MOLAE_OK;

    if (k == 0 && bias == NULL)
        return MOLAE_OK;
    for (; lo < hi; lo += MLI_ROWS) {
        const int64_t nr = MLI_MIN((int64_t)MLI_ROWS, hi - lo);
        const REAL *H = ph->src + lo * q->F;
        if (down)
            MLI_TRY(FN(mli_product_nt)(s->Y, ld, 0, H, q->F, W, q->F, p->dtype, nr, nc, k,
                                       &s->product));
        else
            MLI_TRY(FN(mli_product_nn)(s->Y, ld, 0, H, q->F, W, width, p->dtype, nr, nc, k,
                                       &s->product));
        for (int64_t i = 0; i < nr; i++) {
            const int64_t slot = q->rows[lo + i];
            const REAL w = down ? q->weight[slot] : 1, *y = s->Y + i * ld;
            REAL *to = dst + (latent ? r->slot_row[slot] : slot / q->K) * width + t->c0;
            if (bias != NULL)
                for (int64_t j = 0; j < nc; j++)
                    to[j] += w * (y[j] + bias[j]);
            else
                for (int64_t j = 0; j < nc; j++)
                    to[j] += w * y[j];
        }
    }
done:
    return rc;
}

/* A block of columns for a span of tokens: of one group's latent rows, or (unit -1) of out. */
static molae_status
FN(combine_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(phase) *ph = arg;
    const FN(job) *q = ph->q;
    const mli_piece *t = &q->pieces.at[index];
    const FN(role) *r = &q->role[ph->role];
    const FN(scratch) *s = &q->scratch[worker];
    const int64_t g = t->unit;
    molae_status rc = MOLAE_OK;

    if (g >= 0) {
        const int64_t R = r->p->rank[g], *tokens = r->tokens;
        const int64_t lo = mli_lower_bound(tokens, r->ptr[g], r->ptr[g + 1], t->r0);
        const int64_t hi = mli_lower_bound(tokens, lo, r->ptr[g + 1], t->r0 + t->nr);
        REAL *z = ph->z[ph->role] + r->at[g];
        for (int64_t i = lo; i < hi; i++)
            memset(z + (i - r->ptr[g]) * R + t->c0, 0, (size_t)t->nc * sizeof(REAL));
        for (int64_t m = r->member_ptr[g]; m < r->member_ptr[g + 1]; m++)
            MLI_TRY(FN(combine_expert)(ph, s, r->members[m], t, z));
    } else {
        for (int64_t i = t->r0; ph->role == MLI_DOWN && i < t->r0 + t->nr; i++)
            memset(ph->out + i * q->D + t->c0, 0, (size_t)t->nc * sizeof(REAL));
        for (int64_t e = 0; e < q->E; e++)
            if (q->expert_ptr[e] < q->expert_ptr[e + 1])
                MLI_TRY(FN(combine_expert)(ph, s, e, t, ph->out));
    }
done:
    return rc;
}

/* Experts added up: latent rows into z unless NULL, dense ones (and biases) into out unless NULL;
 * for down out is set to 0 first. */
static molae_status
FN(combine)(const molae_ctx *ctx, FN(job) * q, int role, const REAL *src, REAL *z, REAL *out)
{
    const FN(role) *r = &q->role[role];
    FN(phase) ph = {.q = q, .src = src, .out = out, .role = role};
    int dense = role == MLI_DOWN;
    const int64_t cols = FN(cols)(q->N * q->K / q->E);

    ph.z[role] = z;
    q->pieces.n = 0;
    for (int64_t g = 0; g < r->p->G; g++)
        if (r->p->rank[g] < 0)
            dense = 1;
        else if (r->width > 0 && r->p->rank[g] > 0 && r->ptr[g] < r->ptr[g + 1] && z != NULL)
            mli_pieces_cut(&q->pieces, (mli_piece){.unit = g, .nr = q->N, .nc = r->p->rank[g]},
                           MLI_SPAN, cols);
    if (dense && out != NULL)
        mli_pieces_cut(&q->pieces, (mli_piece){.unit = -1, .nr = q->N, .nc = q->D}, MLI_SPAN, cols);
    return mli_parallel_for(ctx, q->pieces.n, FN(combine_task), &ph);
}

/* ------------------------------------------------------------------- lift */

/* Which of the group's latent rows belong to the phase's tokens: *lo .. *hi-1. Returns how many
 * numbers a lifted row has. */
static int64_t
FN(lift_rows)(const FN(phase) * ph, int64_t g, int64_t *lo, int64_t *hi)
{
    const FN(role) *r = &ph->q->role[ph->role];

    *lo = mli_lower_bound(r->tokens, r->ptr[g], r->ptr[g + 1], ph->t0);
    *hi = mli_lower_bound(r->tokens, *lo, r->ptr[g + 1], ph->t0 + ph->nt);
    return r->p->form == MOLAE_FORM_GAUGE ? ph->q->D - r->p->rank[g] : ph->q->D;
}

/* Columns of z_g B (gauge form: z_g M) for one group's rows; r0 is where they begin in lifted. */
static molae_status
FN(lift_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(phase) *ph = arg;
    const FN(job) *q = ph->q;
    const mli_piece *t = &q->pieces.at[index];
    const FN(role) *r = &q->role[ph->role];
    const molae_projection *p = r->p;
    const int64_t g = t->unit, R = p->rank[g];
    int64_t lo, hi;
    const int64_t width = FN(lift_rows)(ph, g, &lo, &hi);
    const REAL *z = ph->z[ph->role] + r->at[g] + (lo - r->ptr[g]) * R;

    return FN(mli_product_nn)(q->lifted + t->r0 + t->c0, width, 0, z, R,
                              mli_weight_at(p->shared[g], p->dtype, width, 0, t->c0), width,
                              p->dtype, t->nr, t->nc, R, &q->scratch[worker].product);
}

/* Adds lifted rows, and the identity's part, to a few tokens of out, in the order of groups. */
static molae_status
FN(scatter_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(phase) *ph = arg;
    const FN(job) *q = ph->q;
    const FN(role) *r = &q->role[ph->role];
    const int64_t first = ph->t0 + index * MLI_SCATTER;
    const int64_t last = MLI_MIN(first + MLI_SCATTER, ph->t0 + ph->nt);
    const REAL *lifted = q->lifted;

    for (int64_t g = 0; g < r->p->G; g++) {
        const int64_t R = r->p->rank[g];
        int64_t lo, hi;
        if (R < 1)
            continue;
        const int64_t width = FN(lift_rows)(ph, g, &lo, &hi);
        const int64_t i0 = mli_lower_bound(r->tokens, lo, hi, first);
        const int64_t i1 = mli_lower_bound(r->tokens, i0, hi, last);
        const REAL *from = lifted + (i0 - lo) * width;
        if (r->p->form == MOLAE_FORM_GAUGE)
            FN(mli_scatter)(ph->out, q->D, r->tokens + i0, i1 - i0,
                            ph->z[ph->role] + r->at[g] + (i0 - r->ptr[g]) * R, R, from,
                            r->p->perm[g], &q->scratch[worker].product);
        else
            for (int64_t i = i0; i < i1; i++, from += width) {
                REAL *to = ph->out + r->tokens[i] * q->D;
                for (int64_t j = 0; j < width; j++)
                    to[j] += from[j];
            }
        lifted += (hi - lo) * width;
    }
    return MOLAE_OK;
}

/* out (N,D) += z B, each token's groups in order. A few tokens at a time, since a group's rows
 * cannot be added to out while another's are. */
static molae_status
FN(lift)(const molae_ctx *ctx, FN(job) * q, int role, REAL *z, REAL *out)
{
    const FN(role) *r = &q->role[role];
    FN(phase) ph = {.q = q, .out = out, .role = role};
    molae_status rc = MOLAE_OK;

    ph.z[role] = z;
    for (ph.t0 = 0; r->width > 0 && ph.t0 < q->N; ph.t0 += MLI_LIFT) {
        int64_t at = 0;
        ph.nt = MLI_MIN((int64_t)MLI_LIFT, q->N - ph.t0);
        q->pieces.n = 0;
        for (int64_t g = 0; g < r->p->G; g++) {
            int64_t lo, hi, width;
            if (r->p->rank[g] < 1)
                continue;
            width = FN(lift_rows)(&ph, g, &lo, &hi);
            for (int64_t c = 0; lo < hi && c < width; c += FN(cols)(hi - lo))
                mli_pieces_add(&q->pieces,
                               (mli_piece){.unit = g,
                                           .r0 = at,
                                           .nr = hi - lo,
                                           .c0 = c,
                                           .nc = MLI_MIN(FN(cols)(hi - lo), width - c)});
            at += (hi - lo) * width;
        }
        MLI_TRY(mli_parallel_for(ctx, q->pieces.n, FN(lift_task), &ph));
        MLI_TRY(mli_parallel_for(ctx, mli_ceil_div(ph.nt, MLI_SCATTER), FN(scatter_task), &ph));
    }
done:
    return rc;
}
