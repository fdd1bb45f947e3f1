"""The command line, as a Typer application: every command parses its arguments, calls a function and prints its result.

The flags of `train` are made from the settings of TrainConfig. Importing this module does not import torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import dtrain
from dtrain.errors import ExitCode, UsageError, nearest
from dtrain.flags import own_flag, with_flags
from dtrain.plugins import KINDS, find
from dtrain.run import trackers
from dtrain.settings.config import SETTINGS, TrainConfig
from dtrain.settings.data import Data
from dtrain.settings.layers import RUN_CONFIG
from dtrain.settings.machine import Machine
from dtrain.settings.run import Run

app = typer.Typer(
    name="dtrain",
    help="Train image classifiers; stop anywhere, resume bit for bit, on any number of processes.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
TRAIN, LOOK, INSTALLED, BESIDE = (
    "Train",
    "Look at what was trained",
    "Look at what is installed",
    "Data, proofs and benchmarks",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at the settings that a run would use.")
plugins_app = typer.Typer(
    invoke_without_command=True, help="List every plugin and where it comes from; create one of your own."
)
data_app = typer.Typer(no_args_is_help=True, help="Convert data sets; inspect and check the converted files.")
prove_app = typer.Typer(no_args_is_help=True, help="Check dtrain's promises on a run of your own.")
bench_app = typer.Typer(no_args_is_help=True, help="Benchmark dtrain against alternatives on this machine.")
app.add_typer(config_app, name="config", rich_help_panel=TRAIN)
app.add_typer(plugins_app, name="plugins", rich_help_panel=INSTALLED)
app.add_typer(data_app, name="data", rich_help_panel=BESIDE)
app.add_typer(prove_app, name="prove", rich_help_panel=BESIDE)
app.add_typer(bench_app, name="bench", rich_help_panel=BESIDE)

_arguments: list[str] = []  # the command line as given, from which --nproc makes those of the processes that it starts
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
QuickFlag = Annotated[bool, typer.Option("--quick", help="Run few and short turns, to try it out; not for records.")]
LoaderFlag = Annotated[str, typer.Option(help="reader of the images: auto, ffcv or memory")]
DeviceFlag = Annotated[str | None, typer.Option(help="auto, cpu or cuda; by default the run's own")]
DataDirFlag = Annotated[Path | None, typer.Option(help="folder of the named data sets; by default the run's own")]
CacheDirFlag = Annotated[Path | None, typer.Option(help="folder of the converted files; by default the run's own")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def run(arguments: list[str]) -> None:
    """Parse and run one command line.

    Raises DtrainError, KeyboardInterrupt after Ctrl-C, and SystemExit with the exit code of a run that --nproc started.
    """
    _arguments[:] = arguments
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="dtrain", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # only click's usage errors have it; Typer may bring its own click
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # such as `dtrain data` alone; its help has been printed
            return
        flag, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
        if flag is None or context is None or type(error).__name__ != "NoSuchOption":
            raise UsageError(" ".join(error.format_message().split())) from None
        known = [name for p in context.command.params for name in (*p.opts, *p.secondary_opts) if name[:2] == "--"]
        raise UsageError(f"{flag} is not a flag; {nearest(flag, known)}") from None
    if code == ExitCode.STOPPED_UNSAVED:  # Typer turns KeyboardInterrupt into this code
        raise KeyboardInterrupt
    if isinstance(code, int) and code:
        sys.exit(code)


ConfigFile = Annotated[
    Path | None, own_flag("--config", Run.title, "TOML file of settings, such as the config.toml of a run", "PATH")
]
DryRun = Annotated[
    bool,
    own_flag(
        "--dry-run", Run.title, "print the plan, shapes, parameters, memory and first learning rates; do not train"
    ),
]
Nproc = Annotated[
    int,
    own_flag("--nproc", Machine.title, "number of processes to start on this machine \\[default: 1]", "N"),
]
Debug = Annotated[bool, own_flag("--debug", Run.title, "print the traceback of an error too")]


# -- commands ----------------------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(dtrain.__version__)
        raise typer.Exit(ExitCode.DONE)


def _train(
    settings: dict[str, Any], config: ConfigFile = None, dry_run: DryRun = False, nproc: Nproc = 1, debug: Debug = False
) -> None:
    """Train a network. The same command again continues a run that was stopped. The word `train` may be left out."""
    asked = TrainConfig.of(config, **settings)
    if nproc < 1:
        raise UsageError(f"--nproc {nproc}: give 1 or more")
    find("architecture", asked.network.arch)  # reports a misspelled name before torch is imported, which is slow
    find("optimizer", asked.optimization.opt)
    find("schedule", asked.optimization.schedule)
    trackers.find(asked.run.track)
    if nproc > 1:
        from dtrain.commands.launch import launch

        if code := launch(_arguments, nproc):
            raise typer.Exit(code)
    elif dry_run:
        from dtrain.commands.dry_run import dry_run as show

        show(asked)
    else:
        from dtrain.training import train

        train(asked, command=sys.argv)


app.command("train", rich_help_panel=TRAIN)(with_flags(_train))


def _config_show(settings: dict[str, Any], config: ConfigFile = None, json_: JsonFlag = False) -> None:
    """Print every setting with its value and where the value comes from."""
    from dtrain.commands.show import config_rows, print_table

    print_table("settings", config_rows(TrainConfig.of(config, **settings)), as_json=json_)


config_app.command("show")(with_flags(_config_show))


def _here(**given: Any) -> dict[str, Any]:
    """The settings given to a command that reads a run; they replace the run's own values."""
    return {name: SETTINGS[name].value(value) for name, value in given.items() if value is not None}


