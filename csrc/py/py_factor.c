/* Wrappers of the joint factorizations. Public functions and docstrings: molae/fit. */
#include "stack.h"

#include "../base/blas.h"
#include "../base/mem.h"

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
factor_lists_new(factor_lists *l, const mli_py_stack *k, const int64_t *rank, int gauge)
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

/* What both factorizations are given, and what they give back. */
typedef struct {
    PyObject *experts, *ids_obj, *ptr_obj, *rank_obj;
    Py_ssize_t first_group, num_threads;
    int output_side, gauge, errors;
    mli_py_stack k;
    factor_lists l;
    PyArrayObject *ids, *ptr, *rank, *spectrum, *energy, *residual, *used_svd;
    const int64_t *ranks;
    molae_form form;
    molae_ctx ctx;
    molae_factors out;
    void *ws;
} factor_call;

static int
factor_open(mli_pystate *st, factor_call *c)
{
    npy_intp dims[2];

    c->form = c->gauge ? MOLAE_FORM_GAUGE : MOLAE_FORM_PLAIN;
    if (mli_py_ctx(st, c->num_threads, 0, &c->ctx) < 0 ||
        mli_py_stack_from(st, &c->k, c->experts,
                          c->output_side ? MOLAE_SIDE_OUTPUT : MOLAE_SIDE_INPUT) < 0)
        return -1;
    dims[0] = c->k.s.E;
    dims[1] = -1;
    if ((c->ids = mli_py_int64_array(st, "ids", c->ids_obj, 1, &dims[0], "n")) == NULL ||
        (c->ptr = mli_py_int64_array(st, "group_ptr", c->ptr_obj, 1, &dims[1], "n")) == NULL)
        return -1;
    for (int64_t e = 0; e < c->k.s.E; e++)
        c->k.ids[e] = ((const int64_t *)PyArray_DATA(c->ids))[e];
    c->k.s.G = PyArray_DIM(c->ptr, 0) - 1;
    c->k.s.group_ptr = PyArray_DATA(c->ptr);
    if (c->rank_obj != Py_None) {
        dims[0] = c->k.s.G;
        if ((c->rank = mli_py_int64_array(st, "rank", c->rank_obj, 1, &dims[0], "n")) == NULL)
            return -1;
        c->ranks = PyArray_DATA(c->rank);
    }
    return 0;
}

