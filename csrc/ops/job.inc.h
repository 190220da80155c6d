/* A call at work on a chunk of tokens, for one precision. N and S = N K are the chunk's. */

/* One of gate, up and down. */
typedef struct {
    const molae_projection *p;
    int64_t width;                 /* latent numbers a token, at most */
    int64_t *latent_of;            /* (E,): group, or -1 where it has no latent numbers */
    int64_t *member_ptr, *members; /* (G+1), (E): experts of each group, ascending */
    int64_t *ptr, *tokens;         /* (G+1), (min(S, N G)): each group's tokens, ascending */
    int64_t *slot_row;             /* (S,): which of them a slot's token is */
    int64_t *at;                   /* (G,): where the group's latent rows begin in z */
    REAL *z;                       /* (N,width): gate, up: x B^T; down: u, the sum that B^T lifts */
    REAL *dz;                      /* (N,width): its cotangent */
} FN(role);

/* What a worker has to itself. */
typedef struct {
    REAL *X;     /* (MLI_ROWS, D): gathered rows */
    REAL *Y, *Z; /* (MLI_ROWS, MLI_COARSE + MLI_PAD): products */
    REAL *line;  /* (MLI_COARSE,): a piece of a bias */
    mli_product_scratch product;
    int64_t *row; /* (MLI_ROWS,): numbers of rows to gather */
} FN(scratch);

/* Of compressed experts; see compressed.inc.h. */
typedef struct {
    int64_t *main, *aux; /* (S,): index of the slots that run, and of the others; else E */
    REAL *share;         /* (S,): of the others */
    REAL *sum;           /* (N,): of their weights */
    int64_t *met;        /* (N,): how many they are, without sentinels */
    REAL *theta;         /* (N,T): the token's vectors, T = 2 D + F */
    REAL *x_gate, *x_up; /* (N,D): x by the first, and by the third */
    REAL *room;          /* (workers,SUMMED,T): experts' vectors, widened or moved together */
    REAL *whole;         /* (E,T): the same of all experts, where many are used */
    int has_whole;
    int64_t *row_of;       /* (S,): the row of a slot that runs */
    int64_t *ptr, *rows;   /* (E+1), (S,): slots of the others by expert; see molae_route */
    REAL *dtheta;          /* (N,T) */
    REAL *dshare;          /* (S,) */
    REAL *dscale;          /* (S,F): of theta2, row by row */
    REAL *dx_gate, *dx_up; /* (N,D) */
} FN(compressed);

typedef struct {
    const molae_experts *l;
    int64_t N, K, E, D, F;
    int backward;
    mli_act act;
    const int64_t *index;
    const REAL *weight; /* (S,) */
    const REAL *x, *dy; /* (N,D) */
    const REAL *in[2];  /* (N,D): what gate and up read of x */
    const REAL *scale;  /* (N,F), rows 2 D + F apart: of the intermediate; or NULL */
    FN(compressed) ce;
    REAL *y;                    /* (N,D) */
    REAL *x_wide, *y_wide;      /* (N,D): x, and y or dy, where io is narrower */
    int64_t *expert_ptr, *rows; /* (E+1), (S,): see molae_route */
    void *route_ws;
    size_t route_bytes;
    REAL *gate, *up;   /* (S,F): what forward saved, or NULL */
    int known;         /* of that: see molae_experts_known */
    REAL *h;           /* (S,F); in backward times the routing weight */
    REAL *dgate, *dup; /* (S,F) */
    REAL *partial;     /* (S,blocks): sums of h dh over blocks of columns */
    int64_t blocks;
    REAL *lifted; /* rows of at most D, for MLI_LIFT tokens */
    FN(role) role[MLI_ROLES];
    FN(scratch) * scratch; /* (workers,) */
    mli_pieces pieces;
} FN(job);

