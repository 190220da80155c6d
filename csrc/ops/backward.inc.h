/* Backward: dy to latent rows, experts, combine and lift for dx, then the gradients of weights. */

/* What is wanted, and what that takes. */
typedef struct {
    const FN(molae_experts_grads) * d;
    int private_[MLI_ROLES], shared[MLI_ROLES];
    int dh;      /* the cotangent of h */
    int vectors; /* those of compressed experts, or what lies behind them */
    int add;     /* to the gradients of weights, or set them */
} FN(wants);

static const FN(molae_projection_grads) * FN(grads_of)(const FN(molae_experts_grads) * d, int role)
{
    return role == MLI_GATE ? &d->gate : (role == MLI_UP ? &d->up : &d->down);
}

static int
FN(any)(REAL *const *list, int64_t n)
{
    for (int64_t i = 0; list != NULL && i < n; i++)
        if (list[i] != NULL)
            return 1;
    return 0;
}

static FN(wants) FN(wants_of)(const molae_experts *l, const FN(molae_experts_grads) * d)
{
    FN(wants) w = {.d = d, .dh = d->dx != NULL || d->dweight != NULL, .add = !d->overwrite};

    w.vectors = l->compressed.n > 0 && (w.dh || d->vectors != NULL);
    w.dh |= w.vectors;

    for (int role = 0; role < MLI_ROLES; role++) {
        const FN(molae_projection_grads) *g = FN(grads_of)(d, role);
        w.private_[role] = FN(any)(g->private_, l->E);
        w.shared[role] = FN(any)(g->shared, mli_projection(l, role)->G);
        if (role != MLI_DOWN)
            w.dh |= w.private_[role] || w.shared[role] || g->bias != NULL;
    }
    return w;
}

typedef struct {
    FN(job) * q;
    const FN(wants) * w;
} FN(back);

/* dgate, dup and weighted h for some rows and columns of an expert, and their sums of h dh. */
static molae_status
FN(expert_back_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(back) *b = arg;
    const FN(job) *q = b->q;
    const mli_piece *t = &q->pieces.at[index];
    const FN(scratch) *s = &q->scratch[worker];
    const FN(role) *r = &q->role[MLI_DOWN];
    const molae_projection *p = r->p;
    const int64_t e = t->unit, R = mli_rank(p, e), k = !b->w->dh ? 0 : (R < 0 ? q->D : R);
    const int64_t row = q->expert_ptr[e] + t->r0, at = row * q->F + t->c0;
    const void *W = k == 0 ? NULL : mli_weight_at(p->private_[e], p->dtype, q->F, 0, t->c0);
    const REAL *X = NULL;
    const mli_kernels *kern = mli_kernels_get();
    int64_t ldx = 0;
    molae_status rc = MOLAE_OK;

    if (k > 0)
        X = FN(shared_side)(q, s, r, e, t->r0, t->nr, 0, k, q->dy, r->dz, &ldx);
    MLI_TRY(FN(mli_product_nn)(s->Y, t->nc, 0, X, ldx, W, q->F, p->dtype, t->nr, t->nc, k,
                               &s->product));
    for (int64_t i = 0; i < t->nr; i++) {
        const int64_t j = at + i * q->F;
        const REAL *scale = q->scale ? FN(scale_of)(q, t, i) : NULL;
        REAL *y = s->Y + i * t->nc;
        REAL *partial = q->partial + (row + i) * q->blocks + t->c0 / MLI_FINE;
        for (int64_t c = 0; scale != NULL && c < t->nc; c++) {
            s->Z[c] = y[c];
            y[c] *= scale[c];
        }
        *partial = kern->ACT_GRAD(
            q->dgate + j, q->dup + j, b->w->private_[MLI_DOWN] || b->w->vectors ? q->h + j : NULL,
            y, q->gate + j, q->up + j, q->weight[q->rows[row + i]], t->nc, &q->act);
        for (int64_t c = 0; scale != NULL && c < t->nc; c++) {
            q->ce.dscale[j + c] = q->h[j + c] * s->Z[c];
            q->h[j + c] *= scale[c];
        }
        for (int64_t c = 1; c * MLI_FINE < t->nc; c++) /* one sum for several blocks */
            partial[c] = 0;
    }
done:
    return rc;
}

