/* Body of eigen.c for one precision. */

typedef struct {
    REAL *e, *tau; /* (n,): second diagonal; factors of the Householder vectors */
    char *work;    /* LAPACK's */
    size_t work_bytes;
    REAL *Z;              /* (n,n): eigenvectors of the two halves, then the range's, as rows */
    REAL *z;              /* (n,): the vector that joins the halves */
    REAL *poles, *weight; /* (n,): of the equation whose roots are the eigenvalues */
    REAL *Q2;             /* (n,n): vectors of the halves that take part, packed */
    REAL *delta;          /* (n,n): row j: poles less root j; then vectors in terms of Q2 */
    REAL *row;            /* (n,) */
    int32_t *order;       /* (n,) */
    int32_t *where;       /* (count,): row of Z with the eigenvector lo + i */
    REAL *scratch;        /* of the Householder vectors */
} FN(eigen);

static size_t
FN(eigen_cut)(FN(eigen) * q, char **p, int64_t n, int64_t count)
{
    const size_t m = (size_t)n, half = (size_t)(n - n / 2);
    const size_t square = mli_size_mul(m, m);
    size_t bytes = 0;

    q->work_bytes = 0;
    if (count > 0) {
        q->work_bytes = FN(mli_stedc_work)((int64_t)half);
        q->work_bytes = MLI_MAX(q->work_bytes, FN(mli_laed2_work)(n));
    }
    MLI_CUT(bytes, p, q->e, m, sizeof(REAL));
    MLI_CUT(bytes, p, q->tau, m, sizeof(REAL));
    MLI_CUT(bytes, p, q->work, q->work_bytes, 1);
    MLI_CUT(bytes, p, q->scratch,
            MLI_MAX(mli_size_mul(MLI_PANEL, m), count > 0 ? mli_turn_back_scratch(n, count) : 0),
            sizeof(REAL));
    if (count > 0) {
        MLI_CUT(bytes, p, q->Z, square, sizeof(REAL));
        MLI_CUT(bytes, p, q->z, m, sizeof(REAL));
        MLI_CUT(bytes, p, q->poles, m, sizeof(REAL));
        MLI_CUT(bytes, p, q->weight, m, sizeof(REAL));
        MLI_CUT(bytes, p, q->Q2, square, sizeof(REAL));
        MLI_CUT(bytes, p, q->delta, square, sizeof(REAL));
        MLI_CUT(bytes, p, q->row, m, sizeof(REAL));
        MLI_CUT(bytes, p, q->order, m, sizeof(int32_t));
        MLI_CUT(bytes, p, q->where, (size_t)count, sizeof(int32_t));
    }
    return bytes;
}

size_t
FN(mli_eigen_work)(int64_t n, int64_t count)
{
    FN(eigen) q;

    return FN(eigen_cut)(&q, NULL, n, count);
}

/* The exponent by which A is to be scaled so that its squares neither overflow nor vanish: 0 in
 * all but freak cases. A power of two, so that nothing is rounded. */
static molae_status
FN(exponent)(const REAL *A, int64_t n, int *shift)
{
    const REAL small = (REAL)sqrt((double)(REAL_MIN / REAL_EPSILON));
    REAL top = 0;

    *shift = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i; j < n; j++) {
            const REAL a = A[i * n + j] < 0 ? -A[i * n + j] : A[i * n + j];
            top = a > top || a != a ? a : top; /* a NaN stays */
        }
    if (!isfinite(top))
        return MOLAE_E_NONFINITE;
    if (top > 0 && (top < small || top > 1 / small)) {
        (void)frexp((double)top, shift);
        *shift = -*shift;
    }
    return MOLAE_OK;
}

/* ------------------------------------------------------------ tridiagonal */

