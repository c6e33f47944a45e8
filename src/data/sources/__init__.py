"""Sources of utterances: folders, archives, manifests, Parquet files and the Hub."""
