/* Thin wrappers of csrc/ops. Public functions, options and docstrings: molae/ops.py. */
#include "layer.h"

#include "../base/blas.h"
#include "../base/mem.h"

/* ------------------------------------------------------------------ route */

PyDoc_STRVAR(route_doc, "route($module, index, E, group_of, G, /)\n--\n\n"
                        "Rows by expert and tokens by group; see molae.ops.route.\n"
                        "Returns (expert_ptr, rows, group_ptr, tokens); the last two are None "
                        "without group_of.");

static PyObject *
py_route(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *index_obj, *group_obj, *ret = NULL;
    PyArrayObject *index = NULL, *group_of = NULL, *ptr = NULL, *rows = NULL, *group_ptr = NULL;
    PyArrayObject *tokens = NULL, *slot_row = NULL;
    Py_ssize_t E, G;
    npy_intp dims[2] = {-1, -1}, n;
    molae_errinfo err = {0};
    molae_status rc;
    void *ws = NULL;

    if (!PyArg_ParseTuple(args, "OnOn:route", &index_obj, &E, &group_obj, &G))
        return NULL;
    if (E < 1 || G < 0)
        return PyErr_Format(st->ArgumentError, "num_experts: expected 1 or more, got %zd", E);
    if ((index = mli_py_int64_array(st, "top_k_index", index_obj, 2, dims, "NK")) == NULL)
        goto done;
    n = E;
    if (group_obj != Py_None &&
        (group_of = mli_py_int64_array(st, "group_of", group_obj, 1, &n, "E")) == NULL)
        goto done;
    dims[0] = PyArray_DIM(index, 0);
    dims[1] = PyArray_DIM(index, 1);
    n = E + 1;
    ptr = (PyArrayObject *)PyArray_EMPTY(1, &n, NPY_INT64, 0);
    n = dims[0] * dims[1];
    rows = (PyArrayObject *)PyArray_EMPTY(1, &n, NPY_INT64, 0);
    slot_row = (PyArrayObject *)PyArray_EMPTY(1, &n, NPY_INT64, 0);
    n = dims[0] * (dims[1] < G ? dims[1] : G);
    tokens = (PyArrayObject *)PyArray_EMPTY(1, &n, NPY_INT64, 0);
    n = G + 1;
    group_ptr = (PyArrayObject *)PyArray_EMPTY(1, &n, NPY_INT64, 0);
    if (ptr == NULL || rows == NULL || slot_row == NULL || tokens == NULL || group_ptr == NULL)
        goto done;
    ws = mli_alloc(molae_route_groups_ws(G));
    if (ws == NULL) {
        PyErr_NoMemory();
        goto done;
    }

    Py_BEGIN_ALLOW_THREADS
    rc = molae_route(PyArray_DATA(ptr), PyArray_DATA(rows), PyArray_DATA(index), dims[0], dims[1],
                     E, &err);
    if (rc >= 0 && group_of != NULL)
        rc = molae_route_groups(PyArray_DATA(group_ptr), PyArray_DATA(tokens),
                                PyArray_DATA(slot_row), PyArray_DATA(index), PyArray_DATA(group_of),
                                dims[0], dims[1], E, G, ws, molae_route_groups_ws(G), &err);
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) < 0)
        goto done;
    if (group_of != NULL)
        ret = Py_BuildValue("OOOO", ptr, rows, group_ptr, tokens);
    else
        ret = Py_BuildValue("OOOO", ptr, rows, Py_None, Py_None);
done:
    mli_free(ws);
    Py_XDECREF((PyObject *)index);
    Py_XDECREF((PyObject *)group_of);
    Py_XDECREF((PyObject *)ptr);
    Py_XDECREF((PyObject *)rows);
    Py_XDECREF((PyObject *)slot_row);
    Py_XDECREF((PyObject *)group_ptr);
    Py_XDECREF((PyObject *)tokens);
    return ret;
}

