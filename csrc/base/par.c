/* A small pool of threads, started when first asked for and kept. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L /* pthread_sigmask and clocks under -std=c11 */
#endif
#include "par.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

/* To wake a thread takes tens of microseconds, as long as a phase of a small layer. So whoever
 * waits looks out for so long before it sleeps. */
enum { AWAKE_NS = 100000 };

#define MAX_WORKERS 256 /* the caller besides */

typedef struct {
    mli_task task;
    void *arg;
    int64_t n;
    atomic_int_fast64_t next; /* next index to hand out */
    atomic_int stop;          /* a task failed: hand out no more */
} job_t;

/* What one thread saw. Indices are handed out in rising order, so every index below a failed one
 * ran as well: the lowest failure is the same for any number of threads. */
typedef struct {
    int64_t failed; /* index, or -1 */
    molae_status failure;
    molae_status warning;
} outcome_t;

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_cond_t done;
    pthread_t threads[MAX_WORKERS];
    int32_t started;
    int32_t wanted;           /* workers that take part in the present job */
    atomic_int pending;       /* of these, those not yet finished */
    atomic_ullong generation; /* counts jobs */
    atomic_int quit;
    job_t *job;
    outcome_t outcome;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

/* Held by the one caller that has the pool; others run their tasks themselves. */
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int forked;               /* in a child of fork */
static _Thread_local int inside; /* this thread is running tasks */

static const outcome_t nothing = {-1, MOLAE_OK, MOLAE_OK};

static void
merge(outcome_t *into, const outcome_t *from)
{
    if (from->failed >= 0 && (into->failed < 0 || from->failed < into->failed)) {
        into->failed = from->failed;
        into->failure = from->failure;
    }
    if (from->warning > into->warning)
        into->warning = from->warning;
}

static outcome_t
work(job_t *job, int32_t worker)
{
    outcome_t seen = nothing;
    int nested = inside;

    inside = 1;
    while (!atomic_load(&job->stop)) {
        int64_t i = (int64_t)atomic_fetch_add(&job->next, 1);
        molae_status rc;
        if (i >= job->n)
            break;
        rc = job->task(job->arg, i, worker);
        if (rc < 0) {
            outcome_t mine = {i, rc, MOLAE_OK};
            merge(&seen, &mine);
            atomic_store(&job->stop, 1);
        } else if (rc > seen.warning) {
            seen.warning = rc;
        }
    }
    inside = nested;
    return seen;
}

/* 1 for a while, then 0: whether to go on looking out. *until: 0 at first. */
static int
awake(int64_t *until)
{
    struct timespec t;
    int64_t now;

    (void)sched_yield(); /* others that have work go first */
    clock_gettime(CLOCK_MONOTONIC, &t);
    now = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    if (*until == 0)
        *until = now + AWAKE_NS;
    return now < *until;
}

