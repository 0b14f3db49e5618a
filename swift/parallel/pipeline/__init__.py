"""Pipeline parallelism: the blocks of a decoder in several processes, through which micro-batches go one after the other."""
