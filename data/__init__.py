"""Reads conversations in the common chat formats and turns them into padded batches with labels.

Read in this order: sources (files -> raw rows), rows (raw row -> conversation), images, table (all rows, checked);
chat (conversation -> ids and labels); dataset (samples, batches, their order), stream (the same without a first pass).
"""
