"""The settings of a run: their types, defaults, bounds and help texts. Nothing here imports torch or is slow to import.

A setting is one line in its panel (network, optimization, data, augmentation, evaluation, machine, run). values.py
converts and checks values, config.py joins the panels into one TrainConfig, layers.py combines the defaults, a recipe,
a file and the flags, and identity.py tells which settings determine the results of a run.
"""
