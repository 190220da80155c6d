/* How the work of an expert layer is cut, and what is checked about it; see cut.c. */
#ifndef MOLAE_OPS_EXPERTS_H
#define MOLAE_OPS_EXPERTS_H

#include <assert.h>

#include "../base/par.h"
#include "../kern/kern.h"
#include "../molae.h"
#include "product.h"

/* Units of work: fixed by shape, never by the thread count. */
enum {
    MLI_ROWS = 384,    /* rows multiplied at once */
    MLI_FEW = 64,      /* up to so many rows, columns are cut finely */
    MLI_FINE = 256,    /* columns (or rows of a weight's gradient) of a task with few rows */
    MLI_COARSE = 1024, /* the same with many rows: each task gathers and packs them again */
    MLI_PAD = 16,      /* between rows of products: a power of two apart they share a cache line */
    MLI_SPAN = 1024,   /* tokens of a task that adds experts up */
    MLI_LIFT = 512,    /* tokens lifted at once */
    MLI_SCATTER = 64,  /* tokens of a task that adds lifted rows */
    MLI_SUMMED = 4,    /* vectors that are added up at once */
};

/* Kinds of gradient. */
enum { MLI_PRIVATE, MLI_SHARED, MLI_BIAS };

enum { MLI_GATE, MLI_UP, MLI_DOWN, MLI_ROLES };

/* One piece of a phase. */
typedef struct {
    int32_t what; /* the phase's own */
    int32_t role;
    int64_t unit; /* expert or group */
    int64_t r0, nr, c0, nc;
} mli_piece;

/* A list of pieces of bounded length. */
typedef struct {
    mli_piece *at;
    int64_t n, room;
} mli_pieces;

static inline void
mli_pieces_add(mli_pieces *list, mli_piece piece)
{
    assert(list->n < list->room); /* see mli_pieces_room */
    list->at[list->n++] = piece;
}

/* Adds nr rows from r0 and nc columns from 0, cut in even blocks of at most `rows` and `cols`;
 * columns begin at multiples of MLI_FINE. */
void mli_pieces_cut(mli_pieces *list, mli_piece piece, int64_t rows, int64_t cols);

/* Room for the pieces of any phase over a chunk of N tokens. */
int64_t mli_pieces_room(const molae_experts *l, int64_t N, int64_t K);

static inline const molae_projection *
mli_projection(const molae_experts *l, int role)
{
    return role == MLI_GATE ? &l->gate : (role == MLI_UP ? &l->up : &l->down);
}

static inline int64_t
mli_group(const molae_projection *p, int64_t e)
{
    return p->group_of ? p->group_of[e] : 0;
}

/* Rank of an expert's group; -1: dense. */
static inline int64_t
mli_rank(const molae_projection *p, int64_t e)
{
    return p->rank[mli_group(p, e)];
}

static inline int64_t
mli_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* First i in lo..hi-1 with a[i] >= value, or hi; a ascends. */
int64_t mli_lower_bound(const int64_t *a, int64_t lo, int64_t hi, int64_t value);

/* Whether index (N,K) is of experts 0 to E - 1, or E for none; err is set anew. */
molae_status mli_index_check(const int64_t *index, int64_t N, int64_t K, int64_t E,
                             molae_errinfo *err);

/* Everything about a layer that could make a kernel read or write astray. `own` is the type of
 * the arithmetic. */
molae_status mli_experts_check(const molae_experts *l, molae_dtype own, int64_t N, int64_t K,
                               molae_errinfo *err);

#endif
