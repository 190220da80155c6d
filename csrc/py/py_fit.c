/* Thin wrappers of csrc/fit. Public functions, validation of options and docstrings: molae/fit.
 */
#include "layer.h"
#include "stack.h"

#include "../base/blas.h"
#include "../base/mem.h"

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
    mli_py_stack k = {0};
    molae_ctx ctx;
    molae_errinfo err = {0};
    molae_status rc;
    void *ws = NULL;
    size_t ws_bytes;
    npy_intp dims[3];

    if (!PyArg_ParseTuple(args, "Onn:reduce_rank", &experts, &rank, &num_threads))
        return NULL;
    if (mli_py_ctx(st, num_threads, 0, &ctx) < 0 ||
        mli_py_stack_from(st, &k, experts, MOLAE_SIDE_INPUT) < 0)
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
    mli_py_stack_clear(&k);
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

/* -------------------------------------------------------- moments_product */

PyDoc_STRVAR(
    moments_product_doc,
    "moments_product($module, op, left, out, W, moments, ridge, num_threads, /)\n--\n\n"
    "Roots of moments (n,n) plus ridge times their mean diagonal (op 0, no W), or each W of a "
    "list\n"
    "times the inverse of what such roots in the place of moments belong to (1), times its "
    "moments\n"
    "(2), or between W and its transpose (3). W (rows,n), with left (n,rows). float32 or float64;\n"
    "roots may be wider than W. out: E arrays of the result's shape; for op 1 may be W itself.");

/* Pointers to the data of a list of matrices of one type; dims[e] of them: so many rows and
 * columns, -1 for any. *type: theirs. -1 with an exception set. */
static int
matrices_at(mli_pystate *st, const char *name, PyObject *list, npy_intp (*dims)[2], int written,
            void **data, molae_dtype *type)
{
    for (Py_ssize_t e = 0; e < PyList_GET_SIZE(list); e++) {
        PyObject *item = PyList_GET_ITEM(list, e);
        PyArrayObject *a = (PyArrayObject *)item;
        molae_dtype own;
        if (!PyArray_Check(item)) {
            PyErr_Format(st->ArgumentError, "%s[%zd]: expected an array", name, e);
            return -1;
        }
        if (mli_py_dtype(st, name, a, &own) < 0 || mli_py_check_layout(st, name, a) < 0 ||
            mli_py_check_shape(st, name, a, 2, dims[e], "RN") < 0 ||
            (written && PyArray_FailUnlessWriteable(a, name) < 0))
            return -1;
        if (e > 0 && own != *type) {
            PyErr_Format(st->ArgumentError, "%s: expected all of one dtype", name);
            return -1;
        }
        *type = own;
        data[e] = PyArray_DATA(a);
        dims[e][0] = PyArray_DIM(a, 0);
        dims[e][1] = PyArray_DIM(a, 1);
    }
    return 0;
}