/* Gradient of the routing weights of some rows: sum of h dh, and of the bias with dy. */
static molae_status
FN(dweight_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(back) *b = arg;
    const FN(job) *q = b->q;
    const molae_projection *p = q->role[MLI_DOWN].p;
    const int64_t end = MLI_MIN((index + 1) * MLI_ROWS, q->expert_ptr[q->E]);

    for (int64_t i = index * MLI_ROWS; i < end; i++) {
        const int64_t slot = q->rows[i];
        const REAL *dy = q->dy + slot / q->K * q->D;
        REAL sum = 0;
        for (int64_t c = 0; c < q->blocks; c++)
            sum += q->partial[i * q->blocks + c];
        for (int64_t c = 0; p->bias != NULL && c < q->D; c += MLI_COARSE) {
            const int64_t nc = MLI_MIN((int64_t)MLI_COARSE, q->D - c);
            const REAL *bias =
                FN(bias_piece)(p, q->index[slot], q->D, c, nc, q->scratch[worker].line);
            for (int64_t j = 0; j < nc; j++)
                sum += dy[c + j] * bias[j];
        }
        b->w->d->dweight[slot] += sum;
    }
    return MOLAE_OK;
}

/* ---------------------------------------------------- gradients of weights */

/* Rows c0 .. of the gradient of an expert's matrix. Gate, up: dgate^T times x or z; down: dy or
 * its latent rows, transposed, times the weighted h. */
static molae_status
FN(private_grad)(const FN(back) * b, const FN(scratch) * s, const mli_piece *t)
{
    const FN(job) *q = b->q;
    const FN(role) *r = &q->role[t->role];
    const int64_t e = t->unit, F = q->F, R = mli_rank(r->p, e), k = R < 0 ? q->D : R;
    const int64_t rows = q->expert_ptr[e + 1] - q->expert_ptr[e];
    REAL *dW = FN(grads_of)(b->w->d, t->role)->private_[e];
    molae_status rc = MOLAE_OK;

    for (int64_t r0 = 0; r0 == 0 || r0 < rows; r0 += MLI_ROWS) {
        const int64_t nr = MLI_MIN((int64_t)MLI_ROWS, rows - r0);
        const int add = b->w->add || r0 > 0;
        const int64_t at = (q->expert_ptr[e] + r0) * F;
        int64_t ldx;
        const REAL *X;
        if (t->role == MLI_DOWN) {
            X = FN(shared_side)(q, s, r, e, r0, nr, t->c0, t->nc, q->dy, r->dz, &ldx);
            MLI_TRY(FN(mli_product_tn)(dW + t->c0 * F, F, add, X, ldx, q->h + at, F, nr, t->nc, F));
        } else {
            const REAL *dinner = (t->role == MLI_GATE ? q->dgate : q->dup) + at + t->c0;
            X = FN(shared_side)(q, s, r, e, r0, nr, 0, k, q->in[t->role], r->z, &ldx);
            MLI_TRY(FN(mli_product_tn)(dW + t->c0 * k, k, add, dinner, F, X, ldx, nr, t->nc, k));
        }
    }
done:
    return rc;
}

/* Rows c0 .. of the gradient of a shared factor: latent rows, transposed, times the other side's
 * tokens; gauge form: columns of M alone. */
