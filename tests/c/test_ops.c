#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/kern/kern.h"
#include "../../csrc/molae.h"
#include "../../csrc/ops/product.h"

#include <math.h>
#include <string.h>

enum { E = 5, GUARD = 16, MOST = 4 };

/* Groups of unequal size in no order; dense, latent, of rank 0, and one group of all. */
typedef struct {
    int64_t G;
    int64_t group_of[E];
    int64_t rank[MOST];
} parts_t;

typedef struct {
    int64_t N, K, D, F;
    parts_t gate, up, down;
} layer_t;

#define DENSE {1, {0}, {-1}}

static const layer_t layers[] = {
    {0, 2, 4, 3, DENSE, DENSE, DENSE},
    {1, 1, 1, 1, DENSE, DENSE, DENSE},
    {1, 3, 70, 270, {2, {0, 1, 0, 1, 1}, {5, 70}}, {1, {0}, {3}}, {1, {0}, {4}}},
    {9, 2, 7, 5, {3, {2, 0, 0, 1, 2}, {3, -1, 0}}, DENSE, {2, {0, 1, 1, 0, 1}, {2, -1}}},
    {70, 4, 11, 9, {1, {0}, {11}}, {2, {0, 0, 1, 1, 1}, {1, -1}}, {3, {1, 0, 2, 2, 0}, {6, 0, 11}}},
    {300, 1, 6, 265, {1, {0}, {2}}, {1, {0}, {6}}, {4, {3, 1, 0, 2, 2}, {1, 2, 3, -1}}},
};

/* A block between guards; they are looked at when it is given back. */
static void *
guarded(size_t bytes)
{
    const size_t body = (bytes + 63) / 64 * 64;
    unsigned char *p = mli_alloc(body + 128 + sizeof bytes);

    memset(p, 0xA5, 64);
    memset(p + 64, 0xFF, body); /* NaN */
    memset(p + 64 + bytes, 0x5A, body - bytes + 64);
    memcpy(p + 128 + body, &bytes, sizeof bytes);
    memcpy(p, &bytes, sizeof bytes);
    return p + 64;
}

static void
unguard(void *block)
{
    unsigned char *p = (unsigned char *)block - 64;
    size_t bytes, body;
    int intact = 1;

    memcpy(&bytes, p, sizeof bytes);
    body = (bytes + 63) / 64 * 64;
    for (size_t i = sizeof bytes; i < 64; i++)
        intact &= p[i] == 0xA5;
    for (size_t i = bytes; i < body + 64; i++)
        intact &= p[64 + i] == 0x5A;
    CHECK(intact);
    mli_free(p);
}

/* The last two of four by weight; equal weights by number, sentinels like any other. */
static void
splits(void)
{
    const int64_t index[8] = {3, 1, 0, 2, E, 4, 4, 0};
    const float weight[8] = {0.5F, 0.1F, 0.1F, 0.3F, 0.2F, 0.2F, 0.2F, 0.9F};
    const int64_t want[8] = {3, E, E, 2, E, 4, E, 0};
    int64_t run[8], aux[8];
    molae_errinfo err;

    CHECK(molae_split_slots_f32(run, aux, index, weight, 2, 4, E, 2, &err) == MOLAE_OK);
    for (int i = 0; i < 8; i++) {
        CHECK(run[i] == want[i]);
        CHECK(aux[i] == (run[i] == E ? index[i] : E));
    }
    CHECK(molae_split_slots_f32(run, aux, index, weight, 2, 4, E, 4, &err) == MOLAE_E_ARG);
    CHECK(molae_split_slots_f32(run, aux, index, weight, 2, 4, 4, 1, &err) == MOLAE_E_ARG);
    CHECK(molae_split_slots_f32(run, aux, index, weight, -1, 4, E, 1, &err) == MOLAE_E_SHAPE);
}

static void
routes(void)
{
    const int64_t index[8] = {2, 0, 3, 2, 2, 2, 1, 3}, group_of[3] = {1, -1, 0};
    int64_t ptr[4], rows[8], group_ptr[3], tokens[8], slot_row[8];
    const int64_t want_ptr[4] = {0, 1, 2, 6}, want_rows[6] = {1, 6, 0, 3, 4, 5};
    const int64_t want_group[3] = {0, 3, 4}, want_tokens[4] = {0, 1, 2, 0};
    const int64_t want_row[8] = {0, 0, -1, 1, 2, 2, -1, -1};
    const int64_t bad[2] = {0, 4};
    size_t bytes = molae_route_groups_ws(2);
    void *ws = guarded(bytes);
    molae_errinfo err;

    CHECK(molae_route(ptr, rows, index, 4, 2, 3, &err) == MOLAE_OK);
    CHECK(memcmp(ptr, want_ptr, sizeof want_ptr) == 0);
    CHECK(memcmp(rows, want_rows, sizeof want_rows) == 0);
    CHECK(molae_route_groups(group_ptr, tokens, slot_row, index, group_of, 4, 2, 3, 2, ws, bytes,
                             &err) == MOLAE_OK);
    CHECK(memcmp(group_ptr, want_group, sizeof want_group) == 0);
    CHECK(memcmp(tokens, want_tokens, sizeof want_tokens) == 0);
    CHECK(memcmp(slot_row, want_row, sizeof want_row) == 0);
    CHECK(molae_route(ptr, rows, bad, 1, 2, 3, &err) == MOLAE_E_ARG && err.info == 4);
    CHECK(molae_route_groups(group_ptr, tokens, slot_row, index, group_of, 4, 2, 3, 1, ws, bytes,
                             &err) == MOLAE_E_ARG &&
          err.expert == 0);
    CHECK(molae_route_groups(group_ptr, tokens, slot_row, index, group_of, 4, 2, 3, 2, ws, 0,
                             &err) == MOLAE_E_ARG);
    unguard(ws);
}

#define REAL float
#define SFX f32
#define EPS 0x1p-23
#define OWN MOLAE_F32
#include "test_ops.inc.h"
#undef REAL
#undef SFX
#undef EPS
#undef OWN

#define REAL double
#define SFX f64
#define EPS 0x1p-52
#define OWN MOLAE_F64
#include "test_ops.inc.h"

void
test_ops(void)
{
    splits();
    routes();
    products_f32(MOLAE_F32, 0);
    products_f32(MOLAE_BF16, 0);
    products_f32(MOLAE_BF16, 1);
    products_f64(MOLAE_F64, 0);
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++)
        for (int form = MOLAE_FORM_PLAIN; form <= MOLAE_FORM_GAUGE; form++) {
            layer_f32(&layers[i], MOLAE_F32, (molae_form)form);
            layer_f32(&layers[i], MOLAE_BF16, (molae_form)form);
            layer_f64(&layers[i], MOLAE_F64, (molae_form)form);
        }
}
