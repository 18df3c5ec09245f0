"""The stages, one readable loop each: no files, no printing, an explicit Generator.

Each is a generator: it does a step when asked for the next metrics (a dict of floats).
"""