static void *
worker_main(void *p)
{
    int32_t id = (int32_t)(intptr_t)p; /* 1, 2, ... */
    unsigned long long seen = 0;

    pthread_mutex_lock(&pool.lock);
    for (;;) {
        int64_t until = 0;
        outcome_t mine;
        job_t *job;
        while (!pool.quit && (pool.generation == seen || id > pool.wanted)) {
            seen = pool.generation;
            pthread_cond_wait(&pool.wake, &pool.lock);
        }
        if (pool.quit)
            break;
        seen = pool.generation;
        job = pool.job;
        pthread_mutex_unlock(&pool.lock);
        mine = work(job, id);
        pthread_mutex_lock(&pool.lock);
        merge(&pool.outcome, &mine);
        if (--pool.pending == 0)
            pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.lock);
        while (pool.generation == seen && !pool.quit && awake(&until)) {
        }
        pthread_mutex_lock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

/* The child of a fork has none of the threads and maybe held locks: start anew. */
static void
after_fork_in_child(void)
{
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pthread_mutex_init(&gate, NULL);
    pool.started = 0;
    pool.wanted = 0;
    pool.pending = 0;
    pool.quit = 0;
    pool.job = NULL;
    forked = 1;
}

static void
init_once(void)
{
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

/* Starts workers until there are `want`; fewer if the system gives no more. Lock held. */
static void
grow(int32_t want)
{
    sigset_t all, old;

    if (pool.started >= want)
        return;
    /* Workers take no signals: Ctrl-C belongs to the interpreter's thread. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (pool.started < want) {
        void *id = (void *)(intptr_t)(pool.started + 1);
        if (pthread_create(&pool.threads[pool.started], NULL, worker_main, id) != 0)
            break;
        pool.started++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* A job on borrowed threads. */
typedef struct {
    job_t *job;
    atomic_int arrived; /* threads that have come so far */
    pthread_mutex_t lock;
    outcome_t outcome;
} shift_t;

static void
take_part(void *p)
{
    shift_t *s = p;
    const outcome_t mine = work(s->job, (int32_t)atomic_fetch_add(&s->arrived, 1));

    if (mine.failed < 0 && mine.warning == MOLAE_OK)
        return;
    pthread_mutex_lock(&s->lock);
    merge(&s->outcome, &mine);
    pthread_mutex_unlock(&s->lock);
}

/* All of the team comes, even for fewer tasks: to change its size costs it new threads. */
static outcome_t
work_with(molae_team team, int32_t num_threads, job_t *job)
{
    shift_t s = {.job = job, .lock = PTHREAD_MUTEX_INITIALIZER, .outcome = nothing};

    team(take_part, &s, (unsigned)num_threads, 0);
    return s.outcome;
}

molae_status
mli_parallel_for(const molae_ctx *ctx, int64_t n, mli_task task, void *arg)
{
    job_t job = {.task = task, .arg = arg, .n = n};
    outcome_t all = nothing, mine;
    int64_t want = ctx->num_threads - 1, until = 0;

    if (n <= 0)
        return MOLAE_OK;
    if (want > n - 1)
        want = n - 1;
    if (want > MAX_WORKERS)
        want = MAX_WORKERS;

    pthread_once(&once, init_once);
    if (want <= 0 || inside) {
        all = work(&job, 0);
    } else if (ctx->team != NULL && !forked) {
        all = work_with(ctx->team, ctx->num_threads, &job);
    } else if (pthread_mutex_trylock(&gate) != 0) {
        all = work(&job, 0);
    } else {
        pthread_mutex_lock(&pool.lock);
        grow((int32_t)want);
        pool.wanted = pool.started < (int32_t)want ? pool.started : (int32_t)want;
        pool.pending = pool.wanted;
        pool.job = &job;
        pool.outcome = nothing;
        pool.generation++;
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);

        mine = work(&job, 0);

        while (pool.pending > 0 && awake(&until)) {
        }
        pthread_mutex_lock(&pool.lock);
        while (pool.pending > 0)
            pthread_cond_wait(&pool.done, &pool.lock);
        pool.job = NULL;
        pool.wanted = 0;
        all = pool.outcome;
        pthread_mutex_unlock(&pool.lock);
        merge(&all, &mine);
        pthread_mutex_unlock(&gate);
    }
    return all.failed >= 0 ? all.failure : all.warning;
}

void
mli_parallel_shutdown(void)
{
    pthread_mutex_lock(&gate);
    pthread_mutex_lock(&pool.lock);
    pool.quit = 1;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    for (int32_t i = 0; i < pool.started; i++)
        pthread_join(pool.threads[i], NULL);
    pool.started = 0;
    pool.quit = 0;
    pthread_mutex_unlock(&gate);
}

int32_t
mli_parallel_started(void)
{
    int32_t n;
    pthread_mutex_lock(&pool.lock);
    n = pool.started;
    pthread_mutex_unlock(&pool.lock);
    return n;
}
