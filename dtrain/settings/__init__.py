"""What a user may say, and nothing else: no torch, and nothing that takes long to import.

A setting is one line in its panel (network, optimization, data, augmentation, evaluation, machine, run). values.py is
what values may be, layers.py where they come from, identity.py which of them make a run what it is.
"""

from dtrain.settings.config import PANELS, SETTINGS, TrainConfig
from dtrain.settings.values import flag_of

__all__ = ["PANELS", "SETTINGS", "TrainConfig", "flag_of"]
