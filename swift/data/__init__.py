"""Data: from files and data set ids to records, to token ids with loss spans, to batches."""
