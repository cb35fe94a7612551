"""What eval.compare does: cells, tables, pictures, the report."""
