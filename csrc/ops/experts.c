/* The expert layer, dense and latent, some of its experts compressed: forward and backward. */
#include "experts.h"

#include <string.h>

#include "../base/mem.h"
#include "../base/real.h"

#define REAL float
#define SFX f32
#define OWN MOLAE_F32
#define ACT act_f32
#define ACT_GRAD act_grad_f32
#define NARROW_STORAGE 1
#include "job.inc.h"
#include "latent.inc.h"

#include "compressed.inc.h"

#include "forward.inc.h"

#include "backward.inc.h"
#undef REAL
#undef SFX
#undef OWN
#undef ACT
#undef ACT_GRAD
#undef NARROW_STORAGE

#define REAL double
#define SFX f64
#define OWN MOLAE_F64
#define ACT act_f64
#define ACT_GRAD act_grad_f64
#define NARROW_STORAGE 0
#include "job.inc.h"
#include "latent.inc.h"

#include "compressed.inc.h"

#include "forward.inc.h"

#include "backward.inc.h"
