/* Experts' matrices as Python gives them. */
#ifndef MOLAE_PY_STACK_H
#define MOLAE_PY_STACK_H

#include "args.h"

/* A stack that keeps its arrays alive. */
typedef struct {
    molae_stack s;
    PyObject *seq; /* list or tuple of the arrays */
    const void **W;
    PyArray_Descr *descr; /* their dtype, for what is allocated */
    int64_t *ids;         /* the caller's numbers of the experts, for messages */
} mli_py_stack;

/* Fills a zeroed stack from a sequence of matrices of one dtype and shape; one group of all experts
 * until the caller says otherwise. -1 with an exception set. To be cleared in any case. */
int mli_py_stack_from(mli_pystate *st, mli_py_stack *k, PyObject *experts, molae_side side);
void mli_py_stack_clear(mli_py_stack *k);

#endif
