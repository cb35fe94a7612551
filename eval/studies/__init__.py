"""What eval.study keeps of a run, and its tables."""
