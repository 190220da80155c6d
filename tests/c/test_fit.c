#include "test.h"

#include "../../csrc/base/mem.h"
#include "../../csrc/fit/gauge.h"
#include "../../csrc/kern/kern.h"
#include "../../csrc/molae.h"

#include <math.h>
#include <string.h>

typedef struct {
    int64_t E, F, D, G;
    int64_t ptr[4], rank[3]; /* group_ptr, ranks */
} shape_t;

/* Tall, wide (kF < D), uneven groups, rank 0 and full, one expert, more rows than a chunk. */
static const shape_t shapes[] = {
    {1, 1, 1, 1, {0, 1}, {1}},
    {1, 5, 4, 1, {0, 1}, {2}},
    {4, 6, 7, 1, {0, 4}, {3}},
    {4, 6, 7, 2, {0, 1, 4}, {6, 0}},
    {3, 3, 17, 3, {0, 1, 2, 3}, {3, 1, 2}},
    {2, 2, 30, 1, {0, 2}, {4}},
    {2, 1100, 9, 1, {0, 2}, {5}},
    {5, 8, 8, 2, {0, 2, 5}, {8, 5}},
};

#define REAL float
#define SFX f32
#define EPS 0x1p-23
#define OWN MOLAE_F32
#include "test_fit.inc.h"
#undef REAL
#undef SFX
#undef EPS
#undef OWN

#define REAL double
#define SFX f64
#define EPS 0x1p-52
#define OWN MOLAE_F64
#include "test_fit.inc.h"
#undef REAL
#undef SFX
#undef EPS
#undef OWN

void
test_fit(void)
{
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int way = 0; way < 4; way++) {
            const molae_side side = way & 1 ? MOLAE_SIDE_OUTPUT : MOLAE_SIDE_INPUT;
            const molae_form form = way & 2 ? MOLAE_FORM_GAUGE : MOLAE_FORM_PLAIN;
            factor_f32(&shapes[i], MOLAE_F32, side, form);
            factor_f32(&shapes[i], MOLAE_BF16, side, form);
            factor_f32(&shapes[i], MOLAE_F16, side, form);
            factor_f64(&shapes[i], MOLAE_F64, side, form);
        }
    reduce_f32();
    reduce_f64();
    bad_weights_f32();
    bad_weights_f64();
    dependent_basis_f32();
    complement_f32(1);
    complement_f32(1e-6);
    dependent_basis_f64();
    complement_f64(1);
    complement_f64(1e-6);
}
