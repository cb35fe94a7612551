"""What eval.study does after the runs: results, tables, pictures."""
