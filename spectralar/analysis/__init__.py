"""What the tokens do, as numbers and as figures: contributions, influence, quality, statistics, codecs; chart, plots.

May import the models and what they stand on, not the pipeline.
`chart` and `plots` know no model.
"""
