/* For one precision: products by loops, and layers, each array between guards. */
#include "../../csrc/base/real.h"

/* n random numbers in storage; what was stored goes to `exact`. */
static void *
FN(numbers)(int64_t n, molae_dtype dtype, uint64_t *seed, double *exact)
{
    const mli_kernels *kern = mli_kernels_named("ref");
    char *p = guarded((size_t)n * mli_item_size(dtype));

    for (int64_t i = 0; i < n; i++) {
        float v = (float)test_random(seed);
        if (dtype == MOLAE_BF16) {
            kern->f32_to_bf16((uint16_t *)(void *)p + i, &v, 1);
            (void)kern->bf16_to_f32(&v, (uint16_t *)(void *)p + i, 1);
        } else {
            ((REAL *)(void *)p)[i] = (REAL)v;
        }
        exact[i] = (double)v;
    }
    return p;
}

static void
FN(products)(molae_dtype dtype, int narrow)
{
    static const int64_t sizes[][3] = {{1, 1, 1},     {3, 5, 0},    {2, 257, 513},
                                       {16, 300, 40}, {17, 3, 700}, {512, 33, 40}};
    mli_product_scratch s = {0};

    for (size_t c = 0; c < sizeof sizes / sizeof *sizes; c++) {
        const int64_t n = sizes[c][0], r = sizes[c][1], k = sizes[c][2];
        for (int form = 0; form < 3; form++) { /* nt, nn, tn */
            const int64_t rows = form == 2 ? r : n, cols = form == 2 ? k : r,
                          in = form == 2 ? r : k;
            double *x = mli_alloc((size_t)(n * in) * sizeof *x);
            double *w = mli_alloc((size_t)(MLI_MAX(n, r) * k) * sizeof *w);
            uint64_t seed = 5;
            REAL *X = FN(numbers)(n * in, OWN, &seed, x);
            void *W = FN(numbers)(form == 2 ? n * k : r * k, form == 2 ? OWN : dtype, &seed, w);
            const size_t bytes =
                mli_product_cut(&s, NULL, dtype == MOLAE_F32, dtype == MOLAE_BF16, narrow, r, k);
            char *work = guarded(bytes), *cut = work;
            (void)mli_product_cut(&s, &cut, dtype == MOLAE_F32, dtype == MOLAE_BF16, narrow, r, k);
            for (int add = form == 2; add < 2; add++) {
                REAL *Y = guarded((size_t)(rows * cols) * sizeof(REAL));
                for (int64_t i = 0; add && i < rows * cols; i++)
                    Y[i] = 1;
                if (form == 0)
                    CHECK(FN(mli_product_nt)(Y, r, add, X, k, W, k, dtype, n, r, k, &s) == 0);
                else if (form == 1)
                    CHECK(FN(mli_product_nn)(Y, r, add, X, k, W, r, dtype, n, r, k, &s) == 0);
                else
                    CHECK(FN(mli_product_tn)(Y, k, 1, X, r, W, k, n, r, k) == 0);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < cols; j++) {
                        double sum = add;
                        for (int64_t l = 0; l < (form == 2 ? n : k); l++)
                            sum += form == 0   ? x[i * k + l] * w[j * k + l]
                                   : form == 1 ? x[i * k + l] * w[l * r + j]
                                               : x[l * r + i] * w[l * k + j];
                        CHECK(fabs(sum - (double)Y[i * cols + j]) <=
                              (EPS + (s.narrow ? 0x1p-9 : 0)) * (double)(MLI_MAX(n, k) + 1));
                    }
                unguard(Y);
            }
            unguard(X);
            unguard(W);
            unguard(work);
            mli_free(x);
            mli_free(w);
        }
    }
}

/* One projection with its storage, its gradients, and the dense matrices it stands for. */
typedef struct {
    molae_projection p;
    FN(molae_projection_grads) d;
    int64_t size[E], shared_size[MOST];
    const void *private_[E], *shared[MOST];
    const int32_t *perm[MOST];
    REAL *dprivate[E], *dshared[MOST];
    double *A[E], *W; /* as stored; (E, rows, cols) */
    void *blocks[2 * E + 3 * MOST];
    int n;
} FN(made);