/* Results and workspace. ws_bytes is 0 where the call itself says what is wrong. */
static int
factor_make_room(factor_call *c, size_t ws_bytes)
{
    npy_intp dims[2] = {c->k.s.G > 0 ? c->k.s.G : 0, c->k.s.D};

    c->spectrum = (PyArrayObject *)PyArray_ZEROS(2, dims, NPY_DOUBLE, 0);
    c->used_svd = (PyArrayObject *)PyArray_ZEROS(1, dims, NPY_INT32, 0);
    dims[0] = c->k.s.E;
    c->energy = (PyArrayObject *)PyArray_ZEROS(1, dims, NPY_DOUBLE, 0);
    c->residual = (PyArrayObject *)PyArray_ZEROS(1, dims, NPY_DOUBLE, 0);
    if (c->spectrum == NULL || c->used_svd == NULL || c->energy == NULL || c->residual == NULL)
        return -1;
    if (c->ranks != NULL && ws_bytes > 0 && factor_lists_new(&c->l, &c->k, c->ranks, c->gauge) < 0)
        return -1;
    c->ws = mli_lend(ws_bytes);
    if (c->ws == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    c->out = (molae_factors){c->l.shared_p,
                             c->l.perm_p,
                             c->l.private_p,
                             PyArray_DATA(c->spectrum),
                             PyArray_DATA(c->energy),
                             c->errors ? PyArray_DATA(c->residual) : NULL,
                             PyArray_DATA(c->used_svd)};
    return 0;
}

/* Numbers of the failed expert and group in the caller's counting. */
static void
err_in_callers_numbers(molae_errinfo *err, const mli_py_stack *k, int64_t first_group)
{
    if (err->expert >= 0 && err->expert < k->s.E)
        err->expert = k->ids[err->expert];
    if (err->group >= 0)
        err->group += first_group;
}

static PyObject *
factor_result(mli_pystate *st, factor_call *c, molae_status rc, molae_errinfo *err)
{
    err_in_callers_numbers(err, &c->k, c->first_group);
    if (mli_py_raise(st, rc, err) < 0)
        return NULL;
    if (c->ranks == NULL)
        return Py_BuildValue("OOOOOOO", Py_None, Py_None, Py_None, c->spectrum, c->energy, Py_None,
                             c->used_svd);
    return Py_BuildValue("OOOOOOO", c->l.shared, c->l.perm, c->l.private_, c->spectrum, c->energy,
                         c->errors ? (PyObject *)c->residual : Py_None, c->used_svd);
}

static void
factor_close(factor_call *c)
{
    mli_return(c->ws);
    factor_lists_clear(&c->l);
    mli_py_stack_clear(&c->k);
    Py_XDECREF((PyObject *)c->ids);
    Py_XDECREF((PyObject *)c->ptr);
    Py_XDECREF((PyObject *)c->rank);
    Py_XDECREF((PyObject *)c->spectrum);
    Py_XDECREF((PyObject *)c->energy);
    Py_XDECREF((PyObject *)c->residual);
    Py_XDECREF((PyObject *)c->used_svd);
}

/* ---------------------------------------------------------- factor_shared */

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
    PyObject *ret = NULL;
    factor_call c = {0};
    molae_errinfo err = {0};
    molae_status rc;
    size_t ws_bytes;

    if (!PyArg_ParseTuple(args, "OOOOnpppn:factor_shared", &c.experts, &c.ids_obj, &c.ptr_obj,
                          &c.rank_obj, &c.first_group, &c.output_side, &c.gauge, &c.errors,
                          &c.num_threads))
        return NULL;
    if (factor_open(st, &c) < 0)
        goto done;
    ws_bytes = c.k.s.dtype == MOLAE_F64 ? molae_factor_ws_f64(&c.ctx, &c.k.s, c.ranks)
                                        : molae_factor_ws_f32(&c.ctx, &c.k.s, c.ranks);
    if (factor_make_room(&c, ws_bytes) < 0)
        goto done;

    Py_BEGIN_ALLOW_THREADS
    mli_blas_enter();
    rc = c.k.s.dtype == MOLAE_F64 ? molae_factor_shared_f64(&c.ctx, &c.out, &c.k.s, c.ranks, c.form,
                                                            c.ws, ws_bytes, &err)
                                  : molae_factor_shared_f32(&c.ctx, &c.out, &c.k.s, c.ranks, c.form,
                                                            c.ws, ws_bytes, &err);
    mli_blas_leave();
    Py_END_ALLOW_THREADS

    ret = factor_result(st, &c, rc, &err);
done:
    factor_close(&c);
    return ret;
}

/* -------------------------------------------------------- factor_weighted */

PyDoc_STRVAR(
    factor_weighted_doc,
    "factor_weighted($module, W, ids, group_ptr, rank, first_group, output_side, gauge, errors, "
    "num_threads, moments, row_metric, shrinkage, ridge, /)\n--\n\n"
    "The same in the metric of the moments (E,D,D), or (E,F,F) on the output side; see\n"
    "molae.fit.factor_weighted. both are sequences in the order of W, row_metric of (F,F) "
    "or None.");

/* Pointers to one matrix (n,n) an expert of the sequence obj, which *seq keeps alive; all have the
 * type *dtype, which the first sets where it is not known (known = 0). */
