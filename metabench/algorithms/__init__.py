"""Meta-learning algorithms, one file per method; `base` holds what they share."""
