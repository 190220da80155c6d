/* Plain words for a status. */
#ifndef MOLAE_BASE_STATUS_H
#define MOLAE_BASE_STATUS_H

#include "../molae.h"

/* Static text, never NULL. */
const char *mli_status_text(molae_status status);

#endif
