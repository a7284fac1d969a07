"""The page under load: python -m tests.load, and python -m tests.load.abuse for bad input.

Both start the page as a user does, in a process of its own on this machine, and talk to it over HTTP. No network is
needed. CI runs a short version of each: tests/demo/test_load.py and tests/demo/test_abuse.py.
"""
