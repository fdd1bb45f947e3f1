"""How the weights are updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dtrain.settings.staged import Staged
from dtrain.settings.values import Panel, above, at_least, setting, within


@dataclass(frozen=True)
class Optimization(Panel):
    """The optimizer, the batch, how long to train, the course of the learning rate, and what else shapes an update."""

    title: ClassVar[str] = "Optimization"
    attribute: ClassVar[str] = "optimization"

    opt: str = setting("sgd", "optimizer: a name that `dtrain optimizers` lists, or ./file.py:function")
    opt_opt: dict[str, str] = setting({}, "option of the optimizer, as key=value; may be repeated", of="opt")
    lr: float | None = setting(
        None,
        "peak learning rate; it is not rescaled with the batch size [default: the optimizer's]",
        above(0),
        of="opt",
    )
    momentum: float | None = setting(None, "momentum [default: the optimizer's]", within("[0, 1)"), of="opt")
    nesterov: bool | None = setting(None, "use Nesterov momentum [default: the optimizer's]", of="opt")
    weight_decay: float | None = setting(
        None,
        "weight decay; biases and norm parameters are exempt [default: the optimizer's]",
        at_least(0),
        flags=("--weight-decay", "--wd"),
        of="opt",
    )
    freeze: tuple[str, ...] | None = setting(
        None,
        "parameters that are not trained: patterns for their names, comma-separated, such as 'stem.*'; with @EPOCH "
        "they are trained from that epoch on: 'stem.*@3'. Batch norm in a frozen part keeps its statistics",
    )
    layer_decay: float | None = setting(
        None,
        "factor between the learning rates of one layer and of the next one towards the head, such as 0.75",
        within("(0, 1]"),
    )
    head_lr: float | None = setting(
        None, "peak learning rate of the head, which gives the logits, in place of --lr", above(0), of="opt"
    )
    batch_size: Staged = setting(
        Staged.parse(128),
        "images in one step, over all processes together; 64,640@200 changes it at epoch 200",
        flags=("-b", "--batch-size"),
    )
    epochs: float = setting(10.0, "passes over the training set; fractions such as 2.5 are allowed", above(0))
    steps: int | None = setting(None, "number of optimizer updates, in place of --epochs", above(0), of="epochs")
    schedule: str = setting(
        "linear", "learning-rate schedule: a name that `dtrain plugins` lists, or ./file.py:function"
    )
    schedule_opt: dict[str, str] = setting({}, "option of the schedule, as key=value; may be repeated", of="schedule")
    warmup_epochs: float = setting(0.0, "epochs over which the learning rate first rises from near zero", at_least(0))
    smoothing: float = setting(0.0, "label smoothing", within("[0, 1)"))
    clip_grad: float | None = setting(None, "scale the gradient of a step down to this norm if it is larger", above(0))
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "what to do when a loss is not finite: end the run (stop), or leave the update of that step out on every "
        "process, also if only its gradient is not finite (skip); 20 skipped steps in a row end the run",
    )
    grad_accum_steps: int = setting(
        1, "number of micro-batches that each process's share of a batch is divided into, to save memory", above(0)
    )
    ema: float | None = setting(
        None, "decay of an exponential moving average of the weights, which is evaluated as well", within("(0, 1)")
    )