@app.command("eval", rich_help_panel=LOOK)
def _eval(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    checkpoint: Annotated[str, typer.Option(help="last, best or the step of a checkpoint")] = "last",
    loader: LoaderFlag = "auto",
    device: DeviceFlag = None,
    data_dir: DataDirFlag = None,
    cache_dir: CacheDirFlag = None,
    json_: JsonFlag = False,
) -> None:
    """Evaluate a checkpoint of a run: loss, top-1 and top-5 accuracy, and the accuracy for each class."""
    from dtrain.commands.evaluate import evaluate_run, print_evaluation
    from dtrain.files import finite

    result = evaluate_run(run, checkpoint, _here(loader=loader, device=device, data_dir=data_dir, cache_dir=cache_dir))
    print(json.dumps(finite(result))) if json_ else print_evaluation(result)


@app.command("replay", rich_help_panel=LOOK)
def _replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    step: Annotated[int, typer.Option(metavar="K", help="the step, counted from 1 as in metrics.jsonl and the log")],
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="folder for the pictures; by default ./replay-RUN-STEP")
    ] = None,
    loader: LoaderFlag = "auto",
    device: DeviceFlag = None,
    data_dir: DataDirFlag = None,
    cache_dir: CacheDirFlag = None,
    json_: JsonFlag = False,
) -> None:
    """Compute one step of a run again: print losses, gradient norm and what is not finite; draw the batch's images."""
    from dtrain.commands.replay import print_replay, replay
    from dtrain.files import finite

    here = _here(loader=loader, device=device, data_dir=data_dir, cache_dir=cache_dir)
    result = replay(run, step, out, here)
    print(json.dumps(finite(result))) if json_ else print_replay(result)


@app.command("runs", rich_help_panel=LOOK)
def _runs(
    folder: Annotated[Path, typer.Argument(help="the folder that holds the runs")] = Path("runs"),
    json_: JsonFlag = False,
) -> None:
    """List the runs in a folder with status, step and accuracy."""
    from dtrain.commands.show import print_table
    from dtrain.run.rundir import summaries

    print_table("runs", summaries(folder), as_json=json_)


