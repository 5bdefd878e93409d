"""Where rows come from: one reader a format, each a piece at a time, so that memory does not grow with the source.

row       what every reader gives, and the errors that all of them share
lines     lines of a file, packed or not
jsonl     one JSON object a line
sheets    comma- and tab-separated values
parquet   Parquet files
datasets  Hugging Face data sets, local or on the hub
"""
