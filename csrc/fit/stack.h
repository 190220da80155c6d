/* What is asked of a stack of experts and of the ranks of its groups. */
#ifndef MOLAE_FIT_STACK_H
#define MOLAE_FIT_STACK_H

#include "../molae.h"

/* SHAPE or ARG, with what, expert and group, unless groups are whole and 0 <= rank <= min(k F, D);
 * rank may be NULL. */
molae_status mli_stack_check(const molae_stack *s, const int64_t *rank, molae_errinfo *err);

#endif
