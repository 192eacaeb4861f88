"""A smaller model from a large one: what its units are worth, surgery, the search for a shape, distillation."""
