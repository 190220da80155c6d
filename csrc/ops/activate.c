/* h = act(gate, up) of many rows; the contract is that of molae_activate_f32 in molae.h. */
#include "../base/par.h"
#include "../base/real.h"
#include "../kern/kern.h"

/* Numbers of a task: three arrays of them stay in the second cache. */
enum { PIECE = 16384, ONES = 1024 };

#define REAL float
#define SFX f32
#define ACT act_f32
#define ACT_GRAD act_grad_f32
#include "activate.inc.h"
#undef REAL
#undef SFX
#undef ACT
#undef ACT_GRAD

#define REAL double
#define SFX f64
#define ACT act_f64
#define ACT_GRAD act_grad_f64
#include "activate.inc.h"
