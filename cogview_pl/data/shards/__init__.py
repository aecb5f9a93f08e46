"""Tar shards: headers, keys, and an index that is kept between runs."""
