#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "test.h"

#include "../../csrc/base/par.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define N 1000

typedef struct {
    atomic_int runs[N];
    atomic_int bad_worker;
    int32_t threads;
    int64_t fail_a, fail_b; /* indices that fail, -1 for none */
    int64_t warn;
} seen_t;

static molae_status
count(void *p, int64_t i, int32_t worker)
{
    seen_t *s = p;

    atomic_fetch_add(&s->runs[i], 1);
    if (worker < 0 || worker >= s->threads)
        atomic_store(&s->bad_worker, 1);
    if (i == s->fail_a)
        return MOLAE_E_LAPACK;
    if (i == s->fail_b)
        return MOLAE_E_NONFINITE;
    return i == s->warn ? MOLAE_W_PRECISION : (i % 7 == 0 ? MOLAE_W_NOT_CONVERGED : MOLAE_OK);
}

static molae_team lender; /* of the threads below */

static molae_status
go(seen_t *s, int32_t threads, int64_t n)
{
    molae_ctx ctx = {threads, lender};

    memset(s->runs, 0, sizeof s->runs);
    atomic_store(&s->bad_worker, 0);
    s->threads = threads;
    return mli_parallel_for(&ctx, n, count, s);
}

static int
each_once(const seen_t *s, int64_t n)
{
    for (int64_t i = 0; i < N; i++)
        if (atomic_load(&s->runs[i]) != (i < n ? 1 : 0))
            return 0;
    return !atomic_load(&s->bad_worker);
}

static void
loops(void)
{
    static seen_t s = {.fail_a = -1, .fail_b = -1, .warn = -1};
    const int32_t threads[] = {1, 2, 3, 8, 5, 2, 1000};
    const int64_t sizes[] = {0, 1, 2, 7, N};

    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            molae_status rc = go(&s, threads[t], sizes[k]);
            CHECK(each_once(&s, sizes[k]));
            CHECK(rc == (sizes[k] > 0 ? MOLAE_W_NOT_CONVERGED : MOLAE_OK));
        }
    s.warn = 500;
    CHECK(go(&s, 4, N) == MOLAE_W_PRECISION); /* the largest warning */
}

static void
failures(void)
{
    static seen_t s = {.warn = -1};

    for (int32_t threads = 1; threads <= 8; threads++)
        for (int64_t at = 0; at < 40; at += 3) {
            s.fail_a = at + 1;
            s.fail_b = at;
            CHECK(go(&s, threads, N) == MOLAE_E_NONFINITE); /* the lowest index */
            s.fail_b = at + 2;
            CHECK(go(&s, threads, N) == MOLAE_E_LAPACK);
        }
    s.fail_a = N - 1;
    s.fail_b = -1;
    CHECK(go(&s, 3, N) == MOLAE_E_LAPACK);
    CHECK(each_once(&s, N));
}

typedef struct {
    seen_t inner[4];
    atomic_int wrong;
} nest_t;

static molae_status
nested(void *p, int64_t i, int32_t worker)
{
    nest_t *s = p;

    (void)worker;
    s->inner[i].fail_a = s->inner[i].fail_b = s->inner[i].warn = -1;
    if (go(&s->inner[i], 4, 50) < 0 || !each_once(&s->inner[i], 50))
        atomic_store(&s->wrong, 1);
    return MOLAE_OK;
}

static void
nesting(void)
{
    static nest_t s;
    molae_ctx ctx = {2, NULL};

    CHECK(mli_parallel_for(&ctx, 4, nested, &s) == MOLAE_OK);
    CHECK(!atomic_load(&s.wrong));
}

static void *
caller(void *p)
{
    atomic_int *wrong = p;
    static _Thread_local seen_t s = {.fail_a = -1, .fail_b = -1, .warn = -1};

    for (int k = 0; k < 50; k++)
        if (go(&s, 3, 200) != MOLAE_W_NOT_CONVERGED || !each_once(&s, 200))
            atomic_store(wrong, 1);
    return NULL;
}

static void
several_callers(void)
{
    atomic_int wrong = 0;
    pthread_t t[4];

    for (int i = 0; i < 4; i++)
        pthread_create(&t[i], NULL, caller, &wrong);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    CHECK(!atomic_load(&wrong));
}

static void
forking(void)
{
    static seen_t s = {.fail_a = -1, .fail_b = -1, .warn = -1};
    int status = -1;
    pid_t child;

    go(&s, 4, N);
    CHECK(mli_parallel_started() >= 3);
    child = fork();
    if (child == 0) {
        int good = mli_parallel_started() == 0; /* the child has no threads yet */
        good &= go(&s, 4, N) == MOLAE_W_NOT_CONVERGED && each_once(&s, N);
        good &= mli_parallel_started() >= 3;
        mli_parallel_shutdown();
        _exit(good ? 0 : 1);
    }
    CHECK(child > 0);
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    go(&s, 4, N);
    CHECK(each_once(&s, N));
}

typedef struct {
    void (*fn)(void *);
    void *arg;
} errand_t;

static void *
errand(void *p)
{
    const errand_t *e = p;

    e->fn(e->arg);
    return NULL;
}

static atomic_int teams;

static void
team(void (*fn)(void *), void *arg, unsigned num_threads, unsigned flags)
{
    errand_t e = {fn, arg};
    pthread_t t[8];
    unsigned n = 0;

    CHECK(num_threads >= 2 && num_threads <= 8 && flags == 0);
    atomic_fetch_add(&teams, 1);
    while (n + 1 < num_threads && pthread_create(&t[n], NULL, errand, &e) == 0)
        n++;
    fn(arg);
    while (n > 0)
        pthread_join(t[--n], NULL);
}

static void
borrowing(void)
{
    static seen_t s = {.fail_a = -1, .fail_b = -1, .warn = 500};
    const int64_t sizes[] = {0, 1, 2, 7, N};
    int expected = 0, status = -1;
    pid_t child;

    mli_parallel_shutdown();
    lender = team;
    for (int32_t threads = 1; threads <= 8; threads++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            const int64_t n = sizes[k];
            molae_status rc = go(&s, threads, n);
            CHECK(each_once(&s, n));
            CHECK(rc == (n > 500 ? MOLAE_W_PRECISION : n > 0 ? MOLAE_W_NOT_CONVERGED : MOLAE_OK));
            expected += threads > 1 && n > 1;
        }
    CHECK(atomic_load(&teams) == expected); /* not for one thread or task */
    CHECK(mli_parallel_started() == 0);     /* none of molae's own */
    s.fail_a = 61;
    s.fail_b = 60;
    for (int32_t threads = 1; threads <= 8; threads++)
        CHECK(go(&s, threads, N) == MOLAE_E_NONFINITE);
    s.fail_a = s.fail_b = -1;
    child = fork();
    if (child == 0) {
        const int before = atomic_load(&teams);
        int good = go(&s, 4, N) == MOLAE_W_PRECISION && each_once(&s, N);
        good &= atomic_load(&teams) == before && mli_parallel_started() >= 3;
        mli_parallel_shutdown();
        _exit(good ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    lender = NULL;
}

static void
stopping(void)
{
    static seen_t s = {.fail_a = -1, .fail_b = -1, .warn = -1};

    mli_parallel_shutdown();
    CHECK(mli_parallel_started() == 0);
    go(&s, 4, N);
    CHECK(each_once(&s, N));
    mli_parallel_shutdown();
    mli_parallel_shutdown();
}

void
test_par(void)
{
    loops();
    failures();
    nesting();
    several_callers();
    forking();
    borrowing();
    stopping();
}