@app.command("sync", rich_help_panel=LOOK)
def _sync(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    track: Annotated[str, typer.Option(help="trackers, separated by commas; by default those of the run")] = "",
    json_: JsonFlag = False,
) -> None:
    """Send the rows of a run's metrics.jsonl to trackers such as wandb: those that a tracker has not received yet."""
    from dtrain.commands.sync import sync_run

    sync_run(run, SETTINGS["track"].value(track), as_json=json_)


@app.command("archs", rich_help_panel=INSTALLED)
def _archs(json_: JsonFlag = False) -> None:
    """List the installed architectures, without importing them."""
    from dtrain.commands.show import plugin_rows, print_table

    print_table("architectures", plugin_rows("architecture"), as_json=json_)


@app.command("optimizers", rich_help_panel=INSTALLED)
def _optimizers(json_: JsonFlag = False) -> None:
    """List the installed optimizers, without importing them."""
    from dtrain.commands.show import plugin_rows, print_table

    print_table("optimizers", plugin_rows("optimizer"), as_json=json_)


@plugins_app.callback()
def _plugins(context: typer.Context, json_: JsonFlag = False) -> None:
    """List all architectures, optimizers, schedules, data sets, trackers and recipes, and the package of each.

    None of them is imported. `dtrain plugins new` creates a package of your own.
    """
    from dtrain.commands.show import plugin_rows, print_table, recipe_rows

    if context.invoked_subcommand is None:
        rows = [row for kind in KINDS for row in plugin_rows(kind)] + recipe_rows()
        print_table("plugins", rows, as_json=json_)


@plugins_app.command("new")
def _plugins_new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name of the package and its architecture: my_net")],
    into: Annotated[Path, typer.Option(metavar="PATH", help="the folder in which the package is created")] = Path(),
) -> None:
    """Create a package of your own, with a small architecture, a recipe and a test for you to change."""
    from dtrain.commands.new_plugin import new_plugin, next_steps

    print(next_steps(new_plugin(name, into)))


def _data_convert(
    settings: dict[str, Any], dataset: Annotated[str, typer.Argument(help="a named data set, a folder or a tar file")]
) -> None:
    """Convert a data set to .beton files before training, and print their paths."""
    asked = Data.of({**settings, "dataset": dataset})
    from dtrain.commands.data import convert
    from dtrain.run.console import Console

    for beton in Console(True).converting(convert(asked)).values():
        print(beton.path)


CONVERSION = ("data_dir", "cache_dir", "image_size", "resize", "store_size", "bad_images", "dataset_opt")
data_app.command("convert")(with_flags(_data_convert, CONVERSION))


@data_app.command("inspect")
def _data_inspect(beton: Annotated[Path, typer.Argument()], json_: JsonFlag = False) -> None:
    """Print the facts about a .beton file: images, classes, sizes, mean and standard deviation, origin."""
    from dtrain.commands.data import inspect
    from dtrain.commands.show import print_facts

    print_facts(inspect(beton), as_json=json_)


@data_app.command("verify")
def _data_verify(beton: Annotated[Path, typer.Argument()], json_: JsonFlag = False) -> None:
    """Check the structure of a .beton file and the checksum of its bytes."""
    from dtrain.commands.data import verify
    from dtrain.commands.show import print_facts

    print_facts(verify(beton), as_json=json_)


@data_app.command("show", context_settings=PASS_ON)
def _data_show(
    context: typer.Context,
    step: Annotated[int, typer.Option(help="the step whose batch is drawn, counted from 1")] = 1,
    images: Annotated[int, typer.Option(help="how many images of the batch are drawn")] = 32,
    out: Annotated[Path, typer.Option(help="the PNG file to write")] = Path("sheet.png"),
    run: Annotated[Path | None, typer.Option(help="run directory whose settings are used")] = None,
) -> None:
    """Draw the training images of a step as the network receives them. Give --run, or flags of `train` after `--`."""
    if images < 1:
        raise UsageError(f"--images {images}: give 1 or more")
    asked = _asked(context.args, run)
    from dtrain.commands.data import show

    print(show(asked, step, images, out))