PyDoc_STRVAR(split_slots_doc, "split_slots($module, index, weights, E, n, /)\n--\n\n"
                              "Slots that run and slots that do not; see molae.ops.split_slots.");

static PyObject *
py_split_slots(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *index_obj, *ret = NULL;
    PyArrayObject *weights, *index = NULL, *main_ = NULL, *aux = NULL;
    Py_ssize_t E, n;
    npy_intp dims[2] = {-1, -1};
    molae_dtype dtype;
    molae_errinfo err = {0};
    molae_status rc;

    if (!PyArg_ParseTuple(args, "OO!nn:split_slots", &index_obj, &PyArray_Type, &weights, &E, &n) ||
        (index = mli_py_int64_array(st, "top_k_index", index_obj, 2, dims, "NK")) == NULL)
        return NULL;
    dims[0] = PyArray_DIM(index, 0);
    dims[1] = PyArray_DIM(index, 1);
    if (mli_py_dtype(st, "top_k_weights", weights, &dtype) < 0 ||
        mli_py_check_layout(st, "top_k_weights", weights) < 0 ||
        mli_py_check_shape(st, "top_k_weights", weights, 2, dims, "NK") < 0)
        goto done;
    if (dtype != MOLAE_F32 && dtype != MOLAE_F64) {
        PyErr_SetString(st->ArgumentError, "top_k_weights: expected float32 or float64");
        goto done;
    }
    main_ = (PyArrayObject *)PyArray_EMPTY(2, dims, NPY_INT64, 0);
    aux = (PyArrayObject *)PyArray_EMPTY(2, dims, NPY_INT64, 0);
    if (main_ == NULL || aux == NULL)
        goto done;

    Py_BEGIN_ALLOW_THREADS
    rc = dtype == MOLAE_F64
             ? molae_split_slots_f64(PyArray_DATA(main_), PyArray_DATA(aux), PyArray_DATA(index),
                                     PyArray_DATA(weights), dims[0], dims[1], E, n, &err)
             : molae_split_slots_f32(PyArray_DATA(main_), PyArray_DATA(aux), PyArray_DATA(index),
                                     PyArray_DATA(weights), dims[0], dims[1], E, n, &err);
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) < 0)
        goto done;
    ret = Py_BuildValue("OO", main_, aux);
done:
    Py_XDECREF((PyObject *)index);
    Py_XDECREF((PyObject *)main_);
    Py_XDECREF((PyObject *)aux);
    return ret;
}

/* ---------------------------------------------------------------- experts */

PyDoc_STRVAR(experts_forward_doc,
             "experts_forward($module, y, saved, known, call, num_threads, borrowed, /)\n--\n\n"
             "One layer of routed experts; see molae.ops.latent_experts_forward. y (N,D) and\n"
             "saved (None, or five arrays) are overwritten, but for what is known, a sum of 1 for\n"
             "gate, 2 for up, 4 for z_up. borrowed: on borrow_threads'.");