static PyObject *
py_moments_product(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *out, *W, *M, *first, *ret = NULL;
    void **at = NULL, *ws = NULL;
    double ridge;
    Py_ssize_t num_threads, E;
    int op, left;
    npy_intp(*dims)[2] = NULL;
    int64_t *rows = NULL, n;
    molae_dtype type = MOLAE_F64, metric = MOLAE_F64, written;
    molae_ctx ctx;
    molae_errinfo err = {0};
    molae_status rc;
    size_t ws_bytes;

    if (!PyArg_ParseTuple(args, "ipO!O!O!dn:moments_product", &op, &left, &PyList_Type, &out,
                          &PyList_Type, &W, &PyList_Type, &M, &ridge, &num_threads))
        return NULL;
    if (op < MOLAE_MOMENTS_ROOT || op > MOLAE_MOMENTS_PROJECT)
        return PyErr_Format(st->ArgumentError, "op: expected 0 to 3, got %d", op);
    E = PyList_GET_SIZE(M);
    if (E < 1 || PyList_GET_SIZE(W) != (op == MOLAE_MOMENTS_ROOT ? 0 : E) ||
        PyList_GET_SIZE(out) != E)
        return PyErr_Format(st->ShapeError,
                            "W, out: expected %zd matrices, one for each of the moments, and at "
                            "least 1",
                            E);
    first = PyList_GET_ITEM(M, 0);
    if (!PyArray_Check(first) || PyArray_NDIM((PyArrayObject *)first) != 2) {
        PyErr_SetString(st->ArgumentError, "moments[0]: expected a matrix");
        return NULL;
    }
    n = PyArray_DIM((PyArrayObject *)first, 1);
    if (mli_py_ctx(st, num_threads, 0, &ctx) < 0)
        return NULL;
    at = mli_alloc(3 * (size_t)E * sizeof(void *));
    dims = mli_alloc((size_t)E * sizeof(*dims));
    rows = mli_alloc((size_t)E * sizeof(int64_t));
    if (at == NULL || dims == NULL || rows == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t e = 0; e < E; e++)
        dims[e][0] = dims[e][1] = n;
    if (matrices_at(st, "moments", M, dims, 0, at + E, &metric) < 0)
        goto done;
    for (Py_ssize_t e = 0; e < PyList_GET_SIZE(W); e++)
        dims[e][!left] = n, dims[e][left] = -1;
    if (matrices_at(st, "W", W, dims, 0, at, &type) < 0)
        goto done;
    for (Py_ssize_t e = 0; e < E; e++) {
        rows[e] = dims[e][left];
        if (op == MOLAE_MOMENTS_PROJECT)
            dims[e][1] = dims[e][0];
    }
    if (matrices_at(st, "out", out, dims, 1, at + 2 * E, &written) < 0)
        goto done;
    if (op != MOLAE_MOMENTS_ROOT && written != type) {
        PyErr_SetString(st->ArgumentError, "out: expected the dtype of W");
        goto done;
    }
    ws_bytes = molae_moments_product_ws(&ctx, (molae_moments_op)op, E, rows, n);
    ws = mli_lend(ws_bytes);
    if (ws == NULL) {
        PyErr_NoMemory();
        goto done;
    }

    Py_BEGIN_ALLOW_THREADS
    mli_blas_enter();
    rc = molae_moments_product(&ctx, (molae_moments_op)op, left, at + 2 * E,
                               (const void *const *)at, written, (const void *const *)(at + E),
                               metric, ridge, E, rows, n, ws, ws_bytes, &err);
    mli_blas_leave();
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) < 0)
        goto done;
    ret = Py_NewRef(Py_None);
done:
    mli_return(ws);
    mli_free(at);
    mli_free(dims);
    mli_free(rows);
    return ret;
}

/* ------------------------------------------------------------------ adamw */

PyDoc_STRVAR(adamw_doc, "adamw($module, weights, m, v, gradients, rates, beta1, beta2, eps,\n"
                        "      decay, max_norm, step, num_threads, /)\n--\n\n"
                        "One step of AdamW, in place on lists of w, m and v; the gradients' norm.\n"
                        "max_norm 0: none. See molae.fit.AdamW.");

/* Array i of a step, from the four lists; *dtype is that of the first. */
static int
adamw_array(mli_pystate *st, mli_py_spans *spans, PyObject *const lists[4], Py_ssize_t i,
            molae_adamw_array *to, molae_dtype *dtype)
{
    static const char *const names[4] = {"weights", "m", "v", "gradient"};
    PyArrayObject *a[4];
    molae_dtype own;

    for (int j = 0; j < 4; j++) {
        PyObject *item = PySequence_Fast_GET_ITEM(lists[j], i);
        a[j] = (PyArrayObject *)item;
        if (!PyArray_Check(item)) {
            PyErr_Format(st->ArgumentError, "%s: expected an array", names[j]);
            return -1;
        }
        if (mli_py_dtype(st, names[j], a[j], &own) < 0 ||
            mli_py_check_layout(st, names[j], a[j]) < 0)
            return -1;
        if (i == 0 && j == 0)
            *dtype = own;
        if (own != *dtype || (own != MOLAE_F32 && own != MOLAE_F64)) {
            PyErr_Format(st->ArgumentError, "%s: expected float32 or float64, all alike", names[j]);
            return -1;
        }
        if (PyArray_SIZE(a[j]) != PyArray_SIZE(a[0])) {
            PyErr_Format(st->ShapeError, "%s: expected as many numbers as weights", names[j]);
            return -1;
        }
        if (j < 3 && !PyArray_ISWRITEABLE(a[j])) {
            PyErr_Format(st->ArgumentError, "%s: the array is read-only", names[j]);
            return -1;
        }
        if (mli_py_spans_add(spans, names[j], a[j], j < 3) < 0)
            return -1;
    }
    to->w = PyArray_DATA(a[0]);
    to->m = PyArray_DATA(a[1]);
    to->v = PyArray_DATA(a[2]);
    to->g = PyArray_DATA(a[3]);
    to->n = PyArray_SIZE(a[0]);
    return 0;
}

