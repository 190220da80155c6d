/* The routines for one precision: included by blas.c with REAL, SFX and P (s or d) set. */

#define CBLAS(name) SYM(JOIN3(cblas_, P, name))
#define LAPACK(name) SYM(JOIN3(P, name, _))

/* ------------------------------------------------------------ prototypes */

void CBLAS(gemm)(int order, int transa, int transb, blasint m, blasint n, blasint k, REAL alpha,
                 const REAL *a, blasint lda, const REAL *b, blasint ldb, REAL beta, REAL *c,
                 blasint ldc);
void CBLAS(syrk)(int order, int uplo, int trans, blasint n, blasint k, REAL alpha, const REAL *a,
                 blasint lda, REAL beta, REAL *c, blasint ldc);
void CBLAS(syr2k)(int order, int uplo, int trans, blasint n, blasint k, REAL alpha, const REAL *a,
                  blasint lda, const REAL *b, blasint ldb, REAL beta, REAL *c, blasint ldc);
void CBLAS(gemv)(int order, int trans, blasint m, blasint n, REAL alpha, const REAL *a, blasint lda,
                 const REAL *x, blasint incx, REAL beta, REAL *y, blasint incy);
void CBLAS(trsm)(int order, int side, int uplo, int trans, int diag, blasint m, blasint n,
                 REAL alpha, const REAL *a, blasint lda, REAL *b, blasint ldb);
void CBLAS(trmm)(int order, int side, int uplo, int trans, int diag, blasint m, blasint n,
                 REAL alpha, const REAL *a, blasint lda, REAL *b, blasint ldb);
void LAPACK(sygst)(const blasint *itype, const char *uplo, const blasint *n, REAL *a,
                   const blasint *lda, const REAL *b, const blasint *ldb, blasint *info,
                   size_t uplo_len);
void LAPACK(potrf)(const char *uplo, const blasint *n, REAL *a, const blasint *lda, blasint *info,
                   size_t uplo_len);
void LAPACK(pstrf)(const char *uplo, const blasint *n, REAL *a, const blasint *lda, blasint *piv,
                   blasint *rank, const REAL *tol, REAL *work, blasint *info, size_t uplo_len);
void LAPACK(gesv)(const blasint *n, const blasint *nrhs, REAL *a, const blasint *lda, blasint *ipiv,
                  REAL *b, const blasint *ldb, blasint *info);
void LAPACK(sterf)(const blasint *n, REAL *d, REAL *e, blasint *info);
void LAPACK(stedc)(const char *compz, const blasint *n, REAL *d, REAL *e, REAL *z,
                   const blasint *ldz, REAL *work, const blasint *lwork, blasint *iwork,
                   const blasint *liwork, blasint *info, size_t compz_len);
void LAPACK(laed2)(blasint *k, const blasint *n, const blasint *n1, REAL *d, REAL *q,
                   const blasint *ldq, blasint *indxq, REAL *rho, REAL *z, REAL *dlamda, REAL *w,
                   REAL *q2, blasint *places, blasint *indxc, blasint *indxp, blasint *coltyp,
                   blasint *info);
void LAPACK(laed4)(const blasint *n, const blasint *i, const REAL *d, const REAL *z, REAL *delta,
                   const REAL *rho, REAL *dlam, blasint *info);
void LAPACK(geqp3)(const blasint *m, const blasint *n, REAL *a, const blasint *lda, blasint *jpvt,
                   REAL *tau, REAL *work, const blasint *lwork, blasint *info);
void LAPACK(gelqf)(const blasint *m, const blasint *n, REAL *a, const blasint *lda, REAL *tau,
                   REAL *work, const blasint *lwork, blasint *info);
void LAPACK(gesdd)(const char *jobz, const blasint *m, const blasint *n, REAL *a,
                   const blasint *lda, REAL *s, REAL *u, const blasint *ldu, REAL *vt,
                   const blasint *ldvt, REAL *work, const blasint *lwork, blasint *iwork,
                   blasint *info, size_t jobz_len);

/* Length of a work array: what LAPACK asks for, at least the documented minimum; SIZE_MAX where
 * an int32 cannot hold it. LAPACK answers in a REAL, which may round a long length down. */
