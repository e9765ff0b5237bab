"""From files to batches: documents, tokens, the order of samples."""
