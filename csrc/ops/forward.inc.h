/* Forward: project, experts, combine, lift. */

/* dst (nr,nc) = rows of expert e times columns c0 .. of its gate or up, with the bias. *x: the
 * tokens' rows, if a call before has found them. */
static molae_status
FN(inner_rows)(const FN(job) * q, const FN(scratch) * s, int role, const mli_piece *t, REAL *dst,
               int64_t ld, const REAL **x, int64_t *ldx)
{
    const FN(role) *r = &q->role[role];
    const molae_projection *p = r->p;
    const int64_t e = t->unit, R = mli_rank(p, e), k = R < 0 ? q->D : R;
    const REAL *bias = FN(bias_piece)(p, e, q->F, t->c0, t->nc, s->line);
    const void *W = R == 0 ? NULL : mli_weight_at(p->private_[e], p->dtype, k, t->c0, 0);
    molae_status rc = MOLAE_OK;

    if (R >= 0)
        *x = NULL;
    if (R != 0 && *x == NULL)
        *x = FN(shared_side)(q, s, r, e, t->r0, t->nr, 0, k, q->in[role], r->z, ldx);
    MLI_TRY(FN(mli_product_nt)(dst, ld, 0, *x, *ldx, W, k, p->dtype, t->nr, t->nc, k, &s->product));
    if (R >= 0 || q->in[MLI_GATE] != q->in[MLI_UP]) /* of no use to another role */
        *x = NULL;
    for (int64_t i = 0; bias != NULL && i < t->nr; i++)
        for (int64_t j = 0; j < t->nc; j++)
            dst[i * ld + j] += bias[j];
done:
    return rc;
}

/* What scales the columns of a piece's row i. */
static const REAL *
FN(scale_of)(const FN(job) * q, const mli_piece *t, int64_t i)
{
    const int64_t token = q->rows[q->expert_ptr[t->unit] + t->r0 + i] / q->K;

    return q->scale + token * (2 * q->D + q->F) + t->c0;
}

/* h = act(gate, up) for some rows and columns of an expert. */
static molae_status
FN(expert_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(job) *q = arg;
    const mli_piece *t = &q->pieces.at[index];
    const FN(scratch) *s = &q->scratch[worker];
    const int64_t at = (q->expert_ptr[t->unit] + t->r0) * q->F + t->c0;
    const int64_t ld = q->gate ? q->F : t->nc + MLI_PAD;
    REAL *gate = q->gate ? q->gate + at : s->Y, *up = q->gate ? q->up + at : s->Z;
    const mli_kernels *kern = mli_kernels_get();
    const REAL *x = NULL;
    int64_t ldx = 0;
    molae_status rc = MOLAE_OK;

    if (!(q->known & MOLAE_KNOWN_GATE))
        MLI_TRY(FN(inner_rows)(q, s, MLI_GATE, t, gate, ld, &x, &ldx));
    if (!(q->known & MOLAE_KNOWN_UP))
        MLI_TRY(FN(inner_rows)(q, s, MLI_UP, t, up, ld, &x, &ldx));
    if (t->nc == q->F && ld == q->F) /* the rows are one run */
        kern->ACT(q->h + at, gate, up, t->nr * q->F, &q->act);
    else
        for (int64_t i = 0; i < t->nr; i++)
            kern->ACT(q->h + at + i * q->F, gate + i * ld, up + i * ld, t->nc, &q->act);
    for (int64_t i = 0; q->scale != NULL && i < t->nr; i++) {
        const REAL *scale = FN(scale_of)(q, t, i);
        for (int64_t j = 0; j < t->nc; j++)
            q->h[at + i * q->F + j] *= scale[j];
    }
done:
    return rc;
}

/* All experts' rows, cut for tasks. */
static void
FN(expert_pieces)(FN(job) * q)
{
    q->pieces.n = 0;
    for (int64_t e = 0; e < q->E; e++) {
        const int64_t rows = q->expert_ptr[e + 1] - q->expert_ptr[e];
        mli_pieces_cut(&q->pieces, (mli_piece){.unit = e, .nr = rows, .nc = q->F}, MLI_ROWS,
                       FN(cols)(rows));
    }
}

static molae_status
FN(forward_chunk)(const molae_ctx *ctx, FN(job) * q)
{
    FN(phase) ph = {.q = q, .in = {q->in[MLI_GATE], q->in[MLI_UP]}};
    molae_status rc = MOLAE_OK;

    ph.z[MLI_GATE] = q->role[MLI_GATE].z;
    ph.z[MLI_UP] = q->role[MLI_UP].z;
    q->pieces.n = 0;
    if (!(q->known & MOLAE_KNOWN_GATE))
        FN(project_pieces)(q, MLI_GATE);
    if (!(q->known & (MOLAE_KNOWN_UP | MOLAE_KNOWN_Z_UP)))
        FN(project_pieces)(q, MLI_UP);
    MLI_TRY(mli_parallel_for(ctx, q->pieces.n, FN(project_task), &ph));
    FN(expert_pieces)(q);
    MLI_TRY(mli_parallel_for(ctx, q->pieces.n, FN(expert_task), q));
    MLI_TRY(FN(combine)(ctx, q, MLI_DOWN, q->h, q->role[MLI_DOWN].z, q->y));
    MLI_TRY(FN(lift)(ctx, q, MLI_DOWN, q->role[MLI_DOWN].z, q->y));
done:
    return rc;
}

size_t
FN(molae_experts_forward_ws)(const molae_ctx *ctx, const molae_experts *l, int64_t N, int64_t K)
{
    return FN(job_bytes)(ctx, l, N, K, 0);
}

molae_status
FN(molae_experts_forward)(const molae_ctx *ctx, void *y, const FN(molae_experts_saved) * saved,
                          const void *x, const int64_t *index, const REAL *weight,
                          const molae_experts *l, int64_t N, int64_t K, void *ws, size_t ws_bytes,
                          molae_errinfo *err)
{
    FN(job) q = {0};
    molae_status rc = FN(job_begin)(&q, ctx, l, N, K, 0, ws, ws_bytes, err);

    if (rc < 0)
        return rc;
    for (int64_t n0 = 0; n0 < N; n0 += MOLAE_EXPERTS_CHUNK) {
        const int64_t n = MLI_MIN((int64_t)MOLAE_EXPERTS_CHUNK, N - n0);
        q.x = FN(widened)(&q, x, n0 * l->D, n * l->D, q.x_wide);
        MLI_TRY(FN(chunk_begin)(ctx, &q, index + n0 * K, weight + n0 * K, n, err));
        q.y = l->io == OWN ? (REAL *)y + n0 * l->D : q.y_wide;
        if (saved != NULL) {
            q.known = saved->known;
            FN(job_saved)(&q, saved, n0);
        }
        MLI_TRY(FN(forward_chunk)(ctx, &q));
#if NARROW_STORAGE
        if (l->io != OWN)
            mli_kernels_get()->f32_to_bf16((uint16_t *)y + n0 * l->D, q.y, n * l->D);
#endif
    }
done:
    return rc;
}