static size_t
FN(work_length)(REAL asked, size_t least)
{
    double want = (double)asked * (1.0 + (sizeof(REAL) == 4 ? 0x1p-23 : 0.0));
    if (want > (double)least)
        least = want < (double)INT32_MAX ? (size_t)want : (size_t)SIZE_MAX;
    return least <= (size_t)INT32_MAX ? least : SIZE_MAX;
}

/* ------------------------------------------------------------------ BLAS */

molae_status
FN(mli_gemm)(int ta, int tb, int64_t m, int64_t n, int64_t k, REAL alpha, const REAL *A,
             int64_t lda, const REAL *B, int64_t ldb, REAL beta, REAL *C, int64_t ldc)
{
    if (!fits(m) || !fits(n) || !fits(k) || !fits(lda) || !fits(ldb) || !fits(ldc))
        return out_of_range(m, n, k);
    if (m == 0 || n == 0)
        return MOLAE_OK;
    if (lda < (ta ? m : k) || ldb < (tb ? k : n) || ldc < n)
        return MOLAE_E_ARG;
    CBLAS(gemm)(ROW_MAJOR, ta ? TRANS : NO_TRANS, tb ? TRANS : NO_TRANS, (blasint)m, (blasint)n,
                (blasint)k, alpha, A, at_least_1(lda), B, at_least_1(ldb), beta, C, (blasint)ldc);
    return MOLAE_OK;
}

molae_status
FN(mli_syrk)(int trans, int64_t n, int64_t k, REAL alpha, const REAL *A, int64_t lda, REAL beta,
             REAL *C, int64_t ldc)
{
    if (!fits(n) || !fits(k) || !fits(lda) || !fits(ldc))
        return out_of_range(n, k, 0);
    if (n == 0)
        return MOLAE_OK;
    if (lda < (trans ? n : k) || ldc < n)
        return MOLAE_E_ARG;
    CBLAS(syrk)(ROW_MAJOR, UPPER, trans ? TRANS : NO_TRANS, (blasint)n, (blasint)k, alpha, A,
                at_least_1(lda), beta, C, (blasint)ldc);
    return MOLAE_OK;
}

molae_status
FN(mli_syr2k)(int64_t n, int64_t k, REAL alpha, const REAL *A, int64_t lda, const REAL *B,
              int64_t ldb, REAL beta, REAL *C, int64_t ldc)
{
    if (!fits(n) || !fits(k) || !fits(lda) || !fits(ldb) || !fits(ldc))
        return out_of_range(n, k, 0);
    if (n == 0)
        return MOLAE_OK;
    if (lda < n || ldb < n || ldc < n)
        return MOLAE_E_ARG;
    CBLAS(syr2k)(ROW_MAJOR, UPPER, TRANS, (blasint)n, (blasint)k, alpha, A, (blasint)lda, B,
                 (blasint)ldb, beta, C, (blasint)ldc);
    return MOLAE_OK;
}

molae_status
FN(mli_gemv)(int trans, int64_t m, int64_t n, REAL alpha, const REAL *A, int64_t lda, const REAL *x,
             REAL beta, REAL *y)
{
    if (!fits(m) || !fits(n) || !fits(lda))
        return out_of_range(m, n, 0);
    if (m == 0 || n == 0)
        return MOLAE_OK;
    if (lda < n)
        return MOLAE_E_ARG;
    CBLAS(gemv)(ROW_MAJOR, trans ? TRANS : NO_TRANS, (blasint)m, (blasint)n, alpha, A, (blasint)lda,
                x, 1, beta, y, 1);
    return MOLAE_OK;
}

/* trsm or trmm by an upper triangular T, of B (m,n), from one side. */
static molae_status
FN(by_upper)(void (*call)(int, int, int, int, int, blasint, blasint, REAL, const REAL *, blasint,
                          REAL *, blasint),
             int side, int trans, int64_t m, int64_t n, const REAL *T, int64_t ldt, REAL *B,
             int64_t ldb)
{
    if (!fits(m) || !fits(n) || !fits(ldt) || !fits(ldb))
        return out_of_range(m, n, 0);
    if (m == 0 || n == 0)
        return MOLAE_OK;
    if (ldt < (side == LEFT ? m : n) || ldb < n)
        return MOLAE_E_ARG;
    call(ROW_MAJOR, side, UPPER, trans ? TRANS : NO_TRANS, NON_UNIT, (blasint)m, (blasint)n,
         (REAL)1, T, (blasint)ldt, B, (blasint)ldb);
    return MOLAE_OK;
}

