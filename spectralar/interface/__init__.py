"""What goes into the pipeline and comes out of it: class labels, images, arguments of a generation, outputs.

May import the models and what they stand on.
Values that come from a person are checked here, and trusted further in.
"""