def _asked(arguments: list[str], run: Path | None) -> TrainConfig:
    """The settings that are given by flags of `train` and, below them, by a run. An architecture need not be given."""
    layers: list[tuple[dict[str, Any], Path | None]] = []

    def keep(settings: dict[str, Any], config: ConfigFile = None) -> None:
        layers.append((settings, config))

    parser = typer.Typer(add_completion=False)
    parser.command()(with_flags(keep))
    typer.main.get_command(parser).main(args=arguments, prog_name="dtrain train", standalone_mode=False)
    if not layers:  # --help, which has been printed
        raise typer.Exit(ExitCode.DONE)
    settings, config = layers[0]
    if run is not None:
        config = run / RUN_CONFIG
        if not config.is_file():
            raise UsageError(f"--run {run}: no run is there; give a run directory")
    if config is None and "arch" not in settings:  # the architecture decides on gray or RGB images; without one, RGB
        settings = {"arch": "none", "channels": "3", **settings}
    return TrainConfig.of(config, **settings)


@prove_app.command("resume", context_settings=PASS_ON)
def _prove_resume(
    context: typer.Context,
    stops: Annotated[int, typer.Option(help="how often the run is stopped or killed, at random steps")] = 5,
    json_: JsonFlag = False,
) -> None:
    """Check that stopping and killing a run does not change a bit of its result. Flags of `train` follow `--`."""
    from dtrain.commands.prove import prove_resume, report

    report(prove_resume(context.args, stops=stops), as_json=json_)


@prove_app.command("ranks", context_settings=PASS_ON)
def _prove_ranks(
    context: typer.Context,
    worlds: Annotated[str, typer.Option(help="the numbers of processes, separated by commas")] = "1,2,4",
    json_: JsonFlag = False,
) -> None:
    """Check that samples, schedule and accuracy do not depend on the process count. Flags of `train` follow `--`."""
    from dtrain.commands.prove import prove_ranks, report

    numbers = [w.strip() for w in worlds.split(",")]
    if not all(w.isdecimal() and int(w) > 0 for w in numbers):
        raise UsageError(f"--worlds {worlds}: give numbers of processes, such as 1,2,4")
    report(prove_ranks(context.args, worlds=[int(w) for w in numbers]), as_json=json_)


@bench_app.command("overhead")
def _bench_overhead(quick: QuickFlag = False, json_: JsonFlag = False) -> None:
    """Compare a full training run with a bare training loop on one batch that stays in memory."""
    from dtrain_bench.overhead import main

    main(quick=quick, as_json=json_)


@bench_app.command("loaders")
def _bench_loaders(quick: QuickFlag = False, json_: JsonFlag = False) -> None:
    """Compare the image readers with the same augmentation on an array in memory."""
    from dtrain_bench.loaders import main

    main(quick=quick, as_json=json_)


@bench_app.command("peers")
def _bench_peers(
    network: Annotated[
        list[str] | None, typer.Option(help="allcnn_c or small, may be repeated; by default both")
    ] = None,
    turns: Annotated[int, typer.Option(help="how often each trainer is run")] = 5,
    data_dir: Annotated[
        Path, typer.Option(help="the folder with CIFAR-10; if it is not there, synthetic images are used")
    ] = Path("data"),
    quick: QuickFlag = False,
    json_: JsonFlag = False,
) -> None:
    """Compare images per second with plain PyTorch, Lightning and Accelerate, data loading included."""
    from dtrain_bench.peers import main

    main(networks=network or ["allcnn_c", "small"], turns=turns, data_dir=data_dir, quick=quick, as_json=json_)


__all__ = ["app", "run"]