static PyObject *
py_adamw(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *given[5], *lists[5] = {NULL}, *ret = NULL; /* the last: rates */
    molae_adamw_array *arrays = NULL;
    molae_adamw how;
    mli_py_spans spans = {0};
    molae_dtype dtype = MOLAE_F32;
    Py_ssize_t step, num_threads, count;
    molae_ctx ctx;
    molae_errinfo err = {0};
    molae_status rc;
    size_t ws_bytes;
    void *ws = NULL;
    double norm = 0;

    if (!PyArg_ParseTuple(args, "OOOOOdddddnn:adamw", &given[0], &given[1], &given[2], &given[3],
                          &given[4], &how.beta1, &how.beta2, &how.eps, &how.decay, &how.max_norm,
                          &step, &num_threads) ||
        mli_py_ctx(st, num_threads, 0, &ctx) < 0)
        return NULL;
    for (int j = 0; j < 5; j++) {
        lists[j] = PySequence_Fast(given[j], "adamw: expected lists");
        if (lists[j] == NULL)
            goto done;
        if (PySequence_Fast_GET_SIZE(lists[j]) != PySequence_Fast_GET_SIZE(lists[0])) {
            PyErr_SetString(st->ShapeError, "adamw: expected lists of one length");
            goto done;
        }
    }
    count = PySequence_Fast_GET_SIZE(lists[0]);
    arrays = mli_alloc((size_t)count * sizeof *arrays);
    if (arrays == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        arrays[i].lr = PyFloat_AsDouble(PySequence_Fast_GET_ITEM(lists[4], i));
        if (PyErr_Occurred() || adamw_array(st, &spans, lists, i, &arrays[i], &dtype) < 0)
            goto done;
    }
    if (mli_py_spans_check(st, &spans) < 0)
        goto done;
    ws_bytes = molae_adamw_ws(arrays, count);
    ws = mli_lend(ws_bytes);
    if (ws == NULL) {
        PyErr_NoMemory();
        goto done;
    }

    Py_BEGIN_ALLOW_THREADS
    rc = dtype == MOLAE_F64
             ? molae_adamw_f64(&ctx, &norm, arrays, count, &how, step, ws, ws_bytes, &err)
             : molae_adamw_f32(&ctx, &norm, arrays, count, &how, step, ws, ws_bytes, &err);
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) == 0)
        ret = PyFloat_FromDouble(norm);
done:
    mli_return(ws);
    mli_free(arrays);
    mli_free(spans.at);
    for (int j = 0; j < 5; j++)
        Py_XDECREF(lists[j]);
    return ret;
}

/* ---------------------------------------------------------------- vectors */

