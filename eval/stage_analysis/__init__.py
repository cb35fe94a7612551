"""What eval.stages does: knock-outs, what layers show, the search for the window."""