static PyObject *
py_experts_forward(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *y_obj, *saved_obj, *call_obj, *ret = NULL;
    Py_ssize_t num_threads;
    int known, borrowed;
    mli_py_call c = {0};
    void *to[5] = {NULL}, *ws = NULL, *y = NULL;
    size_t ws_bytes;
    molae_ctx ctx;
    molae_errinfo err = {0};
    molae_status rc;

    if (!PyArg_ParseTuple(args, "OOiO!np:experts_forward", &y_obj, &saved_obj, &known,
                          &PyTuple_Type, &call_obj, &num_threads, &borrowed))
        return NULL;
    if (known & ~(MOLAE_KNOWN_GATE | MOLAE_KNOWN_UP | MOLAE_KNOWN_Z_UP) ||
        (known != 0 && saved_obj == Py_None))
        return PyErr_Format(st->ArgumentError, "known: expected a sum of 1, 2, 4 and saved arrays");
    if (mli_py_ctx(st, num_threads, borrowed, &ctx) < 0 || mli_py_call_from(st, &c, call_obj) < 0)
        goto done;
    if (mli_py_output(st, &c, "out", y_obj, c.l.io, c.l.D, "ND", &y) < 0 ||
        (saved_obj != Py_None && mli_py_saved_from(st, &c, saved_obj, to, 1) < 0) ||
        mli_py_spans_check(st, &c.spans) < 0)
        goto done;
    ws_bytes = c.work == MOLAE_F64 ? molae_experts_forward_ws_f64(&ctx, &c.l, c.N, c.K)
                                   : molae_experts_forward_ws_f32(&ctx, &c.l, c.N, c.K);
    ws = mli_lend(ws_bytes);
    if (ws == NULL) {
        PyErr_NoMemory();
        goto done;
    }

    Py_BEGIN_ALLOW_THREADS
    mli_blas_enter();
    if (c.work == MOLAE_F64) {
        const molae_experts_saved_f64 s = {to[0], to[1], to[2], to[3], to[4], known};
        rc = molae_experts_forward_f64(&ctx, y, saved_obj == Py_None ? NULL : &s, PyArray_DATA(c.x),
                                       PyArray_DATA(c.index), PyArray_DATA(c.weight), &c.l, c.N,
                                       c.K, ws, ws_bytes, &err);
    } else {
        const molae_experts_saved_f32 s = {to[0], to[1], to[2], to[3], to[4], known};
        rc = molae_experts_forward_f32(&ctx, y, saved_obj == Py_None ? NULL : &s, PyArray_DATA(c.x),
                                       PyArray_DATA(c.index), PyArray_DATA(c.weight), &c.l, c.N,
                                       c.K, ws, ws_bytes, &err);
    }
    mli_blas_leave();
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) < 0)
        goto done;
    ret = Py_NewRef(Py_None);
done:
    mli_return(ws);
    mli_py_call_clear(&c);
    return ret;
}

PyDoc_STRVAR(
    experts_backward_doc,
    "experts_backward($module, grads, overwrite, dy, saved, call, num_threads, borrowed, /)\n"
    "--\n\n"
    "Gradients of one layer; see molae.ops.latent_experts_backward. grads: (dx, dweights,\n"
    "gate, up, down, embeddings), each None, or set (overwrite) or added to; gate, up and down\n"
    "are (private, shared, bias).");