/* The pieces of a job of at most N tokens. With p == NULL it only adds up their size. */
static size_t
FN(job_cut)(FN(job) * q, char **p, const molae_experts *l, int64_t N, int64_t K, int backward,
            int64_t workers)
{
    const size_t E = (size_t)l->E, D = (size_t)l->D, F = (size_t)l->F, T = (size_t)workers;
    const size_t tokens = (size_t)N, S = mli_size_mul(tokens, (size_t)K);
    const size_t rows = mli_size_mul(S, F), blocks = (size_t)mli_ceil_div(l->F, MLI_FINE);
    const size_t wide = l->io == OWN ? 0 : mli_size_mul(tokens, D);
    const int64_t most = MLI_MAX(MLI_MAX(l->gate.G, l->up.G), l->down.G);
    const size_t lift = (size_t)(MLI_MIN(N, (int64_t)MLI_LIFT) * MLI_MIN(K, most));
    const int bf16 =
        l->gate.dtype == MOLAE_BF16 || l->up.dtype == MOLAE_BF16 || l->down.dtype == MOLAE_BF16;
    const int f32 =
        l->gate.dtype == MOLAE_F32 || l->up.dtype == MOLAE_F32 || l->down.dtype == MOLAE_F32;
    size_t n = 0;

    q->route_bytes = molae_route_groups_ws(most);
    q->blocks = (int64_t)blocks;
    q->pieces.room = mli_pieces_room(l, N, K);
    MLI_CUT(n, p, q->x_wide, wide, sizeof(REAL));
    MLI_CUT(n, p, q->y_wide, wide, sizeof(REAL));
    MLI_CUT(n, p, q->expert_ptr, E + 1, sizeof(int64_t));
    MLI_CUT(n, p, q->rows, S, sizeof(int64_t));
    MLI_CUT(n, p, q->route_ws, q->route_bytes, 1);
    MLI_CUT(n, p, q->h, rows, sizeof(REAL));
    MLI_CUT(n, p, q->dgate, backward ? rows : 0, sizeof(REAL));
    MLI_CUT(n, p, q->dup, backward ? rows : 0, sizeof(REAL));
    MLI_CUT(n, p, q->partial, backward ? mli_size_mul(S, blocks) : 0, sizeof(REAL));
    MLI_CUT(n, p, q->lifted, mli_size_mul(lift, D), sizeof(REAL));
    if (l->compressed.n > 0) {
        FN(compressed) *c = &q->ce;
        const size_t wide_x = mli_size_mul(tokens, D), back = backward != 0;
        const size_t theta = mli_size_mul(tokens, mli_size_add(mli_size_mul(2, D), F));
        MLI_CUT(n, p, c->main, S, sizeof(int64_t));
        MLI_CUT(n, p, c->aux, S, sizeof(int64_t));
        MLI_CUT(n, p, c->share, S, sizeof(REAL));
        MLI_CUT(n, p, c->sum, tokens, sizeof(REAL));
        MLI_CUT(n, p, c->met, tokens, sizeof(int64_t));
        MLI_CUT(n, p, c->theta, theta, sizeof(REAL));
        MLI_CUT(n, p, c->x_gate, wide_x, sizeof(REAL));
        MLI_CUT(n, p, c->x_up, wide_x, sizeof(REAL));
        MLI_CUT(n, p, c->room, mli_size_mul(MLI_SUMMED * T, mli_size_add(mli_size_mul(2, D), F)),
                sizeof(REAL));
        MLI_CUT(n, p, c->whole, mli_size_mul((size_t)l->E, mli_size_add(mli_size_mul(2, D), F)),
                sizeof(REAL));
        MLI_CUT(n, p, c->row_of, back * S, sizeof(int64_t));
        MLI_CUT(n, p, c->ptr, back * (E + 1), sizeof(int64_t));
        MLI_CUT(n, p, c->rows, back * S, sizeof(int64_t));
        MLI_CUT(n, p, c->dtheta, back * theta, sizeof(REAL));
        MLI_CUT(n, p, c->dshare, back * S, sizeof(REAL));
        MLI_CUT(n, p, c->dscale, back * rows, sizeof(REAL));
        MLI_CUT(n, p, c->dx_gate, back * wide_x, sizeof(REAL));
        MLI_CUT(n, p, c->dx_up, back * wide_x, sizeof(REAL));
    }
    for (int i = 0; i < MLI_ROLES; i++) {
        FN(role) *r = &q->role[i];
        const size_t G = (size_t)mli_projection(l, i)->G;
        size_t width;
        r->width = molae_projection_width(mli_projection(l, i), K);
        width = mli_size_mul(tokens, (size_t)r->width);
        MLI_CUT(n, p, r->latent_of, E, sizeof(int64_t));
        MLI_CUT(n, p, r->member_ptr, G + 1, sizeof(int64_t));
        MLI_CUT(n, p, r->members, E, sizeof(int64_t));
        MLI_CUT(n, p, r->ptr, G + 1, sizeof(int64_t));
        MLI_CUT(n, p, r->tokens, mli_size_mul(tokens, (size_t)MLI_MIN(K, (int64_t)G)),
                sizeof(int64_t));
        MLI_CUT(n, p, r->slot_row, S, sizeof(int64_t));
        MLI_CUT(n, p, r->at, G, sizeof(int64_t));
        MLI_CUT(n, p, r->z, backward ? 0 : width, sizeof(REAL));
        MLI_CUT(n, p, r->dz, backward ? width : 0, sizeof(REAL));
    }
    MLI_CUT(n, p, q->pieces.at, (size_t)q->pieces.room, sizeof(mli_piece));
    MLI_CUT(n, p, q->scratch, T, sizeof(FN(scratch)));
    for (size_t t = 0; t < T; t++) {
        FN(scratch) none, *s = p ? &q->scratch[t] : &none;
        MLI_CUT(n, p, s->X, mli_size_mul(MLI_ROWS, D), sizeof(REAL));
        MLI_CUT(n, p, s->Y, MLI_ROWS * (MLI_COARSE + MLI_PAD), sizeof(REAL));
        MLI_CUT(n, p, s->Z, MLI_ROWS * (MLI_COARSE + MLI_PAD), sizeof(REAL));
        MLI_CUT(n, p, s->line, MLI_COARSE, sizeof(REAL));
        n = mli_size_add(n, mli_product_cut(&s->product, p, f32, bf16, l->io == MOLAE_BF16,
                                            MLI_MAX(l->D, l->F), MLI_MAX(l->D, l->F)));
        MLI_CUT(n, p, s->row, MLI_ROWS, sizeof(int64_t));
    }
    return n;
}

