"""Speed of sampling, decoding, training and the page, as ratios and against the machine's limits."""
