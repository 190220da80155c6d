/* Thin wrappers of csrc/fit. Public functions, validation of options and docstrings: molae/fit.py.
 */
#include "args.h"

#include "../base/blas.h"
#include "../base/mem.h"

/* ------------------------------------------------------------ the experts */

/* A stack that keeps its arrays alive. */
typedef struct {
    molae_stack s;
    PyObject *seq; /* list or tuple of the arrays */
    const void **W;
    PyArray_Descr *descr; /* their dtype, for what is allocated */
    int64_t *ids;         /* the caller's numbers of the experts, for messages */
} stack;

static void
stack_clear(stack *k)
{
    Py_CLEAR(k->seq);
    Py_CLEAR(k->descr);
    mli_free(k->W);
    mli_free(k->ids);
    k->W = NULL;
    k->ids = NULL;
}

/* One group of all experts until the caller says otherwise. */
static int
stack_from(mli_pystate *st, stack *k, PyObject *experts, molae_side side)
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

/* Numbers of the failed expert and group in the caller's counting. */
static void
err_in_callers_numbers(molae_errinfo *err, const stack *k, int64_t first_group)
{
    if (err->expert >= 0 && err->expert < k->s.E)
        err->expert = k->ids[err->expert];
    if (err->group >= 0)
        err->group += first_group;
}

/* ---------------------------------------------------------- factor_shared */

/* Output arrays of G groups, as lists for Python and as pointers for C. */
typedef struct {
    PyObject *shared, *perm, *private_; /* lists of G arrays */
    void **shared_p, **private_p;
    int32_t **perm_p;
} factor_lists;

static PyArrayObject *
append_empty(PyObject *list, int ndim, npy_intp *dims, PyArray_Descr *descr)
{
    PyArrayObject *a = mli_py_empty(ndim, dims, descr);

    if (a == NULL || PyList_Append(list, (PyObject *)a) < 0) {
        Py_XDECREF((PyObject *)a);
        return NULL;
    }
    Py_DECREF((PyObject *)a); /* the list holds it */
    return a;
}

