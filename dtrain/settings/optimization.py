"""Settings of the training itself: how the weights are updated, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dtrain.settings.staged import Staged
from dtrain.settings.values import Panel, above, at_least, setting, within


@dataclass(frozen=True)
class Optimization(Panel):
    """The optimizer, the batch size, how long to train, the learning-rate schedule, and what else affects an update."""

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
        "weight decay; it is not applied to biases, norm parameters and embeddings [default: the optimizer's]",
        at_least(0),
        flags=("--weight-decay", "--wd"),
        of="opt",
    )
    freeze: tuple[str, ...] | None = setting(
        None,
        "parameters that are not trained: patterns for their names, comma-separated, such as 'stem.*'; with @EPOCH "
        "they are trained from that epoch on, counted from 0, such as 'stem.*@3'. Batch norm in a frozen part keeps "
        "its running statistics [default: all parameters are trained]",
    )
    layer_decay: float | None = setting(
        None,
        "layer-wise learning-rate decay: each layer's learning rate is this factor times that of the next layer "
        "towards the head, such as 0.75 [default: the same rate for all layers]",
        within("(0, 1]"),
    )
    head_lr: float | None = setting(
        None,
        "peak learning rate of the head, the layer that computes the logits [default: that of --lr]",
        above(0),
        of="opt",
    )
    batch_size: Staged = setting(
        Staged.parse(128),
        "images in one step, over all processes together; 64,640@200 means 64 at first and 640 from epoch 200 on, "
        "counted from 0",
        flags=("-b", "--batch-size"),
    )
    epochs: float = setting(10.0, "passes over the training set; fractions such as 2.5 are allowed", above(0))
    steps: int | None = setting(None, "number of optimizer updates, in place of --epochs", above(0), of="epochs")
    schedule: str = setting(
        "linear", "learning-rate schedule: a name that `dtrain plugins` lists, or ./file.py:function"
    )
    schedule_opt: dict[str, str] = setting({}, "option of the schedule, as key=value; may be repeated", of="schedule")
    warmup_epochs: float = setting(
        0.0, "epochs at the start over which the learning rate rises linearly from near zero", at_least(0)
    )
    smoothing: float = setting(0.0, "label smoothing, a fraction such as 0.1", within("[0, 1)"))
    clip_grad: float | None = setting(
        None,
        "gradient clipping: a gradient whose norm is larger than this is scaled down to this norm [default: none]",
        above(0),
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "what to do if a loss is not finite: stop ends the run; skip leaves the update of that step out on every "
        "process, also if only its gradient is not finite, until 20 skipped steps in a row end the run",
    )
    grad_accum_steps: int = setting(
        1,
        "number of micro-batches into which each process divides its share of a batch, to save memory; their "
        "gradients are accumulated",
        above(0),
    )
    ema: float | None = setting(
        None,
        "decay of an exponential moving average (EMA) of the weights, such as 0.999; the average is evaluated as well "
        "[default: no average]",
        within("(0, 1)"),
    )