static molae_status
FN(shared_grad)(const FN(back) * b, const FN(scratch) * s, const mli_piece *t)
{
    const FN(job) *q = b->q;
    const FN(role) *r = &q->role[t->role];
    const molae_projection *p = r->p;
    const int64_t g = t->unit, R = p->rank[g], rows = r->ptr[g + 1] - r->ptr[g];
    const int gauge = p->form == MOLAE_FORM_GAUGE, down = t->role == MLI_DOWN;
    const int64_t width = gauge ? q->D - R : q->D;
    const REAL *src = down ? q->dy : q->in[t->role], *z = (down ? r->z : r->dz) + r->at[g] + t->c0;
    REAL *dB = FN(grads_of)(b->w->d, t->role)->shared[g] + t->c0 * width;
    molae_status rc = MOLAE_OK;

    for (int64_t r0 = 0; r0 == 0 || r0 < rows; r0 += MLI_ROWS) {
        const int64_t nr = MLI_MIN((int64_t)MLI_ROWS, rows - r0);
        const int64_t *token = r->tokens + r->ptr[g] + r0;
        const REAL *X = s->X;
        int64_t ldx = width;
        const FN(mli_rows) x = {src, q->D, nr, token};
        if (gauge)
            FN(mli_gather)(s->X, width, &x, p->perm[g] + R, width, &s->product);
        else
            X = FN(rows_of)(s->X, &ldx, src, q->D, token, nr, 0, q->D);
        MLI_TRY(FN(mli_product_tn)(dB, width, b->w->add || r0 > 0, z + r0 * R, R, X, ldx, nr, t->nc,
                                   width));
    }
done:
    return rc;
}

static void
FN(bias_grad)(const FN(back) * b, const mli_piece *t)
{
    const FN(job) *q = b->q;
    const int down = t->role == MLI_DOWN;
    const int64_t e = t->unit, cols = down ? q->D : q->F;
    REAL *db = FN(grads_of)(b->w->d, t->role)->bias + e * cols;

    if (!b->w->add)
        memset(db, 0, (size_t)cols * sizeof(REAL));
    for (int64_t i = q->expert_ptr[e]; i < q->expert_ptr[e + 1]; i++) {
        const int64_t slot = q->rows[i];
        const REAL w = down ? q->weight[slot] : 1;
        const REAL *from = down ? q->dy + slot / q->K * cols
                                : (t->role == MLI_GATE ? q->dgate : q->dup) + i * cols;
        for (int64_t j = 0; j < cols; j++)
            db[j] += w * from[j];
    }
}

static molae_status
FN(grad_task)(void *arg, int64_t index, int32_t worker)
{
    const FN(back) *b = arg;
    const mli_piece *t = &b->q->pieces.at[index];
    const FN(scratch) *s = &b->q->scratch[worker];

    if (t->what == MLI_PRIVATE)
        return FN(private_grad)(b, s, t);
    if (t->what == MLI_SHARED)
        return FN(shared_grad)(b, s, t);
    FN(bias_grad)(b, t);
    return MOLAE_OK;
}

static void
FN(grad_pieces)(FN(job) * q, const FN(wants) * w)
{
    q->pieces.n = 0;
    for (int role = 0; role < MLI_ROLES; role++) {
        const FN(molae_projection_grads) *d = FN(grads_of)(w->d, role);
        const FN(role) *r = &q->role[role];
        mli_piece t = {.role = role};
        for (int64_t e = 0; e < q->E; e++) {
            const int64_t R = mli_rank(r->p, e), rows = q->expert_ptr[e + 1] - q->expert_ptr[e];
            if (rows == 0 && w->add)
                continue;
            t.unit = e;
            t.what = MLI_PRIVATE;
            t.nc = role != MLI_DOWN ? q->F : (R < 0 ? q->D : R);
            if (R != 0 && d->private_ != NULL && d->private_[e] != NULL)
                mli_pieces_cut(&q->pieces, (t.nr = 1, t), 1, FN(cols)(rows));
            t.what = MLI_BIAS;
            if (d->bias != NULL)
                mli_pieces_add(&q->pieces, t);
        }
        t.what = MLI_SHARED;
        for (int64_t g = 0; w->shared[role] && g < r->p->G; g++)
            if (r->p->rank[g] > 0 && d->shared[g] != NULL &&
                (!w->add || r->ptr[g] < r->ptr[g + 1])) {
                t.unit = g;
                t.nr = 1;
                t.nc = r->p->rank[g];
                mli_pieces_cut(&q->pieces, t, 1, FN(cols)(r->ptr[g + 1] - r->ptr[g]));
            }
    }
}

/* ----------------------------------------------------------------- the whole */