static int
factor_lists_new(factor_lists *l, const stack *k, const int64_t *rank, int gauge)
{
    const size_t G = (size_t)k->s.G;
    PyArray_Descr *int32 = PyArray_DescrFromType(NPY_INT32);
    int ok = -1;

    l->shared = PyList_New(0);
    l->perm = PyList_New(0);
    l->private_ = PyList_New(0);
    l->shared_p = mli_alloc(G * sizeof(void *));
    l->private_p = mli_alloc(G * sizeof(void *));
    l->perm_p = mli_alloc(G * sizeof(int32_t *));
    if (l->shared == NULL || l->perm == NULL || l->private_ == NULL || int32 == NULL)
        goto done;
    if (l->shared_p == NULL || l->private_p == NULL || l->perm_p == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (int64_t g = 0; g < k->s.G; g++) {
        const int64_t R = rank[g], D = k->s.D, F = k->s.F;
        const int input = k->s.side == MOLAE_SIDE_INPUT;
        npy_intp shared[2] = {R, gauge ? D - R : D};
        npy_intp private_[3] = {k->s.group_ptr[g + 1] - k->s.group_ptr[g], input ? F : R,
                                input ? R : F};
        PyArrayObject *a = append_empty(l->shared, 2, shared, k->descr);
        PyArrayObject *b = a ? append_empty(l->private_, 3, private_, k->descr) : NULL;
        if (b == NULL)
            goto done;
        l->shared_p[g] = PyArray_DATA(a);
        l->private_p[g] = PyArray_DATA(b);
        if (gauge) {
            npy_intp n = D;
            a = append_empty(l->perm, 1, &n, int32);
            if (a == NULL)
                goto done;
            l->perm_p[g] = PyArray_DATA(a);
        } else if (PyList_Append(l->perm, Py_None) < 0) {
            goto done;
        }
    }
    ok = 0;
done:
    Py_XDECREF((PyObject *)int32);
    return ok;
}

static void
factor_lists_clear(factor_lists *l)
{
    Py_CLEAR(l->shared);
    Py_CLEAR(l->perm);
    Py_CLEAR(l->private_);
    mli_free(l->shared_p);
    mli_free(l->private_p);
    mli_free(l->perm_p);
}

PyDoc_STRVAR(
    factor_shared_doc,
    "factor_shared($module, W, ids, group_ptr, rank, first_group, output_side, gauge, errors, "
    "num_threads, /)\n--\n\n"
    "Joint factorization of the groups of a stack; see molae.fit.factor_shared.\n"
    "Returns (shared, perm, private, spectrum, energy, residual, used_svd).");

static PyObject *
py_factor_shared(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *experts, *ids_obj, *ptr_obj, *rank_obj, *ret = NULL;
    PyArrayObject *ids = NULL, *ptr = NULL, *rank = NULL;
    PyArrayObject *spectrum = NULL, *energy = NULL, *residual = NULL, *used_svd = NULL;
    int output_side, gauge, errors;
    Py_ssize_t num_threads, first_group;
    stack k = {0};
    factor_lists l = {0};
    molae_factors out = {0};
    molae_ctx ctx;
    molae_errinfo err = {0};
    molae_status rc;
    void *ws = NULL;
    size_t ws_bytes;
    const int64_t *ranks = NULL;
    npy_intp dims[2];

    if (!PyArg_ParseTuple(args, "OOOOnpppn:factor_shared", &experts, &ids_obj, &ptr_obj, &rank_obj,
                          &first_group, &output_side, &gauge, &errors, &num_threads))
        return NULL;
    if (mli_py_ctx(st, num_threads, 0, &ctx) < 0 ||
        stack_from(st, &k, experts, output_side ? MOLAE_SIDE_OUTPUT : MOLAE_SIDE_INPUT) < 0)
        goto done;
    dims[0] = k.s.E;
    dims[1] = -1;
    if ((ids = mli_py_int64_array(st, "ids", ids_obj, 1, &dims[0], "n")) == NULL ||
        (ptr = mli_py_int64_array(st, "group_ptr", ptr_obj, 1, &dims[1], "n")) == NULL)
        goto done;
    for (int64_t e = 0; e < k.s.E; e++)
        k.ids[e] = ((const int64_t *)PyArray_DATA(ids))[e];
    k.s.G = PyArray_DIM(ptr, 0) - 1;
    k.s.group_ptr = PyArray_DATA(ptr);
    if (rank_obj != Py_None) {
        dims[0] = k.s.G;
        if ((rank = mli_py_int64_array(st, "rank", rank_obj, 1, &dims[0], "n")) == NULL)
            goto done;
        ranks = PyArray_DATA(rank);
    }
    ws_bytes = molae_factor_ws_f32(&ctx, &k.s, ranks); /* 0: the call below says what is wrong */
    if (k.s.dtype == MOLAE_F64)
        ws_bytes = molae_factor_ws_f64(&ctx, &k.s, ranks);

    dims[0] = k.s.G > 0 ? k.s.G : 0;
    dims[1] = k.s.D;
    spectrum = (PyArrayObject *)PyArray_ZEROS(2, dims, NPY_DOUBLE, 0);
    used_svd = (PyArrayObject *)PyArray_ZEROS(1, dims, NPY_INT32, 0);
    dims[0] = k.s.E;
    energy = (PyArrayObject *)PyArray_ZEROS(1, dims, NPY_DOUBLE, 0);
    residual = (PyArrayObject *)PyArray_ZEROS(1, dims, NPY_DOUBLE, 0);
    if (spectrum == NULL || used_svd == NULL || energy == NULL || residual == NULL)
        goto done;
    if (ranks != NULL && ws_bytes > 0 && factor_lists_new(&l, &k, ranks, gauge) < 0)
        goto done;
    ws = mli_lend(ws_bytes);
    if (ws == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    out = (molae_factors){l.shared_p,
                          l.perm_p,
                          l.private_p,
                          PyArray_DATA(spectrum),
                          PyArray_DATA(energy),
                          errors ? PyArray_DATA(residual) : NULL,
                          PyArray_DATA(used_svd)};

    Py_BEGIN_ALLOW_THREADS
    mli_blas_enter();
    rc = k.s.dtype == MOLAE_F64
             ? molae_factor_shared_f64(&ctx, &out, &k.s, ranks,
                                       gauge ? MOLAE_FORM_GAUGE : MOLAE_FORM_PLAIN, ws, ws_bytes,
                                       &err)
             : molae_factor_shared_f32(&ctx, &out, &k.s, ranks,
                                       gauge ? MOLAE_FORM_GAUGE : MOLAE_FORM_PLAIN, ws, ws_bytes,
                                       &err);
    mli_blas_leave();
    Py_END_ALLOW_THREADS

    err_in_callers_numbers(&err, &k, first_group);
    if (mli_py_raise(st, rc, &err) < 0)
        goto done;
    if (ranks == NULL)
        ret = Py_BuildValue("OOOOOOO", Py_None, Py_None, Py_None, spectrum, energy, Py_None,
                            used_svd);
    else
        ret = Py_BuildValue("OOOOOOO", l.shared, l.perm, l.private_, spectrum, energy,
                            errors ? (PyObject *)residual : Py_None, used_svd);
done:
    mli_return(ws);
    factor_lists_clear(&l);
    stack_clear(&k);
    Py_XDECREF((PyObject *)ids);
    Py_XDECREF((PyObject *)ptr);
    Py_XDECREF((PyObject *)rank);
    Py_XDECREF((PyObject *)spectrum);
    Py_XDECREF((PyObject *)energy);
    Py_XDECREF((PyObject *)residual);
    Py_XDECREF((PyObject *)used_svd);
    return ret;
}

/* ------------------------------------------------------------ reduce_rank */

PyDoc_STRVAR(reduce_rank_doc,
             "reduce_rank($module, W, rank, num_threads, /)\n--\n\n"
             "Best rank-R approximation of each expert; see molae.fit.reduce_rank.\n"
             "Returns (approximations, used_svd).");

static PyObject *
py_reduce_rank(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *experts, *ret = NULL;
    PyArrayObject *out = NULL, *used_svd = NULL;
    Py_ssize_t rank, num_threads;
    stack k = {0};
    molae_ctx ctx;
    molae_errinfo err = {0};
    molae_status rc;
    void *ws = NULL;
    size_t ws_bytes;
    npy_intp dims[3];

    if (!PyArg_ParseTuple(args, "Onn:reduce_rank", &experts, &rank, &num_threads))
        return NULL;
    if (mli_py_ctx(st, num_threads, 0, &ctx) < 0 ||
        stack_from(st, &k, experts, MOLAE_SIDE_INPUT) < 0)
        goto done;
    dims[0] = k.s.E;
    dims[1] = k.s.F;
    dims[2] = k.s.D;
    out =
        (PyArrayObject *)PyArray_EMPTY(3, dims, k.s.dtype == MOLAE_F64 ? NPY_DOUBLE : NPY_FLOAT, 0);
    used_svd = (PyArrayObject *)PyArray_ZEROS(1, dims, NPY_INT32, 0);
    if (out == NULL || used_svd == NULL)
        goto done;
    ws_bytes = k.s.dtype == MOLAE_F64 ? molae_reduce_rank_ws_f64(&ctx, &k.s)
                                      : molae_reduce_rank_ws_f32(&ctx, &k.s);
    ws = mli_lend(ws_bytes);
    if (ws == NULL) {
        PyErr_NoMemory();
        goto done;
    }

    Py_BEGIN_ALLOW_THREADS
    mli_blas_enter();
    rc = k.s.dtype == MOLAE_F64
             ? molae_reduce_rank_f64(&ctx, PyArray_DATA(out), PyArray_DATA(used_svd), &k.s, rank,
                                     ws, ws_bytes, &err)
             : molae_reduce_rank_f32(&ctx, PyArray_DATA(out), PyArray_DATA(used_svd), &k.s, rank,
                                     ws, ws_bytes, &err);
    mli_blas_leave();
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) < 0)
        goto done;
    ret = Py_BuildValue("OO", out, used_svd);
done:
    mli_return(ws);
    stack_clear(&k);
    Py_XDECREF((PyObject *)out);
    Py_XDECREF((PyObject *)used_svd);
    return ret;
}

