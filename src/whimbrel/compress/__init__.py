"""Models made smaller: weights of few bits."""
