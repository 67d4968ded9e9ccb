"""From text to predictors: what the neurons of a store do, and what foresees it in the fewest bytes."""