/* ------------------------------------------------------------------ gauge */

PyDoc_STRVAR(gauge_doc, "gauge($module, B, /)\n--\n\n"
                        "Gauge form (M, perm) of a float32 or float64 basis; see molae.fit.gauge.");

static PyObject *
py_gauge(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *obj, *ret = NULL;
    PyArrayObject *B, *M = NULL, *perm = NULL;
    const npy_intp any[2] = {-1, -1};
    npy_intp dims[2], D;
    molae_dtype dtype;
    molae_errinfo err = {0};
    molae_status rc;
    void *ws = NULL;
    size_t ws_bytes;

    if (!PyArg_ParseTuple(args, "O!:gauge", &PyArray_Type, &obj))
        return NULL;
    B = (PyArrayObject *)obj;
    if (mli_py_dtype(st, "B", B, &dtype) < 0 || mli_py_check_layout(st, "B", B) < 0 ||
        mli_py_check_shape(st, "B", B, 2, any, "RD") < 0)
        return NULL;
    if (dtype != MOLAE_F32 && dtype != MOLAE_F64) {
        PyErr_SetString(st->ArgumentError, "B: expected float32 or float64");
        return NULL;
    }
    dims[0] = PyArray_DIM(B, 0);
    D = PyArray_DIM(B, 1);
    dims[1] = D > dims[0] ? D - dims[0] : 0;
    M = (PyArrayObject *)PyArray_EMPTY(2, dims, dtype == MOLAE_F64 ? NPY_DOUBLE : NPY_FLOAT, 0);
    perm = (PyArrayObject *)PyArray_EMPTY(1, &D, NPY_INT32, 0);
    if (M == NULL || perm == NULL)
        goto done;
    ws_bytes = dtype == MOLAE_F64 ? molae_gauge_ws_f64(dims[0], D) : molae_gauge_ws_f32(dims[0], D);
    ws = mli_lend(ws_bytes);
    if (ws == NULL) {
        PyErr_NoMemory();
        goto done;
    }

    Py_BEGIN_ALLOW_THREADS
    mli_blas_enter();
    rc = dtype == MOLAE_F64 ? molae_gauge_f64(PyArray_DATA(M), PyArray_DATA(perm), PyArray_DATA(B),
                                              dims[0], D, ws, ws_bytes, &err)
                            : molae_gauge_f32(PyArray_DATA(M), PyArray_DATA(perm), PyArray_DATA(B),
                                              dims[0], D, ws, ws_bytes, &err);
    mli_blas_leave();
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) < 0)
        goto done;
    ret = Py_BuildValue("OO", M, perm);