static size_t
FN(job_bytes)(const molae_ctx *ctx, const molae_experts *l, int64_t N, int64_t K, int backward)
{
    molae_errinfo err;
    FN(job) q;

    if (mli_experts_check(l, OWN, N, K, &err) < 0)
        return 0; /* the call itself says what is wrong */
    return FN(job_cut)(&q, NULL, l, MLI_MIN(N, (int64_t)MOLAE_EXPERTS_CHUNK), K, backward,
                       ctx->num_threads);
}

/* Checks, cuts the workspace, and prepares what no chunk changes. */
static molae_status
FN(job_begin)(FN(job) * q, const molae_ctx *ctx, const molae_experts *l, int64_t N, int64_t K,
              int backward, void *ws, size_t ws_bytes, molae_errinfo *err)
{
    const molae_status rc = mli_experts_check(l, OWN, N, K, err);
    char *p = ws;

    if (rc < 0)
        return rc;
    if (ws_bytes < FN(job_bytes)(ctx, l, N, K, backward)) {
        err->what = "ws: too small";
        return MOLAE_E_ARG;
    }
    (void)FN(job_cut)(q, &p, l, MLI_MIN(N, (int64_t)MOLAE_EXPERTS_CHUNK), K, backward,
                      ctx->num_threads);
    q->l = l;
    q->K = K;
    q->E = l->E;
    q->D = l->D;
    q->F = l->F;
    q->backward = backward;
    q->act = (mli_act){l->activation, l->alpha, l->limit};
    for (int i = 0; i < MLI_ROLES; i++) {
        FN(role) *r = &q->role[i];
        int64_t n = 0;
        r->p = mli_projection(l, i);
        for (int64_t e = 0; e < l->E; e++)
            r->latent_of[e] = mli_rank(r->p, e) > 0 ? mli_group(r->p, e) : -1;
        for (int64_t g = 0; g < r->p->G; g++) {
            r->member_ptr[g] = n;
            for (int64_t e = 0; r->p->rank[g] > 0 && e < l->E; e++)
                if (r->latent_of[e] == g)
                    r->members[n++] = e;
        }
        r->member_ptr[r->p->G] = n;
    }
    return MOLAE_OK;
}