static PyObject *
py_experts_backward(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *grads, *dx_obj, *dw_obj, *gate, *up, *down, *dv_obj, *dy_obj, *saved_obj, *call_obj;
    PyObject *ret = NULL;
    Py_ssize_t num_threads;
    int overwrite, borrowed;
    mli_py_call c = {0};
    void *to[5] = {NULL}, *ws = NULL, *dx = NULL, *dw = NULL, *dv = NULL;
    const void *dy = NULL;
    size_t ws_bytes;
    molae_ctx ctx;
    molae_errinfo err = {0};
    molae_status rc;

    if (!PyArg_ParseTuple(args, "O!pOO!O!np:experts_backward", &PyTuple_Type, &grads, &overwrite,
                          &dy_obj, &PyTuple_Type, &saved_obj, &PyTuple_Type, &call_obj,
                          &num_threads, &borrowed) ||
        !PyArg_ParseTuple(grads, "OOO!O!O!O", &dx_obj, &dw_obj, &PyTuple_Type, &gate, &PyTuple_Type,
                          &up, &PyTuple_Type, &down, &dv_obj))
        return NULL;
    if (mli_py_ctx(st, num_threads, borrowed, &ctx) < 0 || mli_py_call_from(st, &c, call_obj) < 0)
        goto done;
    if (mli_py_input(st, &c, "dy", dy_obj, &dy) < 0 ||
        mli_py_saved_from(st, &c, saved_obj, to, 0) < 0 ||
        mli_py_output(st, &c, "dx", dx_obj, c.work, c.l.D, "ND", &dx) < 0 ||
        mli_py_output(st, &c, "dtop_k_weights", dw_obj, c.work, c.K, "NK", &dw) < 0 ||
        mli_py_vectors_output(st, &c, dv_obj, &dv) < 0 ||
        mli_py_grads_from(st, &c, gate, up, down) < 0 || mli_py_spans_check(st, &c.spans) < 0)
        goto done;
    ws_bytes = c.work == MOLAE_F64 ? molae_experts_backward_ws_f64(&ctx, &c.l, c.N, c.K)
                                   : molae_experts_backward_ws_f32(&ctx, &c.l, c.N, c.K);
    ws = mli_lend(ws_bytes);
    if (ws == NULL) {
        PyErr_NoMemory();
        goto done;
    }

    Py_BEGIN_ALLOW_THREADS
    mli_blas_enter();
    if (c.work == MOLAE_F64) {
        const molae_experts_saved_f64 s = {to[0], to[1], to[2], to[3], to[4], 0};
        const molae_experts_grads_f64 d = {
            dx,
            dw,
            {(double *const *)c.gate.dprivate, (double *const *)c.gate.dshared, c.gate.dbias},
            {(double *const *)c.up.dprivate, (double *const *)c.up.dshared, c.up.dbias},
            {(double *const *)c.down.dprivate, (double *const *)c.down.dshared, c.down.dbias},
            dv,
            overwrite};
        rc = molae_experts_backward_f64(&ctx, &d, dy, &s, PyArray_DATA(c.x), PyArray_DATA(c.index),
                                        PyArray_DATA(c.weight), &c.l, c.N, c.K, ws, ws_bytes, &err);
    } else {
        const molae_experts_saved_f32 s = {to[0], to[1], to[2], to[3], to[4], 0};
        const molae_experts_grads_f32 d = {
            dx,
            dw,
            {(float *const *)c.gate.dprivate, (float *const *)c.gate.dshared, c.gate.dbias},
            {(float *const *)c.up.dprivate, (float *const *)c.up.dshared, c.up.dbias},
            {(float *const *)c.down.dprivate, (float *const *)c.down.dshared, c.down.dbias},
            dv,
            overwrite};
        rc = molae_experts_backward_f32(&ctx, &d, dy, &s, PyArray_DATA(c.x), PyArray_DATA(c.index),
                                        PyArray_DATA(c.weight), &c.l, c.N, c.K, ws, ws_bytes, &err);
    }
    mli_blas_leave();
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) < 0)
        goto done;
    ret = Py_NewRef(Py_None);
done:
    mli_return(ws);
    mli_py_call_clear(&c);
    return ret;
}

/* --------------------------------------------------------------- activate */

PyDoc_STRVAR(activate_doc,
             "activate($module, outs, gate, up, activation, alpha, limit, "
             "num_threads, /)\n--\n\n"
             "Sets outs, (h,) or (h, dgate, dup); all of one shape and of float32 or\n"
             "float64. See molae.ops.activate.");

