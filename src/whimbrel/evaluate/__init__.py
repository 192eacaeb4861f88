"""Evaluation: tasks, answers kept by what they depend on, scores with intervals, comparisons, sweeps of the budget."""