/* Routes a chunk of q->N tokens. */
static molae_status
FN(job_route)(FN(job) * q, const int64_t *index, const REAL *weight, molae_errinfo *err)
{
    const int64_t N = q->N, K = q->K;
    molae_status rc;

    q->index = index;
    q->weight = weight;
    rc = molae_route(q->expert_ptr, q->rows, q->index, N, K, q->E, err);
    for (int i = 0; rc >= 0 && i < MLI_ROLES; i++) {
        FN(role) *r = &q->role[i];
        int64_t at = 0;
        if (r->width == 0)
            continue;
        rc = molae_route_groups(r->ptr, r->tokens, r->slot_row, q->index, r->latent_of, N, K, q->E,
                                r->p->G, q->route_ws, q->route_bytes, err);
        for (int64_t g = 0; rc >= 0 && g < r->p->G; g++) {
            r->at[g] = at;
            at += (r->ptr[g + 1] - r->ptr[g]) * MLI_MAX(r->p->rank[g], 0);
        }
    }
    return rc;
}

/* What forward saves, or has saved, of the tokens from n0 on. */
static void
FN(job_saved)(FN(job) * q, const FN(molae_experts_saved) * saved, int64_t n0)
{
    q->gate = saved->gate + n0 * q->K * q->F;
    q->up = saved->up + n0 * q->K * q->F;
    q->role[MLI_GATE].z = saved->z_gate + n0 * q->role[MLI_GATE].width;
    q->role[MLI_UP].z = saved->z_up + n0 * q->role[MLI_UP].width;
    q->role[MLI_DOWN].z = saved->u + n0 * q->role[MLI_DOWN].width;
}

/* n numbers of type io, from number `at` on, as REAL: in place, or widened into `wide`. */
static const REAL *
FN(widened)(const FN(job) * q, const void *x, int64_t at, int64_t n, REAL *wide)
{
    if (q->l->io == OWN)
        return (const REAL *)x + at;
#if NARROW_STORAGE
    (void)mli_kernels_get()->bf16_to_f32(wide, (const uint16_t *)x + at, n);
#else
    (void)n;
#endif
    return wide;
}

/* Columns c0 .. c0+nc-1 of an expert's bias, or NULL. */
static const REAL *
FN(bias_piece)(const molae_projection *p, int64_t e, int64_t cols, int64_t c0, int64_t nc,
               REAL *line)
{
    if (p->bias == NULL)
        return NULL;
    if (p->dtype == OWN)
        return (const REAL *)p->bias + e * cols + c0;
#if NARROW_STORAGE
    (void)mli_kernels_get()->bf16_to_f32(line, (const uint16_t *)p->bias + e * cols + c0, nc);
#else
    (void)nc;
#endif
    return line;
}

/* Rows src[row[i]], columns c0 .. c0+nc-1, of a matrix with ld columns: where they are if they
 * follow each other, else gathered into X. *ldx is the result's leading dimension. */
static const REAL *
FN(rows_of)(REAL *X, int64_t *ldx, const REAL *src, int64_t ld, const int64_t *row, int64_t nr,
            int64_t c0, int64_t nc)
{
    int64_t i = 1;

    while (i < nr && row[i] == row[0] + i)
        i++;
    if (i >= nr) {
        *ldx = ld;
        return src + (nr > 0 ? row[0] : 0) * ld + c0;
    }
    *ldx = nc;
    for (i = 0; i < nr; i++)
        memcpy(X + i * nc, src + row[i] * ld + c0, (size_t)nc * sizeof(REAL));
    return X;
}

/* For nr rows of expert e, from r0 of its own on: the rows that its matrix of this role meets on
 * the shared side, tokens' rows of `wide` (N,D) where dense, else rows of z. Columns c0 .. */
static const REAL *
FN(shared_side)(const FN(job) * q, const FN(scratch) * s, const FN(role) * r, int64_t e, int64_t r0,
                int64_t nr, int64_t c0, int64_t nc, const REAL *wide, const REAL *z, int64_t *ldx)
{
    const int64_t *slot = q->rows + q->expert_ptr[e] + r0;
    const int64_t R = mli_rank(r->p, e);

    if (R < 0) {
        for (int64_t i = 0; i < nr; i++)
            s->row[i] = slot[i] / q->K;
        return FN(rows_of)(s->X, ldx, wide, q->D, s->row, nr, c0, nc);
    }
    for (int64_t i = 0; i < nr; i++)
        s->row[i] = r->slot_row[slot[i]];
    return FN(rows_of)(s->X, ldx, z + r->at[mli_group(r->p, e)], R, s->row, nr, c0, nc);
}
