"""The output: what computes a `Site`. `eager` is the oracle that every other back end is held against."""