static molae_status
FN(backward_chunk)(const molae_ctx *ctx, FN(job) * q, const FN(wants) * w, REAL *dx)
{
    FN(phase) ph = {.q = q, .in = {NULL, NULL, q->dy}};
    FN(back) b = {q, w};
    molae_status rc = MOLAE_OK;

    ph.z[MLI_DOWN] = q->role[MLI_DOWN].dz;
    q->pieces.n = 0;
    if (w->dh || w->private_[MLI_DOWN])
        FN(project_pieces)(q, MLI_DOWN);
    MLI_TRY(mli_parallel_for(ctx, q->pieces.n, FN(project_task), &ph));
    if (w->dh || w->private_[MLI_DOWN]) {
        FN(expert_pieces)(q);
        MLI_TRY(mli_parallel_for(ctx, q->pieces.n, FN(expert_back_task), &b));
    }
    if (w->d->dweight != NULL)
        MLI_TRY(mli_parallel_for(ctx, mli_ceil_div(q->expert_ptr[q->E], MLI_ROWS), FN(dweight_task),
                                 &b));
    for (int role = MLI_GATE; role <= MLI_UP; role++) {
        REAL *to = w->vectors ? (role == MLI_GATE ? q->ce.dx_gate : q->ce.dx_up) : dx;
        REAL *z = to != NULL || w->shared[role] ? q->role[role].dz : NULL;
        MLI_TRY(FN(combine)(ctx, q, role, role == MLI_GATE ? q->dgate : q->dup, z, to));
        if (to != NULL)
            MLI_TRY(FN(lift)(ctx, q, role, z, to));
    }
    FN(grad_pieces)(q, w);
    MLI_TRY(mli_parallel_for(ctx, q->pieces.n, FN(grad_task), &b));
done:
    return rc;
}

size_t
FN(molae_experts_backward_ws)(const molae_ctx *ctx, const molae_experts *l, int64_t N, int64_t K)
{
    return FN(job_bytes)(ctx, l, N, K, 1);
}

molae_status
FN(molae_experts_backward)(const molae_ctx *ctx, const FN(molae_experts_grads) * d, const void *dy,
                           const FN(molae_experts_saved) * saved, const void *x,
                           const int64_t *index, const REAL *weight, const molae_experts *l,
                           int64_t N, int64_t K, void *ws, size_t ws_bytes, molae_errinfo *err)
{
    FN(job) q = {0};
    molae_status rc = FN(job_begin)(&q, ctx, l, N, K, 1, ws, ws_bytes, err);
    FN(wants) w;

    if (rc < 0)
        return rc;
    for (int64_t n0 = 0; n0 == 0 || n0 < N; n0 += MOLAE_EXPERTS_CHUNK) { /* N = 0 may set zeros */
        const int64_t n = MLI_MIN((int64_t)MOLAE_EXPERTS_CHUNK, N - n0);
        FN(molae_experts_grads) here = *d;
        here.dweight = d->dweight ? d->dweight + n0 * K : NULL;
        here.dx = d->dx ? d->dx + n0 * l->D : NULL;
        w = FN(wants_of)(l, &here);
        w.add |= n0 > 0;
        if (d->overwrite && d->dx != NULL)
            memset(d->dx + n0 * l->D, 0, (size_t)(n * l->D) * sizeof(REAL));
        if (n0 == 0 && d->overwrite && d->vectors != NULL)
            memset(d->vectors, 0, (size_t)(l->E * l->compressed.stride) * sizeof(REAL));
        if (d->overwrite && d->dweight != NULL) /* slots without an expert */
            memset(here.dweight, 0, (size_t)(n * K) * sizeof(REAL));
        q.x = FN(widened)(&q, x, n0 * l->D, n * l->D, q.x_wide);
        MLI_TRY(FN(chunk_begin)(ctx, &q, index + n0 * K, weight + n0 * K, n, err));
        q.dy = FN(widened)(&q, dy, n0 * l->D, n * l->D, q.y_wide);
        FN(job_saved)(&q, saved, n0);
        if (w.vectors)
            MLI_TRY(FN(compress_back_begin)(&q, err));
        MLI_TRY(FN(backward_chunk)(ctx, &q, &w, here.dx));
        if (w.vectors)
            MLI_TRY(FN(compress_back_end)(ctx, &q, &here));
    }
done:
    return rc;
}
