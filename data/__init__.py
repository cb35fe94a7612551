"""From LLaVA conversation files to padded batches with labels.

Read in this order: files (files -> rows), records (row -> conversation), faults (the check of all rows), images;
render, template and chat (conversation -> ids and labels); dataset, collate, sampler (samples, batches, their order).
"""
