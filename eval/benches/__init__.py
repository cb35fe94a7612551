"""What eval.bench measures."""
