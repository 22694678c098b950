"""What a checkpoint is and what its KV cache costs, as data (report.py) and in words (tables.py)."""
