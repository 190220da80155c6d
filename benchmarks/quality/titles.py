"""What the rows are called. Apart, so that tables need no torch."""

TITLES = {
    "molae": "MoLAE as published, best group size",
    "blind": "molae, no data",
    "mobe": "MoBE",
    "svd-llm": "SVD-LLM, each expert",
    "d2-moe": "D2-MoE",
    "reap": "REAP, pruning",
    "hc-smoe": "HC-SMoE, merging",
    "even": "molae calibrated, even ranks, groups of 4",
    "one-shot": "molae calibrated, one-shot",
    "calibrated": "molae calibrated",
}
