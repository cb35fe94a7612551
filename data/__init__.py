"""From LLaVA conversation files to padded batches with labels. Read in this order: records, chat, dataset, collate."""
