/* The arguments of a layer of experts, from Python to C: checked, and kept alive. */
#ifndef MOLAE_PY_LAYER_H
#define MOLAE_PY_LAYER_H

#include "args.h"

/* Every array of a call: what it spans, and whether it is written. */
typedef struct {
    struct span {
        const char *lo, *hi;
        const char *name; /* of the argument */
        int out;
    } *at;
    Py_ssize_t n, room;
} mli_py_spans;

/* A projection that keeps its arrays alive, and where its gradients go. */
typedef struct {
    PyArrayObject *group_of, *rank;
    PyObject *lists[5]; /* private, shared, perm; gradients: private, shared */
    const void **private_, **shared;
    const int32_t **perm;
    void **dprivate, **dshared;
    void *dbias;
} mli_py_projection;

/* A call: the layer, its inputs, and what keeps them alive. */
typedef struct {
    molae_experts l;
    npy_intp N, K;
    mli_py_projection gate, up, down;
    PyArrayObject *index, *weight, *x;
    mli_py_spans spans;
    molae_dtype work;    /* F32 or F64 */
    int compressed_wide; /* vectors are (E,3,D) */
} mli_py_call;

/* The call from (x, index, weight, gate, up, down, E, F, activation, alpha, limit, compressed), the
 * last None or (vectors, n). */
int mli_py_call_from(mli_pystate *st, mli_py_call *c, PyObject *tuple);
void mli_py_call_clear(mli_py_call *c);

/* The five arrays that forward saves; `out` where they are written. */
int mli_py_saved_from(mli_pystate *st, mli_py_call *c, PyObject *tuple, void *to[5], int out);

/* Where gradients go, into c->gate, up, down: each a tuple (private or None, shared or None, bias
 * or None). */
int mli_py_grads_from(mli_pystate *st, mli_py_call *c, PyObject *gate, PyObject *up,
                      PyObject *down);

/* *to = where the gradient of compressed experts' vectors goes, NULL where obj is None. */
int mli_py_vectors_output(mli_pystate *st, mli_py_call *c, PyObject *obj, void **to);

/* *to = data of an output (N,cols), NULL where obj is None. */
int mli_py_output(mli_pystate *st, mli_py_call *c, const char *name, PyObject *obj,
                  molae_dtype dtype, npy_intp cols, const char *letters, void **to);

/* *data of an input (N,D) of x's type. */
int mli_py_input(mli_pystate *st, mli_py_call *c, const char *name, PyObject *obj,
                 const void **data);

/* One more array. -1 with MemoryError set where there is no room. */
int mli_py_spans_add(mli_py_spans *s, const char *name, PyArrayObject *a, int out);

/* -1 with ArgumentError set where an output overlaps another array. Puts them in order. */
int mli_py_spans_check(mli_pystate *st, mli_py_spans *s);

#endif