static void
FN(make)(FN(made) * m, const layer_t *c, const parts_t *parts, int down, molae_dtype dtype,
         molae_form form, uint64_t *seed)
{
    const int64_t D = c->D, F = c->F;
    double *B[MOST] = {NULL};

    memset(m, 0, sizeof *m);
    m->W = mli_alloc((size_t)(E * D * F) * sizeof(double));
    for (int64_t g = 0; g < parts->G; g++) {
        const int64_t R = parts->rank[g], width = form == MOLAE_FORM_GAUGE ? D - R : D;
        double *stored;
        int32_t *perm;
        if (R < 1)
            continue;
        stored = mli_alloc((size_t)(R * width) * sizeof(double));
        m->shared[g] = m->blocks[m->n++] = FN(numbers)(R * width, dtype, seed, stored);
        m->shared_size[g] = R * width;
        m->dshared[g] = m->blocks[m->n++] = guarded((size_t)(R * width) * sizeof(REAL));
        m->perm[g] = perm = m->blocks[m->n++] = guarded((size_t)D * sizeof(int32_t));
        B[g] = mli_alloc((size_t)(R * D) * sizeof(double));
        for (int64_t j = 0; j < D; j++) /* a rotation is a permutation */
            perm[j] = (int32_t)((j + 3) % D);
        for (int64_t r = 0; r < R; r++)
            for (int64_t j = 0; j < D; j++)
                if (form == MOLAE_FORM_GAUGE)
                    B[g][r * D + perm[j]] = j < R ? (j == r) : stored[r * width + j - R];
                else
                    B[g][r * D + j] = stored[r * D + j];
        mli_free(stored);
    }
    for (int64_t e = 0; e < E; e++) {
        const int64_t g = parts->group_of[e], R = parts->rank[g], k = R < 0 ? D : R;
        double *W = m->W + e * D * F;
        m->size[e] = k * F;
        m->A[e] = mli_alloc((size_t)(k * F) * sizeof(double));
        m->private_[e] = m->blocks[m->n++] = FN(numbers)(k * F, dtype, seed, m->A[e]);
        m->dprivate[e] = m->blocks[m->n++] = guarded((size_t)(k * F) * sizeof(REAL));
        for (int64_t f = 0; f < F; f++)
            for (int64_t d = 0; d < D; d++) {
                double sum = R < 0 ? m->A[e][down ? d * F + f : f * D + d] : 0;
                for (int64_t r = 0; r < R; r++)
                    sum += m->A[e][down ? r * F + f : f * R + r] * B[g][r * D + d];
                W[down ? d * F + f : f * D + d] = sum;
            }
    }
    for (int64_t g = 0; g < MOST; g++)
        mli_free(B[g]);
    m->p = (molae_projection){
        dtype, form, parts->G, parts->group_of, parts->rank, m->private_, m->shared, m->perm, NULL};
    m->d = (FN(molae_projection_grads)){m->dprivate, m->dshared, NULL};
}

static void
FN(unmake)(FN(made) * m)
{
    for (int i = 0; i < m->n; i++)
        unguard(m->blocks[i]);
    for (int e = 0; e < E; e++)
        mli_free(m->A[e]);
    mli_free(m->W);
}

static void
FN(clear)(FN(made) * m)
{
    for (int e = 0; e < E; e++)
        memset(m->dprivate[e], 0, (size_t)m->size[e] * sizeof(REAL));
    for (int g = 0; g < MOST; g++)
        if (m->dshared[g] != NULL)
            memset(m->dshared[g], 0, (size_t)m->shared_size[g] * sizeof(REAL));
}

/* sum of dA * A over all experts: what the loss is if it is linear in A. */
static double
FN(along)(const FN(made) * m)
{
    double sum = 0;
    for (int e = 0; e < E; e++)
        for (int64_t i = 0; i < m->size[e]; i++)
            sum += (double)m->dprivate[e][i] * m->A[e][i];
    return sum;
}

static double
FN(gated)(double g, double u)
{
    return g / (1 + exp(-g)) * u;
}

/* The same layer with compressed experts: threads make no difference, nothing is read or written
 * astray, and the vectors have gradients. What is in dx is lost. */
