"""A smaller model from a large one: what units are worth, surgery, search for a shape, distillation, few bits."""