/* -1 with an exception unless it is a float32 array that C can read as it is. */
static int
check_f32(mli_pystate *st, const char *name, PyArrayObject *a)
{
    molae_dtype dtype;

    if (mli_py_dtype(st, name, a, &dtype) < 0 || mli_py_check_layout(st, name, a) < 0)
        return -1;
    if (dtype != MOLAE_F32) {
        PyErr_Format(st->ArgumentError, "%s: expected float32", name);
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(dot_doc, "dot($module, a, b, /)\n--\n\n"
                      "Sum of products of two float32 arrays, in double, in one order.");

static PyObject *
py_dot(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyArrayObject *a, *b;
    double sum;

    if (!PyArg_ParseTuple(args, "O!O!:dot", &PyArray_Type, &a, &PyArray_Type, &b) ||
        check_f32(st, "a", a) < 0 || check_f32(st, "b", b) < 0)
        return NULL;
    if (PyArray_SIZE(a) != PyArray_SIZE(b))
        return PyErr_Format(st->ShapeError, "b: expected as many numbers as a");
    Py_BEGIN_ALLOW_THREADS
    sum = molae_dot_f32(PyArray_DATA(a), PyArray_DATA(b), PyArray_SIZE(a));
    Py_END_ALLOW_THREADS
    return PyFloat_FromDouble(sum);
}

PyDoc_STRVAR(row_lengths_doc, "row_lengths($module, x, num_threads, /)\n--\n\n"
                              "Sum of squares of each row of a float32 matrix, in double.");

static PyObject *
py_row_lengths(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    const npy_intp any[2] = {-1, -1};
    PyArrayObject *x, *out;
    Py_ssize_t num_threads;
    molae_ctx ctx;
    npy_intp rows;

    if (!PyArg_ParseTuple(args, "O!n:row_lengths", &PyArray_Type, &x, &num_threads) ||
        mli_py_ctx(st, num_threads, 0, &ctx) < 0 || check_f32(st, "x", x) < 0 ||
        mli_py_check_shape(st, "x", x, 2, any, "RW") < 0)
        return NULL;
    rows = PyArray_DIM(x, 0);
    out = (PyArrayObject *)PyArray_EMPTY(1, &rows, NPY_DOUBLE, 0);
    if (out == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS(void)
    molae_row_lengths_f32(&ctx, PyArray_DATA(out), PyArray_DATA(x), rows, PyArray_DIM(x, 1));
    Py_END_ALLOW_THREADS
    return (PyObject *)out;
}

PyDoc_STRVAR(take_rows_doc, "take_rows($module, src, index, num_threads, /)\n--\n\n"
                            "src[index] of a matrix, by numbers (int64) from 0 on.");

static PyObject *
py_take_rows(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    const npy_intp any[2] = {-1, -1};
    PyArrayObject *src, *index, *out;
    Py_ssize_t num_threads;
    molae_ctx ctx;
    molae_errinfo err = {0};
    molae_status rc;
    npy_intp dims[2];

    if (!PyArg_ParseTuple(args, "O!O!n:take_rows", &PyArray_Type, &src, &PyArray_Type, &index,
                          &num_threads) ||
        mli_py_ctx(st, num_threads, 0, &ctx) < 0 ||
        mli_py_check_shape(st, "src", src, 2, any, "RW") < 0 ||
        mli_py_check_layout(st, "src", src) < 0 ||
        mli_py_check_shape(st, "index", index, 1, any, "N") < 0 ||
        mli_py_check_layout(st, "index", index) < 0)
        return NULL;
    if (PyArray_TYPE(index) != NPY_INT64 || PyDataType_REFCHK(PyArray_DESCR(src)))
        return PyErr_Format(st->ArgumentError, "src, index: expected numbers, and int64");
    dims[0] = PyArray_DIM(index, 0);
    dims[1] = PyArray_DIM(src, 1);
    Py_INCREF(PyArray_DESCR(src));
    out = (PyArrayObject *)PyArray_Empty(2, dims, PyArray_DESCR(src), 0);
    if (out == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = molae_take_rows(&ctx, PyArray_DATA(out), PyArray_DATA(src), PyArray_DIM(src, 0),
                         PyArray_DATA(index), dims[0], dims[1] * (int64_t)PyArray_ITEMSIZE(src),
                         &err);
    Py_END_ALLOW_THREADS
    if (mli_py_raise(st, rc, &err) < 0)
        Py_CLEAR(out);
    return (PyObject *)out;
}

PyMethodDef mli_py_fit_methods[] = {
    {"adamw", py_adamw, METH_VARARGS, adamw_doc},
    {"dot", py_dot, METH_VARARGS, dot_doc},
    {"row_lengths", py_row_lengths, METH_VARARGS, row_lengths_doc},
    {"take_rows", py_take_rows, METH_VARARGS, take_rows_doc},
    {"second_moments", py_second_moments, METH_VARARGS, second_moments_doc},
    {"moments_product", py_moments_product, METH_VARARGS, moments_product_doc},
    {"reduce_rank", py_reduce_rank, METH_VARARGS, reduce_rank_doc},
    {"gauge", py_gauge, METH_VARARGS, gauge_doc},
    {NULL, NULL, 0, NULL},
};
