"""Settings of the network that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dtrain.errors import UsageError
from dtrain.settings.values import Panel, setting


@dataclass(frozen=True)
class Network(Panel):
    """The architecture and its options."""

    title: ClassVar[str] = "Network"
    attribute: ClassVar[str] = "network"

    arch: str = setting(
        "", "architecture: a name that `dtrain archs` lists, or ./file.py:function", flags=("-a", "--arch", "--model")
    )
    arch_opt: dict[str, str] = setting({}, "option of the architecture, as key=value; may be repeated", of="arch")
    sync_bn: bool = setting(False, "compute batch-norm statistics over all processes together (CUDA only)")

    def check(self) -> None:
        """Raise UsageError if no architecture is given, since there is no default."""
        if not self.arch:
            raise UsageError("--arch is missing; `dtrain archs` lists what there is, for a start: --arch allcnn_c")