molae_status
FN(mli_trsm)(int trans, int64_t m, int64_t n, const REAL *T, int64_t ldt, REAL *B, int64_t ldb)
{
    return FN(by_upper)(CBLAS(trsm), LEFT, trans, m, n, T, ldt, B, ldb);
}

molae_status
FN(mli_trsm_right)(int trans, int64_t m, int64_t n, const REAL *T, int64_t ldt, REAL *B,
                   int64_t ldb)
{
    return FN(by_upper)(CBLAS(trsm), RIGHT, trans, m, n, T, ldt, B, ldb);
}

molae_status
FN(mli_trmm)(int trans, int64_t m, int64_t n, const REAL *T, int64_t ldt, REAL *B, int64_t ldb)
{
    return FN(by_upper)(CBLAS(trmm), LEFT, trans, m, n, T, ldt, B, ldb);
}

molae_status
FN(mli_trmm_right)(int trans, int64_t m, int64_t n, const REAL *T, int64_t ldt, REAL *B,
                   int64_t ldb)
{
    return FN(by_upper)(CBLAS(trmm), RIGHT, trans, m, n, T, ldt, B, ldb);
}

/* ---------------------------------------------------------------- LAPACK */

molae_status
FN(mli_sygst)(int64_t n, REAL *A, int64_t lda, const REAL *U, int64_t ldu, int64_t *info)
{
    blasint itype = 2, bn = (blasint)n, blda = (blasint)lda, bldu = (blasint)ldu, binfo = 0;

    *info = 0;
    if (!fits(n) || !fits(lda) || !fits(ldu))
        return out_of_range(n, 0, 0);
    if (n == 0)
        return MOLAE_OK;
    if (lda < n || ldu < n)
        return MOLAE_E_ARG;
    LAPACK(sygst)(&itype, "L", &bn, A, &blda, U, &bldu, &binfo, 1); /* L = U^T: L^T A L */
    *info = binfo;
    return binfo == 0 ? MOLAE_OK : MOLAE_E_LAPACK;
}

molae_status
FN(mli_potrf)(int64_t n, REAL *A, int64_t lda, int64_t *info)
{
    blasint bn = (blasint)n, blda = (blasint)lda, binfo = 0;

    *info = 0;
    if (!fits(n) || !fits(lda))
        return out_of_range(n, 0, 0);
    if (n == 0)
        return MOLAE_OK;
    if (lda < n)
        return MOLAE_E_ARG;
    LAPACK(potrf)("L", &bn, A, &blda, &binfo, 1); /* row-major upper is column-major lower */
    *info = binfo;
    return binfo == 0 ? MOLAE_OK : MOLAE_E_LAPACK;
}

size_t
FN(mli_pstrf_work)(int64_t n)
{
    return fits(n) ? mli_carve_size(mli_size_mul(2, (size_t)n), sizeof(REAL)) : SIZE_MAX;
}

molae_status
FN(mli_pstrf)(int64_t n, REAL *A, int64_t lda, int32_t *piv, int64_t *rank, REAL tol, void *work,
              size_t work_bytes, int64_t *info)
{
    blasint bn = (blasint)n, blda = (blasint)lda, binfo = 0, brank = 0;

    *info = 0;
    *rank = 0;
    if (!fits(n) || !fits(lda))
        return out_of_range(n, lda, 0);
    if (n == 0)
        return MOLAE_OK;
    if (lda < n || work_bytes < FN(mli_pstrf_work)(n))
        return MOLAE_E_ARG;
    /* info 1 says that it stopped at tol, which is what it was asked for */
    LAPACK(pstrf)("L", &bn, A, &blda, piv, &brank, &tol, work, &binfo, 1);
    for (int64_t j = 0; j < n; j++)
        piv[j] -= 1;
    *rank = brank;
    *info = binfo < 0 ? binfo : 0;
    return binfo < 0 ? MOLAE_E_LAPACK : MOLAE_OK;
}

