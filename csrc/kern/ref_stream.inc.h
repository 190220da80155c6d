/* The streaming products in plain C, for one type REAL of X and Y and W of W; WIDEN(w) is a value
 * of W as REAL, NAME(f) the name of f. */

static void
NAME(nt)(REAL *Y, int64_t ldy, const REAL *X, int64_t ldx, const W *Wt, int64_t ldw, int64_t N,
         int64_t r, int64_t k, int accumulate)
{
    for (int64_t p = 0; p < r; p++)
        for (int64_t n = 0; n < N; n++) {
            const REAL *x = X + n * ldx;
            const W *w = Wt + p * ldw;
            REAL *y = Y + n * ldy + p, s[LANES] = {0};
            int64_t i = 0;
            for (; i + LANES <= k; i += LANES)
                for (int j = 0; j < LANES; j++)
                    s[j] += x[i + j] * WIDEN(w[i + j]);
            for (int j = 0; i + j < k; j++)
                s[j] += x[i + j] * WIDEN(w[i + j]);
            for (int half = LANES / 2; half > 0; half /= 2)
                for (int j = 0; j < half; j++)
                    s[j] += s[j + half];
            *y = accumulate ? *y + s[0] : s[0];
        }
}

static void
NAME(nn)(REAL *Y, int64_t ldy, const REAL *X, int64_t ldx, const W *Wt, int64_t ldw, int64_t N,
         int64_t c, int64_t k, int accumulate)
{
    for (int64_t n = 0; n < N && !accumulate; n++)
        for (int64_t j = 0; j < c; j++)
            Y[n * ldy + j] = 0;
    for (int64_t i = 0; i < k; i++)
        for (int64_t n = 0; n < N; n++) {
            const REAL x = X[n * ldx + i];
            const W *w = Wt + i * ldw;
            REAL *y = Y + n * ldy;
            for (int64_t j = 0; j < c; j++)
                y[j] += x * WIDEN(w[j]);
        }
}