static const void **
matrices_from(mli_pystate *st, const char *name, PyObject *obj, int64_t E, int64_t n,
              PyObject **seq, molae_dtype *dtype, int known)
{
    const npy_intp dims[2] = {n, n};
    const void **found;

    *seq = PySequence_Fast(obj, "moments, row_metric: expected a sequence of arrays");
    if (*seq == NULL)
        return NULL;
    if (PySequence_Fast_GET_SIZE(*seq) != E) {
        PyErr_Format(st->ShapeError, "%s: expected %lld matrices, one an expert, got %zd", name,
                     (long long)E, PySequence_Fast_GET_SIZE(*seq));
        return NULL;
    }
    found = mli_alloc((size_t)E * sizeof(void *));
    if (found == NULL)
        return (const void **)PyErr_NoMemory();
    for (int64_t e = 0; e < E; e++) {
        PyObject *item = PySequence_Fast_GET_ITEM(*seq, e);
        PyArrayObject *a = (PyArrayObject *)item;
        molae_dtype own;
        if (!PyArray_Check(item)) {
            PyErr_Format(st->ArgumentError, "%s[%lld]: expected an array", name, (long long)e);
            goto fail;
        }
        if (mli_py_dtype(st, name, a, &own) < 0 || mli_py_check_layout(st, name, a) < 0 ||
            mli_py_check_shape(st, name, a, 2, dims, "WW") < 0)
            goto fail;
        if ((known || e > 0) && own != *dtype) {
            PyErr_SetString(st->ArgumentError,
                            "moments, row_metric: expected one dtype for all experts");
            goto fail;
        }
        *dtype = own;
        found[e] = PyArray_DATA(a);
    }
    return found;
fail:
    mli_free(found);
    return NULL;
}

static PyObject *
py_factor_weighted(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *moments_obj, *rows_obj, *moments_seq = NULL, *rows_seq = NULL, *ret = NULL;
    const void **moment = NULL, **rows = NULL;
    factor_call c = {0};
    molae_metric metric = {0};
    molae_errinfo err = {0};
    molae_status rc;
    size_t ws_bytes;

    if (!PyArg_ParseTuple(args, "OOOOnpppnOOdd:factor_weighted", &c.experts, &c.ids_obj, &c.ptr_obj,
                          &c.rank_obj, &c.first_group, &c.output_side, &c.gauge, &c.errors,
                          &c.num_threads, &moments_obj, &rows_obj, &metric.shrinkage,
                          &metric.ridge))
        return NULL;
    if (factor_open(st, &c) < 0)
        goto done;
    moment = matrices_from(st, "moments", moments_obj, c.k.s.E,
                           c.k.s.side == MOLAE_SIDE_INPUT ? c.k.s.D : c.k.s.F, &moments_seq,
                           &metric.dtype, 0);
    if (moment == NULL)
        goto done;
    if (rows_obj != Py_None && (rows = matrices_from(st, "row_metric", rows_obj, c.k.s.E, c.k.s.F,
                                                     &rows_seq, &metric.dtype, 1)) == NULL)
        goto done;
    metric.moment = moment;
    metric.rows = rows;
    ws_bytes = molae_factor_weighted_ws(&c.ctx, &c.k.s, &metric, c.ranks);
    if (factor_make_room(&c, ws_bytes) < 0)
        goto done;

    Py_BEGIN_ALLOW_THREADS
    mli_blas_enter();
    rc = molae_factor_weighted(&c.ctx, &c.out, &c.k.s, &metric, c.ranks, c.form, c.ws, ws_bytes,
                               &err);
    mli_blas_leave();
    Py_END_ALLOW_THREADS

    ret = factor_result(st, &c, rc, &err);
done:
    factor_close(&c);
    mli_free(moment);
    mli_free(rows);
    Py_XDECREF(moments_seq);
    Py_XDECREF(rows_seq);
    return ret;
}

PyMethodDef mli_py_factor_methods[] = {
    {"factor_shared", py_factor_shared, METH_VARARGS, factor_shared_doc},
    {"factor_weighted", py_factor_weighted, METH_VARARGS, factor_weighted_doc},
    {NULL, NULL, 0, NULL},
};