done:
    mli_return(ws);
    Py_XDECREF((PyObject *)M);
    Py_XDECREF((PyObject *)perm);
    return ret;
}

/* --------------------------------------------------------- second moments */

PyDoc_STRVAR(
    second_moments_doc,
    "second_moments($module, C, mass, count, x, index, weight, num_threads, /)\n--\n\n"
    "Adds to C (E,W,W), mass (E,) and count (E,); see molae.fit.second_moments. x (N,W) or\n"
    "(N,K,W); weight in the type of C. The caller has seen to it that nothing overlaps.");

static PyObject *
py_second_moments(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyArrayObject *C, *mass, *count, *x, *index, *weight;
    PyTypeObject *type = &PyArray_Type;
    Py_ssize_t num_threads;
    molae_dtype io, work, dtype;
    molae_ctx ctx;
    molae_errinfo err = {0};
    molae_status rc;
    void *ws;
    size_t ws_bytes;
    npy_intp E, N, K, W;

    if (!PyArg_ParseTuple(args, "O!O!O!O!O!O!n:second_moments", type, &C, type, &mass, type, &count,
                          type, &x, type, &index, type, &weight, &num_threads))
        return NULL;
    if (mli_py_ctx(st, num_threads, 0, &ctx) < 0)
        return NULL;
    const struct {
        const char *name, *letters;
        PyArrayObject *a;
        int ndim, written;
    } given[] = {
        {"out.moment", "EWW", C, 3, 1},     {"out.mass", "E", mass, 1, 1},
        {"out.count", "E", count, 1, 1},    {"x", "NKW", x, PyArray_NDIM(x) == 3 ? 3 : 2, 0},
        {"top_k_index", "NK", index, 2, 0}, {"top_k_weights", "NK", weight, 2, 0}};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++) {
        const npy_intp any[3] = {-1, -1, -1};
        if (mli_py_check_layout(st, given[i].name, given[i].a) < 0 ||
            mli_py_check_shape(st, given[i].name, given[i].a, given[i].ndim, any,
                               i == 3 && given[i].ndim == 2 ? "NW" : given[i].letters) < 0)
            return NULL;
        if (given[i].written && PyArray_FailUnlessWriteable(given[i].a, given[i].name) < 0)
            return NULL;
    }
    E = PyArray_DIM(C, 0);
    N = PyArray_DIM(x, 0);
    K = PyArray_DIM(index, 1);
    W = PyArray_DIM(x, PyArray_NDIM(x) - 1);
    const npy_intp square[3] = {E, W, W}, routed[2] = {N, K}, slots[3] = {N, K, W};
    if (mli_py_check_shape(st, "out.moment", C, 3, square, "EWW") < 0 ||
        mli_py_check_shape(st, "out.mass", mass, 1, &E, "E") < 0 ||
        mli_py_check_shape(st, "out.count", count, 1, &E, "E") < 0 ||
        mli_py_check_shape(st, "top_k_index", index, 2, routed, "NK") < 0 ||
        mli_py_check_shape(st, "top_k_weights", weight, 2, routed, "NK") < 0 ||
        (PyArray_NDIM(x) == 3 && mli_py_check_shape(st, "x", x, 3, slots, "NKW") < 0))
        return NULL;
    if (mli_py_dtype(st, "x", x, &io) < 0 || mli_py_dtype(st, "out.moment", C, &work) < 0 ||
        mli_py_dtype(st, "top_k_weights", weight, &dtype) < 0)
        return NULL;
    if (io == MOLAE_F16 || work != (io == MOLAE_F64 ? MOLAE_F64 : MOLAE_F32) || dtype != work ||
        PyArray_TYPE(mass) != NPY_DOUBLE || PyArray_TYPE(count) != NPY_INT64 ||
        PyArray_TYPE(index) != NPY_INT64) {
        PyErr_SetString(st->ArgumentError,
                        "second_moments: x float32 or bfloat16 goes with float32 moments and "
                        "weights, float64 with float64; mass float64, count and top_k_index int64");
        return NULL;
    }
    ws_bytes = work == MOLAE_F64 ? molae_second_moments_ws_f64(&ctx, N, K, E, W)
                                 : molae_second_moments_ws_f32(&ctx, N, K, E, W);
    ws = mli_lend(ws_bytes);
    if (ws == NULL)
        return PyErr_NoMemory();

    Py_BEGIN_ALLOW_THREADS
    mli_blas_enter();
    rc = work == MOLAE_F64
             ? molae_second_moments_f64(&ctx, PyArray_DATA(C), PyArray_DATA(mass),
                                        PyArray_DATA(count), PyArray_DATA(x), io,
                                        PyArray_NDIM(x) == 3, PyArray_DATA(index),
                                        PyArray_DATA(weight), N, K, E, W, ws, ws_bytes, &err)
             : molae_second_moments_f32(&ctx, PyArray_DATA(C), PyArray_DATA(mass),
                                        PyArray_DATA(count), PyArray_DATA(x), io,
                                        PyArray_NDIM(x) == 3, PyArray_DATA(index),
                                        PyArray_DATA(weight), N, K, E, W, ws, ws_bytes, &err);
    mli_blas_leave();
    Py_END_ALLOW_THREADS

    mli_return(ws);
    if (mli_py_raise(st, rc, &err) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyMethodDef mli_py_fit_methods[] = {
    {"second_moments", py_second_moments, METH_VARARGS, second_moments_doc},
    {"factor_shared", py_factor_shared, METH_VARARGS, factor_shared_doc},
    {"reduce_rank", py_reduce_rank, METH_VARARGS, reduce_rank_doc},
    {"gauge", py_gauge, METH_VARARGS, gauge_doc},
    {NULL, NULL, 0, NULL},
};