static void
FN(compressed)(const molae_experts *layer, const REAL *dY, const FN(molae_experts_saved) * saved,
               const REAL *X, const int64_t *index, const REAL *weight, int64_t N, int64_t K,
               REAL *y, REAL *dx)
{
    const int64_t D = layer->D, F = layer->F, T = 2 * D + F, experts = layer->E;
    const size_t row = (size_t)(N * D) * sizeof(REAL), bytes = (size_t)(experts * T) * sizeof(REAL);
    FN(molae_experts_grads) grads = {.dx = dx, .overwrite = 1};
    REAL *vectors = guarded(bytes), *dvectors = guarded(bytes);
    REAL *first[3] = {guarded(row), guarded(row), guarded(bytes)};
    molae_experts l = *layer;
    molae_errinfo err;
    uint64_t seed = 91;

    for (int64_t i = 0; i < experts * T; i++)
        vectors[i] = (REAL)(1 + test_random(&seed) / 4);
    grads.vectors = dvectors;
    l.compressed = (molae_compressed){K - 1, vectors, OWN, T, D, D + F};
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        const molae_ctx ctx = {threads, NULL};
        const size_t fb = FN(molae_experts_forward_ws)(&ctx, &l, N, K);
        const size_t bb = FN(molae_experts_backward_ws)(&ctx, &l, N, K);
        void *ws = guarded(fb);
        double sum = 0;
        int any = 0;
        CHECK(FN(molae_experts_forward)(&ctx, y, saved, X, index, weight, &l, N, K, ws, fb, &err) ==
              MOLAE_OK);
        unguard(ws);
        ws = guarded(bb);
        CHECK(FN(molae_experts_backward)(&ctx, &grads, dY, saved, X, index, weight, &l, N, K, ws,
                                         bb, &err) == MOLAE_OK);
        unguard(ws);
        for (int64_t i = 0; i < experts * T; i++)
            sum += fabs((double)dvectors[i]);
        for (int64_t i = 0; i < N * D; i++)
            any |= y[i] != 0;
        CHECK(isfinite(sum) && (sum > 0) == any); /* rank 0 gives nothing */
        if (threads == 1) {
            memcpy(first[0], y, row);
            memcpy(first[1], dx, row);
            memcpy(first[2], dvectors, bytes);
        }
        CHECK(memcmp(first[0], y, row) == 0 && memcmp(first[1], dx, row) == 0);
        CHECK(memcmp(first[2], dvectors, bytes) == 0);
        l.compressed.n = K;
        CHECK(FN(molae_experts_forward)(&ctx, y, NULL, X, index, weight, &l, N, K, first[0], fb,
                                        &err) == MOLAE_E_ARG);
        l.compressed.n = K - 1;
    }
    for (int i = 0; i < 3; i++)
        unguard(first[i]);
    unguard(vectors);
    unguard(dvectors);
}

