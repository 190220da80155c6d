/* The one parallel primitive. */
#ifndef MOLAE_BASE_PAR_H
#define MOLAE_BASE_PAR_H

#include "../molae.h"

/* One unit of work: `index` in 0..n-1, `worker` in 0..num_threads-1 (for per-thread scratch).
 * A task must own what it writes, so that results do not depend on the thread count. */
typedef molae_status (*mli_task)(void *arg, int64_t index, int32_t worker);

/* Runs task(arg, 0..n-1) on ctx->num_threads threads (the caller is one of them) and waits.
 * Every task runs unless one fails; then the rest may be skipped. Returns the failure of the
 * lowest index among those that ran, else the largest positive status, else MOLAE_OK.
 * Not to be nested: a task that calls it gets its tasks run one after another. When another
 * thread has the pool, the caller runs its tasks alone. Safe after fork: the child leaves
 * ctx->team alone, whose threads have stayed behind. */
molae_status mli_parallel_for(const molae_ctx *ctx, int64_t n, mli_task task, void *arg);

/* Ends the pool's threads; the next call starts new ones. For tests and leak checkers. */
void mli_parallel_shutdown(void);

/* Threads the pool holds now. */
int32_t mli_parallel_started(void);

#endif
