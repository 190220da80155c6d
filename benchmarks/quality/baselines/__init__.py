"""Other methods, each written from its paper's formulas: a layer and a size give experts."""