molae_status
FN(mli_gesv)(int64_t n, int64_t nrhs, REAL *A, int64_t lda, int32_t *piv, REAL *B, int64_t ldb,
             int64_t *info)
{
    blasint bn = (blasint)n, bnrhs = (blasint)nrhs, blda = (blasint)lda, bldb = (blasint)ldb;
    blasint binfo = 0;

    *info = 0;
    if (!fits(n) || !fits(nrhs) || !fits(lda) || !fits(ldb))
        return out_of_range(n, nrhs, 0);
    if (n == 0 || nrhs == 0)
        return MOLAE_OK;
    if (lda < n || ldb < n)
        return MOLAE_E_ARG;
    LAPACK(gesv)(&bn, &bnrhs, A, &blda, piv, B, &bldb, &binfo);
    *info = binfo;
    return binfo == 0 ? MOLAE_OK : MOLAE_E_LAPACK;
}

molae_status
FN(mli_sterf)(int64_t n, REAL *d, REAL *e, int64_t *info)
{
    blasint bn = (blasint)n, binfo = 0;

    *info = 0;
    if (!fits(n))
        return out_of_range(n, 0, 0);
    if (n == 0)
        return MOLAE_OK;
    LAPACK(sterf)(&bn, d, e, &binfo);
    *info = binfo;
    return binfo == 0 ? MOLAE_OK : MOLAE_E_LAPACK;
}

/* Lengths of the two work arrays of stedc; SIZE_MAX in *lwork where they do not fit. */
static void
FN(stedc_lengths)(int64_t n, size_t *lwork, size_t *liwork)
{
    const size_t m = (size_t)n, least = mli_size_add(1 + 4 * m, mli_size_mul(m, m));

    *lwork = n > 1 ? least : 1;
    *liwork = n > 1 ? 3 + 5 * m : 1;
    if (*lwork > (size_t)INT32_MAX || *liwork > (size_t)INT32_MAX)
        *lwork = SIZE_MAX;
}

size_t
FN(mli_stedc_work)(int64_t n)
{
    size_t lwork, liwork;

    if (!fits(n))
        return SIZE_MAX;
    FN(stedc_lengths)(n, &lwork, &liwork);
    if (lwork == SIZE_MAX)
        return SIZE_MAX;
    return mli_size_add(mli_carve_size(lwork, sizeof(REAL)),
                        mli_carve_size(liwork, sizeof(blasint)));
}

molae_status
FN(mli_stedc)(int64_t n, REAL *d, REAL *e, REAL *Z, int64_t ldz, void *work, size_t work_bytes,
              int64_t *info)
{
    blasint bn = (blasint)n, bldz = (blasint)ldz, binfo = 0, blw, bliw, *iwork;
    size_t need = FN(mli_stedc_work)(n), lwork, liwork;
    char *p = work;
    REAL *rwork;

    *info = 0;
    if (!fits(n) || !fits(ldz))
        return out_of_range(n, ldz, 0);
    if (n == 0)
        return MOLAE_OK;
    if (need == SIZE_MAX)
        return MOLAE_E_TOO_LARGE;
    if (ldz < n || work_bytes < need)
        return MOLAE_E_ARG;
    FN(stedc_lengths)(n, &lwork, &liwork);
    rwork = mli_carve(&p, lwork, sizeof(REAL));
    iwork = mli_carve(&p, liwork, sizeof(blasint));
    blw = (blasint)lwork;
    bliw = (blasint)liwork;
    LAPACK(stedc)("I", &bn, d, e, Z, &bldz, rwork, &blw, iwork, &bliw, &binfo, 1);
    *info = binfo;
    return binfo == 0 ? MOLAE_OK : MOLAE_E_LAPACK;
}

size_t
FN(mli_laed2_work)(int64_t n)
{
    return fits(n) ? mli_carve_size(mli_size_mul(4, (size_t)n + 4), sizeof(blasint)) : SIZE_MAX;
}

