#include "stack.h"

#include "../base/mem.h"

void
mli_py_stack_clear(mli_py_stack *k)
{
    Py_CLEAR(k->seq);
    Py_CLEAR(k->descr);
    mli_free(k->W);
    mli_free(k->ids);
    k->W = NULL;
    k->ids = NULL;
}

int
mli_py_stack_from(mli_pystate *st, mli_py_stack *k, PyObject *experts, molae_side side)
{
    static const char *const letters[] = {"FD", "DF"};
    npy_intp dims[2] = {-1, -1};
    Py_ssize_t E;

    k->seq = PySequence_Fast(experts, "W: expected a sequence of arrays");
    if (k->seq == NULL)
        return -1;
    E = PySequence_Fast_GET_SIZE(k->seq);
    if (E == 0) {
        PyErr_SetString(st->ShapeError, "W: expected at least one expert");
        return -1;
    }
    k->W = mli_alloc((size_t)E * sizeof(void *));
    k->ids = mli_alloc((size_t)E * sizeof(int64_t));
    if (k->W == NULL || k->ids == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t e = 0; e < E; e++) {
        PyObject *item = PySequence_Fast_GET_ITEM(k->seq, e);
        PyArrayObject *a = (PyArrayObject *)item;
        molae_dtype dtype;
        if (!PyArray_Check(item)) {
            PyErr_Format(st->ArgumentError, "W[%zd]: expected an array", e);
            return -1;
        }
        if (mli_py_dtype(st, "W", a, &dtype) < 0 || mli_py_check_layout(st, "W", a) < 0 ||
            mli_py_check_shape(st, "W", a, 2, dims, letters[side]) < 0)
            return -1;
        if (e == 0) {
            dims[0] = PyArray_DIM(a, 0);
            dims[1] = PyArray_DIM(a, 1);
            k->s.dtype = dtype;
            k->descr = (PyArray_Descr *)Py_NewRef((PyObject *)PyArray_DESCR(a));
        } else if (dtype != k->s.dtype) {
            PyErr_Format(st->ArgumentError, "W[%zd]: every expert needs the dtype of the first", e);
            return -1;
        }
        k->W[e] = PyArray_DATA(a);
        k->ids[e] = e;
    }
    k->s.E = E;
    k->s.F = side == MOLAE_SIDE_INPUT ? dims[0] : dims[1];
    k->s.D = side == MOLAE_SIDE_INPUT ? dims[1] : dims[0];
    k->s.side = side;
    k->s.W = k->W;
    return 0;
}
