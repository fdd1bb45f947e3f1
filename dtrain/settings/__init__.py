"""What a user may say, and nothing else: no torch, and nothing that takes long to import.

A setting is one line in its panel (network, optimization, data, augmentation, evaluation, machine, run). values.py is
what values may be, config.py all panels as one TrainConfig, layers.py where values come from, identity.py which of them
make a run what it is.
"""