molae_status
FN(mli_laed2)(int64_t n, int64_t n1, REAL *d, REAL *Z, REAL *rho, REAL *z, REAL *poles,
              REAL *weights, REAL *Q2, int32_t *order, int64_t *k, int64_t *n12, int64_t *first2,
              int64_t *n23, void *work, size_t work_bytes, int64_t *info)
{
    blasint bn = (blasint)n, bn1 = (blasint)n1, bk = 0, binfo = 0;
    blasint *sorted, *places, *indxp, *kinds;
    char *p = work;

    *info = 0;
    if (!fits(n))
        return out_of_range(n, 0, 0);
    if (n1 < 1 || n1 > n / 2 || work_bytes < FN(mli_laed2_work)(n))
        return MOLAE_E_ARG;
    sorted = mli_carve(&p, 4 * ((size_t)n + 4), sizeof(blasint));
    places = sorted + n;
    indxp = places + n;
    kinds = indxp + n;
    for (int64_t i = 0; i < n; i++)
        sorted[i] = (blasint)(i < n1 ? i + 1 : i - n1 + 1);
    LAPACK(laed2)(&bk, &bn, &bn1, d, Z, &bn, sorted, rho, z, poles, weights, Q2, places, order,
                  indxp, kinds, &binfo);
    *info = binfo;
    *k = bk;
    for (int64_t i = 0; i < bk; i++)
        order[i] -= 1;
    *n12 = bk > 0 ? kinds[0] + kinds[1] : 0; /* kinds: in half 1 alone, both, half 2 alone */
    *first2 = bk > 0 ? kinds[0] : 0;
    *n23 = bk > 0 ? kinds[1] + kinds[2] : 0;
    return binfo == 0 ? MOLAE_OK : MOLAE_E_LAPACK;
}

molae_status
FN(mli_laed4)(int64_t k, int64_t j, const REAL *poles, const REAL *weights, REAL rho, REAL *delta,
              REAL *x, int64_t *info)
{
    blasint bk = (blasint)k, bj = (blasint)(j + 1), binfo = 0;

    *info = 0;
    if (!fits(k) || j < 0 || j >= k)
        return out_of_range(k, j, k - 1 - j);
    LAPACK(laed4)(&bk, &bj, poles, weights, delta, &rho, x, &binfo);
    *info = binfo;
    return binfo == 0 ? MOLAE_OK : MOLAE_E_LAPACK;
}

static size_t
FN(geqp3_length)(int64_t m, int64_t n)
{
    blasint bm = (blasint)m, bn = (blasint)n, blda = at_least_1(m), query = -1, jpvt = 0, info = 0;
    REAL ask = 0, none = 0;

    if (m == 0 || n == 0)
        return 1;
    LAPACK(geqp3)(&bm, &bn, &none, &blda, &jpvt, &none, &ask, &query, &info);
    return FN(work_length)(ask, 3 * (size_t)n + 1);
}

size_t
FN(mli_geqp3_work)(int64_t m, int64_t n)
{
    size_t lwork;

    if (!fits(m) || !fits(n))
        return SIZE_MAX;
    lwork = FN(geqp3_length)(m, n);
    return lwork == SIZE_MAX ? SIZE_MAX : mli_carve_size(lwork, sizeof(REAL));
}

molae_status
FN(mli_geqp3)(int64_t m, int64_t n, REAL *A, int64_t lda, int32_t *jpvt, REAL *tau, void *work,
              size_t work_bytes, int64_t *info)
{
    blasint bm = (blasint)m, bn = (blasint)n, blda = (blasint)lda, binfo = 0, blw;
    size_t need = FN(mli_geqp3_work)(m, n);

    *info = 0;
    if (!fits(m) || !fits(n) || !fits(lda))
        return out_of_range(m, n, 0);
    if (need == SIZE_MAX)
        return MOLAE_E_TOO_LARGE;
    if (lda < (m > 1 ? m : 1) || work_bytes < need)
        return MOLAE_E_ARG;
    if (m == 0 || n == 0) {
        for (int64_t j = 0; j < n; j++)
            jpvt[j] = (int32_t)j;
        return MOLAE_OK;
    }
    for (int64_t j = 0; j < n; j++)
        jpvt[j] = 0; /* free to move */
    blw = (blasint)FN(geqp3_length)(m, n);
    LAPACK(geqp3)(&bm, &bn, A, &blda, jpvt, tau, work, &blw, &binfo);
    for (int64_t j = 0; j < n; j++)
        jpvt[j] -= 1;
    *info = binfo;
    return binfo == 0 ? MOLAE_OK : MOLAE_E_LAPACK;
}

static size_t
FN(gelqf_length)(int64_t m, int64_t n)
{
    blasint bm = (blasint)m, bn = (blasint)n, blda = at_least_1(m), query = -1, info = 0;
    REAL ask = 0, none = 0;

    if (m == 0 || n == 0)
        return 1;
    LAPACK(gelqf)(&bm, &bn, &none, &blda, &none, &ask, &query, &info);
    return FN(work_length)(ask, (size_t)m);
}