static void
FN(layer)(const layer_t *c, molae_dtype dtype, molae_form form)
{
    const int64_t N = c->N, K = c->K, D = c->D, F = c->F, S = N * K;
    uint64_t seed = 77;
    FN(made) gate, up, down;
    double *x = mli_alloc((size_t)(N * D) * sizeof *x), *w = mli_alloc((size_t)S * sizeof *w);
    double *dyx = mli_alloc((size_t)(N * D) * sizeof *x), *h = mli_alloc((size_t)F * sizeof *h);
    double loss = 0, size = 0, by_weight = 0;
    const size_t row = (size_t)(N * D) * mli_item_size(OWN);
    REAL *X = FN(numbers)(N * D, OWN, &seed, x), *weight = FN(numbers)(S, OWN, &seed, w);
    REAL *dY = FN(numbers)(N * D, OWN, &seed, dyx), *y = guarded(row), *first = guarded(row);
    REAL *dx = guarded(row), *dweight = guarded((size_t)S * sizeof(REAL));
    int64_t *index = guarded((size_t)S * sizeof(int64_t));
    molae_errinfo err;
    molae_experts l = {E, D, F, OWN, MOLAE_ACT_SILU, 0, 0, {0}, {0}, {0}, {0}};
    FN(molae_experts_saved) saved;
    FN(molae_experts_grads) grads;

    FN(make)(&gate, c, &c->gate, 0, dtype, form, &seed);
    FN(make)(&up, c, &c->up, 0, dtype, form, &seed);
    FN(make)(&down, c, &c->down, 1, dtype, form, &seed);
    l.gate = gate.p;
    l.up = up.p;
    l.down = down.p;
    for (int64_t i = 0; i < S; i++) /* an uneven routing with sentinels */
        index[i] = (i * i + i / 3) % 7 % (E + 1);
    saved.gate = guarded((size_t)(S * F) * sizeof(REAL));
    saved.up = guarded((size_t)(S * F) * sizeof(REAL));
    saved.z_gate = guarded((size_t)(N * molae_projection_width(&l.gate, K)) * sizeof(REAL));
    saved.z_up = guarded((size_t)(N * molae_projection_width(&l.up, K)) * sizeof(REAL));
    saved.u = guarded((size_t)(N * molae_projection_width(&l.down, K)) * sizeof(REAL));
    saved.known = 0;
    grads = (FN(molae_experts_grads)){dx, dweight, gate.d, up.d, down.d, NULL, 0};

    for (int32_t threads = 1; threads <= 3; threads += 2) {
        const molae_ctx ctx = {threads, NULL};
        const size_t fb = FN(molae_experts_forward_ws)(&ctx, &l, N, K);
        const size_t bb = FN(molae_experts_backward_ws)(&ctx, &l, N, K);
        void *ws = guarded(fb);
        CHECK(FN(molae_experts_forward)(&ctx, y, threads > 1 ? NULL : &saved, X, index, weight, &l,
                                        N, K, ws, fb, &err) == MOLAE_OK);
        CHECK(FN(molae_experts_forward)(&ctx, y, NULL, X, index, weight, &l, N, K, ws, fb - 1,
                                        &err) == MOLAE_E_ARG);
        if (threads == 1)
            memcpy(first, y, row);
        CHECK(memcmp(first, y, row) == 0);
        for (saved.known = 1; saved.known < 8; saved.known++) { /* makes no difference */
            CHECK(FN(molae_experts_forward)(&ctx, y, &saved, X, index, weight, &l, N, K, ws, fb,
                                            &err) == MOLAE_OK);
            CHECK(memcmp(first, y, row) == 0);
        }
        saved.known = 0;
        unguard(ws);
        ws = guarded(bb);
        grads.overwrite = threads > 1; /* what the first round left */
        if (!grads.overwrite) {
            memset(dx, 0, row);
            memset(dweight, 0, (size_t)S * sizeof(REAL));
            FN(clear)(&gate);
            FN(clear)(&up);
            FN(clear)(&down);
        }
        CHECK(FN(molae_experts_backward)(&ctx, &grads, dY, &saved, X, index, weight, &l, N, K, ws,
                                         bb, &err) == MOLAE_OK);
        CHECK(FN(molae_experts_backward)(&ctx, &grads, dY, &saved, X, index, weight, &l, N, K, ws,
                                         bb - 1, &err) == MOLAE_E_ARG);
        unguard(ws);
    }

    if (K > 1)
        FN(compressed)(&l, dY, &saved, X, index, weight, N, K, y, dx);

    for (int64_t t = 0; t < N; t++) {
        for (int64_t k = 0; k < K; k++) {
            const int64_t s = t * K + k, e = index[s];
            if (e == E) {
                CHECK(dweight[s] == 0);
                continue;
            }
            for (int64_t f = 0; f < F; f++) {
                double g = 0, u = 0;
                for (int64_t d = 0; d < D; d++) {
                    g += gate.W[(e * F + f) * D + d] * x[t * D + d];
                    u += up.W[(e * F + f) * D + d] * x[t * D + d];
                }
                h[f] = FN(gated)(g, u);
            }
            by_weight += w[s] * (double)dweight[s];
            for (int64_t d = 0; d < D; d++) {
                double sum = 0, terms = 0;
                for (int64_t f = 0; f < F; f++) {
                    sum += w[s] * down.W[(e * D + d) * F + f] * h[f];
                    terms += fabs(down.W[(e * D + d) * F + f] * h[f]);
                }
                first[t * D + d] -= (REAL)sum; /* what stays is the error */
                loss += dyx[t * D + d] * sum;
                size += terms * (double)(D + 4);
            }
        }
    }
    for (int64_t i = 0; i < N * D; i++)
        CHECK(fabs((double)first[i]) <= 64 * EPS * (size + 1));
    /* the loss is linear in the routing weights, in down and in up */
    CHECK(fabs(by_weight - loss) <= 64 * EPS * (size + 1));
    CHECK(fabs(FN(along)(&down) - loss) <= 64 * EPS * (size + 1));
    CHECK(fabs(FN(along)(&up) - loss) <= 64 * EPS * (size + 1));
    for (int64_t i = 0; i < N * D; i++)
        CHECK(isfinite((double)dx[i]));

    FN(unmake)(&gate);
    FN(unmake)(&up);
    FN(unmake)(&down);
    unguard(X);
    unguard(weight);
    unguard(dY);
    unguard(y);
    unguard(first);
    unguard(dx);
    unguard(dweight);
    unguard(index);
    unguard(saved.gate);
    unguard(saved.up);
    unguard(saved.z_gate);
    unguard(saved.z_up);
    unguard(saved.u);
    mli_free(x);
    mli_free(w);
    mli_free(dyx);
    mli_free(h);
}
