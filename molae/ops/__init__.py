"""Layers of routed experts, forward and backward: the array API.

NumPy arrays in, NumPy arrays out. One layer is

``y_t = Σ_k g_tk (W_down,i act(W_gate,i x_t + b_gate,i, W_up,i x_t + b_up,i) + b_down,i)``

with the experts ``i = top_k_index[t, k]`` and the weights ``g = top_k_weights``. Each of gate,
up and down is either dense, an array of all experts' matrices, or a `Projection`, whose groups
of experts share a latent factor (see `molae.fit`). A latent layer never rebuilds a matrix: a
token is projected once per group, experts work on the latent rows, and what they give is added
up in latent space before one shared factor lifts it.

Letters: N tokens, K experts of a token, E experts, F expert width, D model width, k experts of
a group, G groups, R rank. An entry E of `top_k_index` is a sentinel: "not here", nothing added.

Arithmetic is float64 for float64 `x`, and float32 for `x` of float32 or
`ml_dtypes.bfloat16`. With float32 arithmetic each projection may be float32 or bfloat16;
gradients of bfloat16 weights are float32.
"""

from molae.ops.activation import ACTIVATIONS, activate
from molae.ops.activation import Activation as Activation
from molae.ops.call import ROLES as ROLES
from molae.ops.compressed import (
    compressed_experts_backward,
    compressed_experts_forward,
    from_authors_layout,
    to_authors_layout,
)
from molae.ops.decode import decode_fp8, decode_mxfp4
from molae.ops.layers import (
    experts_backward,
    experts_forward,
    latent_experts_backward,
    latent_experts_forward,
    release_scratch,
)
from molae.ops.narrow import NarrowExperts, narrow_experts_forward
from molae.ops.projection import Projection
from molae.ops.results import Gradients, ProjectionGradients, Saved
from molae.ops.routing import Routing, route, split_slots

__all__ = [
    "ACTIVATIONS",
    "Gradients",
    "NarrowExperts",
    "Projection",
    "ProjectionGradients",
    "Routing",
    "Saved",
    "activate",
    "compressed_experts_backward",
    "compressed_experts_forward",
    "decode_fp8",
    "decode_mxfp4",
    "experts_backward",
    "experts_forward",
    "from_authors_layout",
    "latent_experts_backward",
    "latent_experts_forward",
    "narrow_experts_forward",
    "release_scratch",
    "route",
    "split_slots",
    "to_authors_layout",
]
