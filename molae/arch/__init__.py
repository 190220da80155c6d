"""Model families: which tensors are an expert's, of which shapes, under which names."""

from molae.arch.counts import active_numbers, dense_flops, hit_probabilities, latent_flops
from molae.arch.draft import Draft, draft_family
from molae.arch.factors import check_factors, factored_specs, light_specs
from molae.arch.family import Family
from molae.arch.model import Counts, Model, describe
from molae.arch.promise import promise
from molae.arch.registry import families, find_family, load_family

__all__ = [
    "Counts",
    "Draft",
    "Family",
    "Model",
    "active_numbers",
    "check_factors",
    "dense_flops",
    "describe",
    "draft_family",
    "factored_specs",
    "families",
    "find_family",
    "hit_probabilities",
    "latent_flops",
    "light_specs",
    "load_family",
    "promise",
]