static PyObject *
py_activate(PyObject *mod, PyObject *args)
{
    mli_pystate *st = PyModule_GetState(mod);
    PyObject *outs;
    PyArrayObject *a[5] = {NULL}; /* gate, up, h, dgate, dup */
    static const char *const name[] = {"gate", "up", "h", "dgate", "dup"};
    int activation;
    double alpha, limit;
    Py_ssize_t num_threads, count;
    molae_dtype type = MOLAE_F32, own;
    molae_ctx ctx;
    molae_errinfo err = {0};
    molae_status rc;
    int64_t n;

    if (!PyArg_ParseTuple(args, "O!O!O!iddn:activate", &PyTuple_Type, &outs, &PyArray_Type, &a[0],
                          &PyArray_Type, &a[1], &activation, &alpha, &limit, &num_threads))
        return NULL;
    count = PyTuple_GET_SIZE(outs);
    if (mli_py_ctx(st, num_threads, 0, &ctx) < 0)
        return NULL;
    if ((count != 1 && count != 3) || activation < 0 || activation > MOLAE_ACT_SWIGLU_CLAMPED) {
        PyErr_SetString(st->ArgumentError, "outs: expected 1 or 3; activation: a known one");
        return NULL;
    }
    for (int i = 0; i < 2 + (int)count; i++) {
        if (i >= 2) {
            PyObject *item = PyTuple_GET_ITEM(outs, i - 2);
            if (!PyArray_Check(item)) {
                PyErr_Format(st->ArgumentError, "%s: expected an array", name[i]);
                return NULL;
            }
            a[i] = (PyArrayObject *)item;
            if (PyArray_FailUnlessWriteable(a[i], name[i]) < 0)
                return NULL;
        }
        if (mli_py_check_layout(st, name[i], a[i]) < 0 || mli_py_dtype(st, name[i], a[i], &own) < 0)
            return NULL;
        if (i == 0)
            type = own;
        if (own != type || (own != MOLAE_F32 && own != MOLAE_F64)) {
            PyErr_Format(st->ArgumentError, "%s: expected float32 or float64, all the same",
                         name[i]);
            return NULL;
        }
        if (!PyArray_SAMESHAPE(a[i], a[0])) {
            PyErr_Format(st->ShapeError, "%s: expected the shape of gate", name[i]);
            return NULL;
        }
    }
    n = PyArray_SIZE(a[0]);
    void *to[5] = {NULL};
    for (int i = 0; i < 5; i++)
        to[i] = a[i] ? PyArray_DATA(a[i]) : NULL;

    Py_BEGIN_ALLOW_THREADS
    rc = type == MOLAE_F64 ? molae_activate_f64(&ctx, to[2], to[3], to[4], to[0], to[1], n,
                                                (molae_activation)activation, alpha, limit)
                           : molae_activate_f32(&ctx, to[2], to[3], to[4], to[0], to[1], n,
                                                (molae_activation)activation, alpha, limit);
    Py_END_ALLOW_THREADS

    if (mli_py_raise(st, rc, &err) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
py_release_scratch(PyObject *mod, PyObject *unused)
{
    (void)mod;
    (void)unused;
    mli_kept_release();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(empty_doc, "empty($module, shape, dtype, /)\n--\n\n"
                        "As numpy.empty; a large array in memory that earlier ones have left.");

static PyObject *
py_empty(PyObject *mod, PyObject *args)
{
    PyArray_Dims shape = {NULL, 0};
    PyArray_Descr *descr = NULL;
    PyObject *ret = NULL;

    (void)mod;
    if (PyArg_ParseTuple(args, "O&O&:empty", PyArray_IntpConverter, &shape, PyArray_DescrConverter,
                         &descr))
        ret = (PyObject *)mli_py_empty(shape.len, shape.ptr, descr);
    PyDimMem_FREE(shape.ptr);
    Py_XDECREF((PyObject *)descr);
    return ret;
}

PyMethodDef mli_py_ops_methods[] = {
    {"empty", py_empty, METH_VARARGS, empty_doc},
    {"split_slots", py_split_slots, METH_VARARGS, split_slots_doc},
    {"route", py_route, METH_VARARGS, route_doc},
    {"experts_forward", py_experts_forward, METH_VARARGS, experts_forward_doc},
    {"activate", py_activate, METH_VARARGS, activate_doc},
    {"experts_backward", py_experts_backward, METH_VARARGS, experts_backward_doc},
    {"release_scratch", py_release_scratch, METH_NOARGS,
     "release_scratch($module, /)\n--\n\nSee molae.ops.release_scratch."},
    {NULL, NULL, 0, NULL},
};