size_t
FN(mli_gelqf_work)(int64_t m, int64_t n)
{
    size_t lwork;

    if (!fits(m) || !fits(n))
        return SIZE_MAX;
    lwork = FN(gelqf_length)(m, n);
    return lwork == SIZE_MAX ? SIZE_MAX : mli_carve_size(lwork, sizeof(REAL));
}

molae_status
FN(mli_gelqf)(int64_t m, int64_t n, REAL *A, int64_t lda, REAL *tau, void *work, size_t work_bytes,
              int64_t *info)
{
    blasint bm = (blasint)m, bn = (blasint)n, blda = (blasint)lda, binfo = 0, blw;
    size_t need = FN(mli_gelqf_work)(m, n);

    *info = 0;
    if (!fits(m) || !fits(n) || !fits(lda))
        return out_of_range(m, n, 0);
    if (need == SIZE_MAX)
        return MOLAE_E_TOO_LARGE;
    if (lda < (m > 1 ? m : 1) || work_bytes < need)
        return MOLAE_E_ARG;
    if (m == 0 || n == 0)
        return MOLAE_OK;
    blw = (blasint)FN(gelqf_length)(m, n);
    LAPACK(gelqf)(&bm, &bn, A, &blda, tau, work, &blw, &binfo);
    *info = binfo;
    return binfo == 0 ? MOLAE_OK : MOLAE_E_LAPACK;
}

static size_t
FN(gesdd_length)(int64_t m, int64_t n)
{
    int64_t k = m < n ? m : n;
    size_t q = (size_t)k, least = mli_size_add(mli_size_mul(4 * q, q), 7 * q);
    blasint bm = (blasint)m, bn = (blasint)n, blda = at_least_1(m), ldvt = at_least_1(k);
    blasint query = -1, iwork = 0, info = 0;
    REAL ask = 0, none = 0;

    if (k == 0)
        return 1;
    if (least > (size_t)INT32_MAX)
        return SIZE_MAX;
    LAPACK(gesdd)("S", &bm, &bn, &none, &blda, &none, &none, &blda, &none, &ldvt, &ask, &query,
                  &iwork, &info, 1);
    return FN(work_length)(ask, least);
}

size_t
FN(mli_gesdd_work)(int64_t m, int64_t n)
{
    size_t lwork, k = (size_t)(m < n ? m : n), bytes;

    if (!fits(m) || !fits(n))
        return SIZE_MAX;
    lwork = FN(gesdd_length)(m, n);
    if (lwork == SIZE_MAX)
        return SIZE_MAX;
    bytes = mli_carve_size(mli_size_mul(k, (size_t)n), sizeof(REAL));
    bytes = mli_size_add(bytes, mli_carve_size(lwork, sizeof(REAL)));
    return mli_size_add(bytes, mli_carve_size(8 * k, sizeof(blasint)));
}

molae_status
FN(mli_gesdd)(int64_t m, int64_t n, REAL *A, int64_t lda, REAL *s, REAL *U, int64_t ldu, void *work,
              size_t work_bytes, int64_t *info)
{
    int64_t k = m < n ? m : n;
    blasint bm = (blasint)m, bn = (blasint)n, blda = (blasint)lda, bldu = (blasint)ldu;
    blasint ldvt = at_least_1(k), binfo = 0, blw, *iwork;
    size_t need = FN(mli_gesdd_work)(m, n), lwork;
    char *p = work;
    REAL *vt, *rwork;

    *info = 0;
    if (!fits(m) || !fits(n) || !fits(lda) || !fits(ldu))
        return out_of_range(m, n, 0);
    if (k == 0)
        return MOLAE_OK;
    if (need == SIZE_MAX)
        return MOLAE_E_TOO_LARGE;
    if (lda < m || ldu < m || work_bytes < need)
        return MOLAE_E_ARG;
    lwork = FN(gesdd_length)(m, n);
    vt = mli_carve(&p, (size_t)k * (size_t)n, sizeof(REAL));
    rwork = mli_carve(&p, lwork, sizeof(REAL));
    iwork = mli_carve(&p, 8 * (size_t)k, sizeof(blasint));
    blw = (blasint)lwork;
    LAPACK(gesdd)("S", &bm, &bn, A, &blda, s, U, &bldu, vt, &ldvt, rwork, &blw, iwork, &binfo, 1);
    *info = binfo;
    return binfo == 0 ? MOLAE_OK : MOLAE_E_LAPACK;
}

#undef CBLAS
#undef LAPACK