/* Both halves of the tridiagonal matrix, torn apart at n1 = n/2: T = T1 + T2 + |rho| v v^T. */
static molae_status
FN(halves)(const FN(eigen) * q, int64_t n, REAL *d, REAL *rho, int64_t *info)
{
    const int64_t n1 = n / 2, n2 = n - n1;
    molae_status rc = MOLAE_OK;

    *rho = q->e[n1 - 1];
    d[n1 - 1] -= *rho < 0 ? -*rho : *rho;
    d[n1] -= *rho < 0 ? -*rho : *rho;
    memset(q->Z, 0, (size_t)(n * n) * sizeof(REAL));
    MLI_TRY(FN(mli_stedc)(n1, d, q->e, q->Z, n, q->work, q->work_bytes, info));
    MLI_TRY(
        FN(mli_stedc)(n2, d + n1, q->e + n1, q->Z + n1 * n + n1, n, q->work, q->work_bytes, info));
    for (int64_t j = 0; j < n; j++)
        q->z[j] = j < n1 ? q->Z[j * n + n1 - 1] : q->Z[j * n + n1];
done:
    return rc;
}

/* The weights for which the computed roots are exact (Gu and Eisenstat, 1994), from which the
 * eigenvectors come out orthogonal. delta (k,k); k > 2. */
static void
FN(exact_weights)(const FN(eigen) * q, int64_t k)
{
    for (int64_t i = 0; i < k; i++)
        q->row[i] = q->delta[i * k + i];
    for (int64_t j = 0; j < k; j++) {
        const REAL *delta = q->delta + j * k, pole = q->poles[j];
        for (int64_t i = 0; i < j; i++)
            q->row[i] *= delta[i] / (q->poles[i] - pole);
        for (int64_t i = j + 1; i < k; i++)
            q->row[i] *= delta[i] / (q->poles[i] - pole);
    }
    for (int64_t i = 0; i < k; i++)
        q->weight[i] = (REAL)copysign(sqrt(fabs((double)q->row[i])), (double)q->weight[i]);
}

/* Row j of delta becomes the unit eigenvector of root j in terms of the rows of Q2. */
static void
FN(root_vector)(const FN(eigen) * q, int64_t k, int64_t j)
{
    REAL *v = q->delta + j * k;
    double length = 0;

    for (int64_t i = 0; i < k; i++) {
        q->row[i] = k > 2 ? q->weight[i] / v[i] : v[i];
        length += (double)q->row[i] * (double)q->row[i];
    }
    length = 1 / sqrt(length);
    for (int64_t i = 0; i < k; i++)
        v[i] = (REAL)((double)q->row[q->order[i]] * length);
}

/* Multiplies d (n,) and e (n-1,) by a power of two that brings entries below 1/2 up to it, and
 * returns its inverse: laed2 takes for zero what is below eps times the larger of 1 and d. */
static REAL
FN(lift)(REAL *d, REAL *e, int64_t n)
{
    REAL top = 0, up;
    int exponent;

    for (int64_t i = 0; i < n; i++) {
        top = MLI_MAX(top, (REAL)fabs((double)d[i]));
        top = i < n - 1 ? MLI_MAX(top, (REAL)fabs((double)e[i])) : top;
    }
    (void)frexp((double)top, &exponent);
    if (exponent >= 0)
        return 1;
    up = (REAL)ldexp(1, -exponent);
    for (int64_t i = 0; i < n; i++) {
        d[i] *= up;
        if (i < n - 1)
            e[i] *= up;
    }
    return 1 / up;
}

/* Eigenvalues d (n,), ascending, of the tridiagonal matrix d, e, and its eigenvectors lo ..
 * lo+count-1 in rows 0 .. count-1 of Z in the order of `where`. The last merge of divide and
 * conquer is most of its work, and is done here for the range alone. */
