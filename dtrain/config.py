"""What a run is a function of: one frozen, flat dataclass, and the layers it is made from.

One field is one flag is one TOML key. Layers: defaults < recipe < `--config FILE` < flags, and every value knows which
of them it came from (`TrainConfig.origins`, shown by `dtrain config show`). Nothing changes a config afterwards:
numbers that follow from it are in `plan.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dtrain.errors import PluginError, UsageError, nearest
from dtrain.files import canonical_json
from dtrain.plugins import find_recipe, read_recipe, recipe_for
from dtrain.ranges import check_ranges, flag_of
from dtrain.schedules import SCHEDULES

Mark = Literal["result", "place"]
# What belongs to a choice: a layer that chooses otherwise than those below it begins these anew; the options that a
# recipe gives Muon are nothing to SGD.
BELONGS = {
    "arch": ("arch_opt",),
    "opt": ("opt_opt", "momentum", "nesterov", "weight_decay"),
    "schedule": ("schedule_opt",),
}
RESIZES, BAD_IMAGES = ("crop", "squash"), ("stop", "skip")
OWN_SIZE = 64  # a folder or tar of equal squares up to this side keeps it: small sets are drawn for their size
LARGEST_SIZE = 4096  # 48 MiB an image; a slip of the keyboard is larger
RUN_CONFIG, CHECKPOINTS = "config.toml", "checkpoints"  # in a run directory; dtrain/run/ writes them


def setting(
    default: Any, panel: str, mark: Mark, help: str, *, flags: tuple[str, ...] = (), choices: tuple[str, ...] = ()
) -> Any:
    """One field: its default, where `--help` lists it, whether it shapes the numbers, what it means, its unit."""
    about = {"panel": panel, "mark": mark, "help": help, "flags": flags, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Conversion:
    """What is asked of a conversion: two of these are two betons. Raises UsageError for a value out of range.

    image_size, store_size: sides in pixels, None for what the source gives. The betons hold the larger.
    """

    image_size: int | None = None
    resize: str = "crop"
    store_size: int | None = None
    bad_images: str = "stop"

    def __post_init__(self) -> None:
        for name, choices in (("resize", RESIZES), ("bad_images", BAD_IMAGES)):
            if (value := getattr(self, name)) not in choices:
                raise UsageError(f"{flag_of(name)} {value}: not a choice; {nearest(value, choices)}")
        for name in ("image_size", "store_size"):
            size = getattr(self, name)
            if size is not None and not 1 <= size <= LARGEST_SIZE:
                raise UsageError(f"{flag_of(name)} {size}: give a number in 1..{LARGEST_SIZE}")
        if self.store_size is not None and self.store_size < (self.image_size or LARGEST_SIZE):
            size = f"below --image-size {self.image_size}" if self.image_size else "needs an --image-size"
            raise UsageError(f"--store-size {self.store_size}: {size}; images are cut out of what is stored")

    @property
    def stored_size(self) -> int | None:
        """The side of the images in the betons, None for what the source gives."""
        return self.store_size or self.image_size


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. `result` fields shape the numbers; `place` fields say where and how it is computed.

    Built by hand it is taken as it is; `TrainConfig.of(arch=..., dataset=...)` adds the recipe, as the commands do.
    Raises UsageError for a value out of range, naming the flag.
    """

    # What is trained
    arch: str = setting(
        "",
        "What is trained",
        "result",
        "architecture: `dtrain archs` lists them; or ./file.py:function",
        flags=("-a", "--arch", "--model"),
    )
    arch_opt: dict[str, str] = setting(
        {}, "What is trained", "result", "option of the architecture, key=value; repeatable"
    )
    recipe: str | None = setting(
        None,
        "What is trained",
        "place",
        "named settings; 'none' for bare defaults [default: chosen by architecture and data set]",
    )
    ema: float | None = setting(
        None, "What is trained", "result", "decay of an exponential moving average of the weights, in (0, 1)"
    )
    sync_bn: bool = setting(False, "What is trained", "result", "batch-norm statistics over all processes (CUDA only)")
    seed: int = setting(
        0, "What is trained", "result", "integer from which order, augmentation, dropout and initial weights follow"
    )
    # Optimization
    opt: str = setting("sgd", "Optimization", "result", "optimizer: `dtrain optimizers` lists them")
    opt_opt: dict[str, str] = setting({}, "Optimization", "result", "option of the optimizer, key=value; repeatable")
    lr: float = setting(0.05, "Optimization", "result", "peak learning rate for the whole global batch; never rescaled")
    momentum: float | None = setting(None, "Optimization", "result", "momentum, in [0, 1) [default: the optimizer's]")
    nesterov: bool | None = setting(None, "Optimization", "result", "Nesterov's momentum [default: the optimizer's]")
    weight_decay: float | None = setting(
        None,
        "Optimization",
        "result",
        "weight decay, not applied to biases and norms [default: the optimizer's]",
        flags=("--weight-decay", "--wd"),
    )
    freeze: tuple[str, ...] | None = setting(
        None,
        "Optimization",
        "result",
        "parameters that are not trained, by patterns for their names, comma-separated, such as 'stem.*'; with @EPOCH "
        "not before that epoch: 'stem.*@3'. Batch norm in a frozen part keeps its statistics",
    )
    layer_decay: float | None = setting(
        None,
        "Optimization",
        "result",
        "factor in (0, 1] by which the learning rate of each layer is smaller than that of the next one towards the "
        "classifier",
    )
    head_lr: float | None = setting(
        None, "Optimization", "result", "peak learning rate of the classifier, in place of --lr"
    )
    batch_size: int = setting(
        128, "Optimization", "result", "images in one step over all processes together", flags=("-b", "--batch-size")
    )
    epochs: float = setting(10.0, "Optimization", "result", "passes over the training set; 2.5 is allowed")
    steps: int | None = setting(None, "Optimization", "result", "optimizer updates, instead of --epochs")
    schedule: str = setting("linear", "Optimization", "result", "course of the learning rate", choices=tuple(SCHEDULES))
    schedule_opt: dict[str, str] = setting(
        {}, "Optimization", "result", "option of the schedule, key=value; repeatable"
    )
    warmup_epochs: float = setting(0.0, "Optimization", "result", "epochs over which the learning rate rises first")
    smoothing: float = setting(0.0, "Optimization", "result", "label smoothing, in [0, 1)")
    clip_grad: float | None = setting(None, "Optimization", "result", "largest norm of the gradient of a step")
    on_nonfinite: str = setting(
        "stop",
        "Optimization",
        "result",
        "what a loss that is not finite does: it ends the run (stop), or the update of its step, as of one whose "
        "gradient is not finite, is left out on every process (skip); 20 such steps in a row end the run",
        choices=("stop", "skip"),
    )
    grad_accum_steps: int = setting(
        1, "Optimization", "result", "micro-batches that each process's share of a batch is cut into"
    )
    # Data
    dataset: str = setting(
        "cifar10",
        "Data",
        "result",
        "digits, synthetic, mnist, cifar10, cifar100; a folder or tar with train/CLASS/ and val|test/CLASS/; a folder "
        "with train.beton and val|test.beton",
    )
    data_dir: Path = setting(Path("data"), "Data", "place", "where named data sets are looked for and downloaded to")
    cache_dir: Path | None = setting(
        None, "Data", "place", "where converted data sets are kept [default: the user's cache folder]"
    )
    image_size: int | None = setting(
        None,
        "Data",
        "result",
        "side in pixels of the images that the network sees [default: the set's own; of folders and tars 224, or their "
        f"own where all are equal squares of at most {OWN_SIZE}]",
    )
    resize: str = setting(
        "crop",
        "Data",
        "result",
        "how a picture becomes square; crop: short side to size, middle kept; squash: both sides to size",
        choices=RESIZES,
    )
    store_size: int | None = setting(
        None,
        "Data",
        "result",
        "side in pixels of the images that are stored, to cut --image-size out of: anew for each training image, the "
        "middle in an evaluation [default: image size]",
    )
    channels: str = setting(
        "auto",
        "Data",
        "result",
        "of the images that the network sees; auto: 1 if every training image is gray and the architecture takes "
        "in_channels, else 3",
        choices=("auto", "1", "3"),
    )
    bad_images: str = setting(
        "stop",
        "Data",
        "result",
        "what to do about a picture that cannot be decoded; skip: leave it out and tell",
        choices=BAD_IMAGES,
    )
    val_split: float | None = setting(
        None, "Data", "result", "fraction of the training set to evaluate on instead of the test set, in (0, 1)"
    )
    loader: str = setting(
        "auto",
        "Data",
        "place",
        "how batches are read; auto: ffcv where it can be imported",
        choices=("auto", "ffcv", "memory"),
    )
    flip: bool = setting(False, "Data", "result", "mirror training images left to right, half of them")
    shift: int = setting(0, "Data", "result", "move training images by up to this many pixels each way, black outside")
    cutout: int = setting(0, "Data", "result", "side in pixels of a square of training images set to the mean")
    scale: tuple[float, ...] | None = setting(
        None,
        "Data",
        "result",
        "show a part of each training image, stretched to full size: least and largest fraction of its area, such as "
        "0.35,1, with sides as 3 to 4 up to 4 to 3",
    )
    affine: tuple[float, ...] | None = setting(
        None,
        "Data",
        "result",
        "turn, move, zoom and shear training images by up to: degrees, fraction of the side, fraction, degrees; such "
        "as 15 or 15,0.1,0.1,5; black outside",
    )
    jitter: tuple[float, ...] | None = setting(
        None,
        "Data",
        "result",
        "change brightness, contrast and saturation of training images by up to these fractions, such as 0.4,0.4,0.4, "
        "or one number for all three",
    )
    erase: float = setting(
        0.0, "Data", "result", "probability that a rectangle of a training image, 2 to 33 % of it, is set to the mean"
    )
    mixup: float = setting(
        0.0,
        "Data",
        "result",
        "blend training images in pairs, and their labels: alpha of the share's Beta distribution, such as 0.2; "
        "training accuracy then counts the heavier label",
    )
    cutmix: float = setting(
        0.0,
        "Data",
        "result",
        "exchange a rectangle in pairs of training images, and that share of their labels: alpha, such as 1; with "
        "--mixup each takes half of the pairs",
    )
    mean: tuple[float, ...] | None = setting(
        None, "Data", "result", "per channel, in 0..1, comma-separated [default: of the training set]"
    )
    std: tuple[float, ...] | None = setting(
        None, "Data", "result", "per channel, in 0..1, comma-separated [default: of the training set]"
    )
    # Evaluation
    eval_batch_size: int = setting(
        500, "Evaluation", "result", "images in a chunk of an evaluation, the same for any number of processes"
    )
    eval_every: str = setting("1epoch", "Evaluation", "result", "how often to evaluate: 500steps, 1epoch, or 'end'")
    stop_at_accuracy: float | None = setting(
        None, "Evaluation", "result", "end the run at this top-1 fraction, in (0, 1]"
    )
    # Machine
    device: str = setting("auto", "Machine", "place", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    backend: str = setting(
        "auto",
        "Machine",
        "place",
        "of torch.distributed; auto: nccl on cuda, else gloo",
        choices=("auto", "gloo", "nccl"),
    )
    threads: int = setting(
        0, "Machine", "place", "compute threads of one process; 0: this process's share of the cores"
    )
    dist_timeout: float = setting(
        300.0, "Machine", "place", "seconds after which a process that does not answer is given up"
    )
    amp_dtype: str = setting(
        "auto",
        "Machine",
        "result",
        "type of the arithmetic; weights stay float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    channels_last: bool = setting(True, "Machine", "result", "memory layout of images and filters")
    compile: bool = setting(False, "Machine", "result", "torch.compile the network")
    deterministic: bool = setting(False, "Machine", "result", "only deterministic kernels (CUDA), slower")
    # The run
    output: Path | None = setting(
        None, "The run", "place", "run directory [default: runs/<arch>-<dataset>-<digest of the settings>]"
    )
    name: str | None = setting(None, "The run", "place", "name of the run directory under runs/")
    resume: str = setting(
        "auto",
        "The run",
        "place",
        "auto: go on where this run stopped; none: a new run; or the path of a run or checkpoint",
    )
    checkpoint_every: str = setting(
        "1epoch", "The run", "place", "how often to save: 500steps, 1epoch, 10min, or 'end'"
    )
    keep: int = setting(2, "The run", "place", "checkpoints to keep beside the last and the best")
    log_interval: int = setting(50, "The run", "place", "steps between two log lines")
    track: tuple[str, ...] = setting(
        (), "The run", "place", "trackers to send the curves to, comma-separated: wandb, tensorboard, csv"
    )
    max_time: str | None = setting(None, "The run", "place", "save and stop after this long: 90s, 45min, 2h")

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        for f in settings_fields():  # TrainConfig(epochs=10) is --epochs 10: one value, one digest
            if (value := getattr(self, f.name)) is not None:
                object.__setattr__(self, f.name, coerced(f.name, value))
        check(self)

    @classmethod
    def of(cls, file: Path | None = None, **flags: Any) -> TrainConfig:
        """The config of these settings in layers: defaults < recipe < `file` < `flags`; None means not given.

        Values may be given as the command line gives them (strings) or in their own types. With the path of a run or
        checkpoint in `resume`, and neither a file nor an architecture, the file is that run's own config.toml.
        Raises UsageError for an unknown key or value, naming the nearest; PluginError for a broken recipe.
        """
        given = {name: coerced(name, value) for name, value in flags.items() if value is not None}
        if file is None and "arch" not in given:
            file = _config_of_run(given.get("resume", "auto"))
        read = read_config(file) if file is not None else {}
        from_file = {name: coerced(name, value) for name, value in read.items()}
        if {"epochs", "steps"} <= given.keys():
            raise UsageError("--epochs and --steps: both say how long to train; give one of them")
        asked = {**from_file, **given}
        name = asked.get("recipe") or recipe_for(asked.get("arch", ""), _dataset_name(asked))
        layers: list[tuple[str, Mapping[str, Any]]] = [(str(file), from_file), ("flag", given)]
        if name not in (None, "none"):
            layers.insert(0, (f"recipe {name}", _from_recipe(name)))
            layers.insert(0, ("architecture and data set", {"recipe": name}))  # unless a later layer says so itself
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for origin, layer in layers:
            for name in _left_behind(values, layer):
                values.pop(name, None)
                origins.pop(name, None)
            for name, value in layer.items():
                # options of one table add up over the layers: --arch-opt dropout=true keeps the recipe's norm=batch
                values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
                origins[name] = origin
        return cls(**values, origins=origins)

    @classmethod
    def stored(cls, table: Mapping[str, Any]) -> TrainConfig:
        """The config of a run's config.toml or checkpoint: every value as it was, no recipe looked up."""
        if unknown := [name for name in table if name not in _names()]:
            coerced(unknown[0], None)
        return cls(**table, origins=dict.fromkeys(table, "run"))

    @classmethod
    def elsewhere(cls, table: Mapping[str, Any], here: Mapping[str, Any]) -> TrainConfig:
        """`stored`, to look at a run in one process elsewhere: `here` has its device, folders and loader."""
        # over one process synchronised batch norm is batch norm, which the CPU has as well
        return cls.stored({**table, **here, "backend": "auto", "sync_bn": False})

    def origin(self, name: str) -> str:
        """Which layer the value of field `name` came from."""
        return self.origins.get(name, "default")

    def conversion(self) -> Conversion:
        """What is asked of the data set's conversion."""
        return Conversion(self.image_size, self.resize, self.store_size, self.bad_images)

    def settings(self) -> dict[str, Any]:
        """Every field and its value as plain JSON and TOML types; None is left out, since TOML has no null.

        They stand for themselves: the recipe that they came from is in them, so `recipe` is none.
        """
        values = {f.name: getattr(self, f.name) for f in settings_fields()} | {"recipe": "none"}
        return {name: _plain(value) for name, value in values.items() if value is not None and value != {}}

    def results(self) -> dict[str, Any]:
        """The fields that shape the numbers: what two runs must share to be one run."""
        marks = {f.name: f.metadata["mark"] for f in settings_fields()}
        return {name: value for name, value in self.settings().items() if marks[name] == "result"}

    def digest(self) -> str:
        """Eight hex digits of the result fields as asked: the end of the run directory's name."""
        return hashlib.sha256(canonical_json(self.results())).hexdigest()[:8]

    def run_name(self) -> str:
        """The run directory's name under runs/ unless the user gives one."""
        arch = Path(self.arch).name.replace(".py:", "-") if ".py:" in self.arch else self.arch
        arch = re.sub(r"[^\w.-]+", "-", arch).strip("-.")
        return self.name or f"{arch}-{_dataset_name({'dataset': self.dataset})}-{self.digest()}"


def settings_fields() -> list[dataclasses.Field[Any]]:
    """The fields of TrainConfig that are settings, in the order of `--help`."""
    return [f for f in dataclasses.fields(TrainConfig) if f.metadata]


def _names() -> list[str]:
    return [f.name for f in settings_fields()]


_HINTS: dict[str, Any] = {}


def type_of(name: str) -> tuple[Any, bool]:
    """A field's type without Optional, and whether it was optional."""
    if not _HINTS:
        _HINTS.update(get_type_hints(TrainConfig))
    hint = _HINTS[name]
    arms = [a for a in get_args(hint) if a is not type(None)]
    optional = type(None) in get_args(hint)
    return (arms[0], True) if optional and get_origin(hint) is not dict else (hint, False)


def coerced(name: str, value: Any) -> Any:
    """`value` as the type of field `name`; accepts the command line's strings and TOML's types.

    Raises UsageError for an unknown name or a value that is not of the type.
    """
    if name not in _names():
        raise UsageError(f"{name} is not a setting; {nearest(name, _names())}")
    kind, _ = type_of(name)
    try:
        return _convert(kind, value)
    except _Unfit as error:
        raise UsageError(f"{flag_of(name)} {value}: {error}") from None


class _Unfit(Exception):
    """A value that is not of its field's type; the message says what to give."""


def _convert(kind: Any, value: Any) -> Any:
    if get_origin(kind) is dict:
        return _options(value)
    if get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        if get_args(kind)[0] is str:
            return tuple(name for part in parts if (name := str(part).strip()))
        return tuple(_number(float, part) for part in parts)
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise _Unfit("give true or false")
        return str(value).lower() == "true"
    if kind in (int, float):
        return _number(kind, value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # channels = 1 in a file
    if not isinstance(value, str | Path):
        raise _Unfit("give text")
    return Path(value).expanduser() if kind is Path else str(value)


def _number(kind: type[int] | type[float], value: Any) -> int | float:
    whole = kind is int
    try:
        number = kind(value)
        if isinstance(value, bool) or (whole and isinstance(value, float) and value != number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise _Unfit(f"give a {'whole ' if whole else ''}number") from None
    return number


def _options(value: Any) -> dict[str, str]:
    """Options as text by key: from ["k=v", ...] of the command line or a table of a TOML file."""
    if isinstance(value, Mapping):
        return {str(k): _option_text(v) for k, v in value.items()}
    pairs = {}
    for item in [value] if isinstance(value, str) else value:
        key, equals, text = str(item).partition("=")
        if not equals or not key:
            raise _Unfit("give key=value")
        pairs[key.strip()] = text.strip()
    return pairs


def _option_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(_option_text(item) for item in value)
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _left_behind(values: Mapping[str, Any], layer: Mapping[str, Any]) -> list[str]:
    """The settings among `values` that belong to something which `layer` chooses otherwise."""
    left = ["steps"] if "epochs" in layer else []
    for name, belongings in BELONGS.items():
        before = values.get(name, getattr(TrainConfig, name))
        if name in layer and _bare(layer[name]) != _bare(before):
            left += belongings
    return left


def _bare(value: Any) -> Any:
    """A plugin's name without its distribution."""
    return value.rpartition("::")[2] if isinstance(value, str) else value


def _from_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe. Raises PluginError naming its distribution if they are none."""
    recipe = find_recipe(name)
    try:
        return {key: coerced(key, value) for key, value in read_recipe(recipe).items()}
    except PluginError:
        raise
    except UsageError as error:
        raise PluginError(f"recipe {recipe.name} of {recipe.distribution}: {error}") from None


def _config_of_run(resume: str) -> Path | None:
    """The config.toml of the run that `--resume PATH` means; None where it is no path."""
    if resume in ("auto", "none"):
        return None
    path = Path(resume)
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    if not (run / RUN_CONFIG).is_file():
        raise UsageError(f"--resume {resume}: no run is there; give a run directory, auto or none")
    return run / RUN_CONFIG


def read_config(path: Path) -> dict[str, Any]:
    """The table of a TOML file such as a run's config.toml. Raises UsageError naming the file and what is wrong."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; give a TOML file such as a run's config.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not TOML: {error}") from None


def _dataset_name(asked: Mapping[str, Any]) -> str:
    """The data set's name for recipes and run directories: a path counts by its last part without endings."""
    text = str(asked.get("dataset", TrainConfig.dataset))
    return Path(text).name.split(".")[0] if "/" in text or "." in text else text


def check(config: TrainConfig) -> None:
    """Raise UsageError for the first field that is out of its range or not one of its choices."""
    if not config.arch:
        raise UsageError("--arch is missing; `dtrain archs` lists what there is, for a start: --arch allcnn_c")
    for f in settings_fields():
        value = getattr(config, f.name)
        if f.metadata["choices"] and value not in f.metadata["choices"]:
            raise UsageError(f"{flag_of(f.name)} {value}: not a choice; {nearest(str(value), f.metadata['choices'])}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{flag_of(f.name)} {value}: give a finite number")
    check_ranges(vars(config))
    config.conversion()
