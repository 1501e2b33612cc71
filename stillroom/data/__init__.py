"""Data: seeded embedded sets, folders, parquet files and hub ids, and the order in which batches visit them."""