static molae_status
FN(tridiagonal)(const FN(eigen) * q, int64_t n, REAL *d, int64_t lo, int64_t count, int64_t *info)
{
    const int64_t n1 = n / 2, n2 = n - n1;
    int64_t k, n12, n23, first2, roots = 0, root0 = n, other0 = n; /* first of the range */
    const REAL down = FN(lift)(d, q->e, n);
    REAL rho;
    molae_status rc = MOLAE_OK;

    MLI_TRY(FN(halves)(q, n, d, &rho, info));
    MLI_TRY(FN(mli_laed2)(n, n1, d, q->Z, &rho, q->z, q->poles, q->weight, q->Q2, q->order, &k,
                          &n12, &first2, &n23, q->work, q->work_bytes, info));
    for (int64_t j = 0; j < k; j++)
        MLI_TRY(FN(mli_laed4)(k, j, q->poles, q->weight, rho, q->delta + j * k, &d[j], info));
    if (k > 2)
        FN(exact_weights)(q, k);

    /* roots ascend from 0, the others descend to n-1, or ascend where there is no root: merge */
    memcpy(q->row, d, (size_t)n * sizeof(REAL));
    for (int64_t i = 0, root = 0, other = 0; i < n; i++) {
        const int64_t next = k > 0 ? n - 1 - other : other;
        const int is_root = root < k && (other == n - k || q->row[root] <= q->row[next]);
        const int64_t from = is_root ? root++ : next;
        other += !is_root;
        d[i] = q->row[from] * down;
        if (i < lo || i >= lo + count)
            continue;
        q->where[i - lo] = (int32_t)from;
        if (is_root)
            root0 = MLI_MIN(root0, from);
        else
            other0 = MLI_MIN(other0, from);
        roots += is_root;
    }
    /* the range's roots come to rows 0.. of Z, its others behind them */
    memmove(q->Z + roots * n, q->Z + other0 * n, (size_t)((count - roots) * n) * sizeof(REAL));
    for (int64_t i = 0; i < count; i++)
        q->where[i] -= (int32_t)(q->where[i] < k ? root0 : other0 - roots);
    for (int64_t j = root0; j < root0 + roots; j++)
        FN(root_vector)(q, k, j);
    if (roots > 0) {
        const REAL *S = q->delta + root0 * k;
        MLI_TRY(FN(mli_gemm)(0, 0, roots, n1, n12, 1, S, k, q->Q2, n1, 0, q->Z, n));
        MLI_TRY(FN(mli_gemm)(0, 0, roots, n2, n23, 1, S + first2, k, q->Q2 + n1 * n12, n2, 0,
                             q->Z + n1, n));
    }
done:
    return rc;
}

molae_status
FN(mli_eigen)(int64_t n, REAL *A, REAL *w, int64_t lo, int64_t count, void *work, size_t work_bytes,
              int64_t *info)
{
    const size_t need = FN(mli_eigen_work)(n, count);
    FN(eigen) q = {0};
    char *p = work;
    int shift;
    molae_status rc = MOLAE_OK;

    *info = 0;
    if (n < 0 || lo < 0 || count < 0 || lo + count > n)
        return MOLAE_E_ARG;
    if (need == SIZE_MAX)
        return MOLAE_E_TOO_LARGE;
    if (work_bytes < need)
        return MOLAE_E_ARG;
    (void)FN(eigen_cut)(&q, &p, n, count);
    MLI_TRY(FN(exponent)(A, n, &shift));
    if (shift != 0)
        for (int64_t i = 0; i < n * n; i++)
            A[i] = (REAL)ldexp((double)A[i], shift);
    MLI_TRY(FN(mli_tridiagonalize)(n, A, w, q.e, q.tau, q.scratch));
    if (n == 1) {
        A[0] = 1;
    } else if (count == 0) {
        MLI_TRY(FN(mli_sterf)(n, w, q.e, info));
    } else {
        MLI_TRY(FN(tridiagonal)(&q, n, w, lo, count, info));
        MLI_TRY(FN(mli_turn_back)(n, A, q.tau, q.Z, count, q.scratch));
        for (int64_t i = 0; i < count; i++)
            memcpy(A + (lo + i) * n, q.Z + q.where[i] * n, (size_t)n * sizeof(REAL));
    }
    if (shift != 0)
        for (int64_t i = 0; i < n; i++)
            w[i] = (REAL)ldexp((double)w[i], -shift);
done:
    return rc;
}
