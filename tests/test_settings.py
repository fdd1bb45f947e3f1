"""Claims about settings: where each value comes from, what is refused, what makes two runs one."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import tomli_w
from warm import REPOSITORY, Warm

from dtrain.data.augment import RECORDS
from dtrain.errors import UsageError
from dtrain.plugins import listed, read_recipe, recipes
from dtrain.settings import identity
from dtrain.settings.augmentation import Augmentation
from dtrain.settings.config import PANELS, SETTINGS, TrainConfig
from dtrain.settings.staged import Staged
from dtrain.settings.values import Every, Setting, Span, Unfit

SMALL = {"arch": "resnet18", "recipe": "none"}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -- layers ------------------------------------------------------------------------------------------------------------


def test_defaults_give_way_to_the_recipe_to_the_file_to_the_flags(tmp_path: Path) -> None:
    file = write(tmp_path / "my.toml", "batch_size = 100\nshift = 3\n[arch_opt]\ndropout = true\n")
    config = TrainConfig.of(file, arch="allcnn_c", dataset="digits", shift="1", arch_opt=["dropout=false"])
    recipe = "recipe allcnn_c-digits"
    expected = {  # value and origin; the recipe says batch_size 64, epochs 8, shift 2, norm=batch
        "seed": (0, "default"),
        "epochs": (8.0, recipe),
        "batch_size": (Staged.parse(100), str(file)),
        "shift": (1, "flag"),
        "arch_opt": ({"norm": "batch", "dropout": "false"}, "flag"),
        "recipe": ("allcnn_c-digits", "architecture and data set"),
    }
    assert {name: (config.value(name), config.origin(name)) for name in expected} == expected


def test_the_recipe_is_chosen_by_architecture_and_data_set_unless_named() -> None:
    def of(dataset: str, **more: Any) -> str | None:
        return TrainConfig.of(arch="allcnn_c", dataset=dataset, **more).run.recipe

    assert of("digits") == "allcnn_c-digits"
    assert of("some/where/digits.tar.gz") == "allcnn_c-digits"
    assert of("pictures") == "allcnn_c"
    assert of("digits", recipe="allcnn_c") == "allcnn_c"
    assert TrainConfig.of(arch="allcnn_c", dataset="digits", recipe="none").optimization.epochs == 10


def test_what_belongs_to_another_choice_is_left_behind(tmp_path: Path) -> None:
    recipe = write(tmp_path / "a.toml", 'opt = "muon"\nmomentum = 0.5\nsteps = 7\n[opt_opt]\naux_lr = 0.1\n')
    same = TrainConfig.of(recipe, **SMALL, opt="muon", opt_opt=["ns_steps=3"])
    names = ("momentum", "opt_opt", "steps")
    assert [same.value(name) for name in names] == [0.5, {"aux_lr": "0.1", "ns_steps": "3"}, 7]
    other = TrainConfig.of(recipe, **SMALL, opt="adam", epochs=2)
    assert [other.value(name) for name in (*names, "epochs")] == [None, {}, None, 2.0]
    assert other.origin("momentum") == "default"


def test_values_of_the_command_line_of_toml_and_of_python_are_one(tmp_path: Path) -> None:
    text = TrainConfig.of(
        **SMALL, epochs="3", steps=None, mean="0.5,0.25,0.125", flip="true", output="~/x", opt_opt=["betas=0.9,0.99"]
    )
    file = 'epochs = 3\nmean = [0.5, 0.25, 0.125]\nflip = true\noutput = "~/x"\n[opt_opt]\nbetas = [0.9, 0.99]\n'
    toml = TrainConfig.of(write(tmp_path / "a.toml", file), **SMALL)
    python = TrainConfig.of(
        **SMALL, epochs=3, mean=(0.5, 0.25, 0.125), flip=True, output=Path("~/x"), opt_opt={"betas": "0.9,0.99"}
    )
    assert text == toml == python
    assert identity.digest(text) == identity.digest(toml) == identity.digest(python)
    assert text.run.output == Path.home() / "x"
    assert type(python.optimization.epochs) is float


def test_settings_never_change() -> None:
    config = TrainConfig.of(arch="resnet18")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optimization.lr = 1.0  # type: ignore[misc]  # the claim
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optimization = config.optimization  # type: ignore[misc]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_the_zoos_recipes_are_whole_and_found_by_their_names(recipe: Any) -> None:
    settings = read_recipe(recipe)
    config = TrainConfig.of(arch=settings["arch"], dataset=settings.get("dataset", "pictures"))
    assert config.run.recipe == recipe.name
    assert settings["arch"] in {plugin.name for plugin in listed("architecture")}


# -- a run's own file --------------------------------------------------------------------------------------------------


def test_a_runs_config_toml_runs_again_as_is(tmp_path: Path) -> None:
    built = [
        TrainConfig.of(arch="allcnn_c", dataset="digits", opt="adam", steps=4, mean="0.1,0.2,0.3", output="some/where"),
        TrainConfig.of(
            arch="allcnn_c", dataset="digits", recipe="none"
        ),  # without the recipe of that name, and so again
    ]
    for config in built:
        file = write(tmp_path / "config.toml", tomli_w.dumps(config.settings()))
        again = TrainConfig.of(file)
        assert again.settings() == config.settings()
        assert identity.digest(again) == identity.digest(config)
        assert TrainConfig.stored(tomllib.loads(file.read_text())) == again


@pytest.mark.parametrize("inside", ["", "checkpoints/step-00000100"])
def test_resume_of_a_path_takes_the_runs_own_settings(tmp_path: Path, inside: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = TrainConfig.of(arch="allcnn_c", dataset="digits", lr=0.25)
    (run / "config.toml").write_text(tomli_w.dumps(config.settings()))
    again = TrainConfig.of(resume=run / inside, threads=2)
    assert identity.results(again) == identity.results(config)
    assert (again.origin("lr"), again.origin("threads")) == (str(run / "config.toml"), "flag")
    assert again.run.resume == str(run / inside)
    # an architecture or a file given by hand is what is meant
    assert TrainConfig.of(resume=run, arch="resnet18").optimization.lr != 0.25
    with pytest.raises(UsageError, match="--resume .*nowhere: no run is there; give a run directory, auto or none"):
        TrainConfig.of(resume=tmp_path / "nowhere")


def test_dtrain_train_resume_path_goes_on_without_other_flags(ranks: Warm, tmp_path: Path) -> None:
    network = f"{Path(__file__).with_name('small_network.py')}:small"
    flags = ["--arch", network, "--dataset", "digits", "--recipe", "none", "--batch-size", "100", "--steps", "6"]
    places = ["--cache-dir", tmp_path / "cache", "--loader", "memory", "--threads", "1"]
    run = tmp_path / "run"
    (first,) = ranks(["train", *flags, *places, "--max-time", "0s", "--output", run], world=1)
    assert first.code == 75, first.err
    (second,) = ranks(["train", "--resume", run, "--max-time", "1h", *places], world=1)
    assert second.code == 0, second.err
    assert "goes on at step" in second.out
    assert json.loads((run / "run.json").read_text())["step"] == 6


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({}, "--arch is missing; `dtrain archs` lists what there is"),
        ({"arch": "resnet18", "learning_rate": 1}, "learning_rate is not a setting"),
        ({"arch": "resnet18", "batchsize": 1}, "batchsize is not a setting; did you mean 'batch_size'?"),
        ({**SMALL, "loader": "ffvc"}, "--loader ffvc: not a choice; did you mean 'ffcv'?"),
        ({**SMALL, "lr": "fast"}, "--lr fast: give a number"),
        ({**SMALL, "lr": "nan"}, "--lr nan: give a finite number"),
        ({**SMALL, "lr": 0}, "--lr 0.0: give a number greater than 0"),
        ({**SMALL, "steps": "2.5"}, "--steps 2.5: give a whole number"),
        ({**SMALL, "steps": float("inf")}, "--steps inf: give a whole number"),
        ({**SMALL, "epochs": True}, "--epochs True: give a number"),
        ({**SMALL, "epochs": 2, "steps": 3}, "--epochs and --steps: both say how long to train"),
        ({**SMALL, "shift": -1}, "--shift -1: give a number in [0, 4096]"),
        ({**SMALL, "momentum": 1}, "--momentum 1.0: give a fraction in [0, 1)"),
        ({**SMALL, "val_split": 0}, "--val-split 0.0: give a fraction in (0, 1)"),
        ({**SMALL, "stop_at_accuracy": 98}, "--stop-at-accuracy 98.0: give a fraction in (0, 1]"),
        ({**SMALL, "ema": 1}, "--ema 1.0: give a fraction in (0, 1)"),
        ({**SMALL, "flip": "perhaps"}, "--flip perhaps: give true or false"),
        ({**SMALL, "arch_opt": ["width"]}, "--arch-opt ['width']: give key=value"),
        ({**SMALL, "mean": "0.5,a"}, "--mean 0.5,a: give a number"),
        ({**SMALL, "mean": "0.5,0.5"}, "give one number in 0..1 for each channel"),
        ({**SMALL, "std": "0"}, "give numbers greater than 0"),
        ({**SMALL, "resize": "fit"}, "--resize fit: not a choice; choose from: crop, squash"),
        ({**SMALL, "bad_images": "ignore"}, "--bad-images ignore: not a choice; choose from: skip, stop"),
        ({**SMALL, "channels": 4}, "--channels 4: not a choice; choose from: 1, 3, auto"),
        ({**SMALL, "image_size": 0}, "--image-size 0: give whole numbers greater than 0"),
        ({**SMALL, "image_size": 64, "store_size": 60}, "--store-size 60: below --image-size 64"),
        ({**SMALL, "store_size": 60}, "--store-size 60: needs an --image-size"),
        (
            {**SMALL, "scale": "0.5,0.2"},
            "--scale 0.5,0.2: give the least and the largest fraction of the area, in 0.01..1",
        ),
        ({**SMALL, "scale": "0"}, "--scale 0: give the least and the largest fraction"),
        ({**SMALL, "jitter": "0.4,0.4"}, "--jitter 0.4,0.4: give one or three fractions in 0..1, such as 0.4,0.4,0.4"),
        ({**SMALL, "jitter": "-0.1"}, "--jitter -0.1: give one or three fractions in 0..1"),
        (
            {**SMALL, "affine": "200"},
            "--affine 200: give up to four numbers: degrees in 0..180, fraction in 0..1, zoom",
        ),
        ({**SMALL, "affine": "1,1,0.95"}, "--affine 1,1,0.95: give up to four numbers"),
        ({**SMALL, "affine": "1,1,0,0,0"}, "--affine 1,1,0,0,0: give up to four numbers"),
        ({**SMALL, "erase": 1.5}, "--erase 1.5: give a fraction in [0, 1]"),
        ({**SMALL, "mixup": -1}, "--mixup -1.0: give a number in [0, 100]"),
        ({**SMALL, "cutmix": 101}, "--cutmix 101.0: give a number in [0, 100]"),
        ({**SMALL, "name": "../x"}, "--name ../x: give a plain name; --output takes a path"),
        ({**SMALL, "eval_every": "10min"}, "--eval-every 10min: not an interval; give 500steps, 1epoch or end"),
        (
            {**SMALL, "checkpoint_every": "often"},
            "--checkpoint-every often: not an interval; give 500steps, 1epoch, 10min",
        ),
        ({**SMALL, "max_time": "90"}, "--max-time 90: not a span of time; give 90s, 45min or 2h"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)) as caught:
        TrainConfig.of(**flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr = \n", "not TOML: "),
        ("batchsize = 3\n", "batchsize is not a setting; did you mean 'batch_size'?"),
        ("schedule = ['linear']\n", "--schedule ['linear']: give text"),
        ("mean = 'grey'\n", "--mean grey: give a number"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        TrainConfig.of(write(tmp_path / "a.toml", text), **SMALL)
    with pytest.raises(UsageError, match="none.toml: No such file or directory; give a TOML file"):
        TrainConfig.of(tmp_path / "none.toml", **SMALL)


# -- what two runs share -----------------------------------------------------------------------------------------------


OTHERS: dict[str, Any] = {  # another allowed value for settings whose type does not give one away
    "arch": "allcnn_c",
    "recipe": "allcnn_c",
    "opt": "adam",
    "schedule": "cosine",
    "dataset": "digits",
    "image_size": 48,
    "batch_size": "64,640@200",
    "store_size": 64,
    "mean": (0.5,),
    "std": (0.5,),
    "scale": (0.5,),
    "jitter": (0.5,),
    "affine": (0.5,),
    "eval_every": "end",
    "checkpoint_every": "end",
    "max_time": "1h",
    "track": ("csv",),
    "resume": "none",
    "output": "x",
    "cache_dir": "x",
    "data_dir": "x",
    "name": "x",
    "weight_decay": 0.25,
    "clip_grad": 0.25,
    "steps": 3,
    "nesterov": True,
    "freeze": ("stem.*",),
    "head_lr": 0.25,
}


def another(known: Setting) -> Any:
    if known.name in OTHERS:
        return OTHERS[known.name]
    if get_origin(known.kind) is Literal:
        return next(choice for choice in get_args(known.kind) if choice != known.default)
    if known.kind is bool:
        return not known.default
    if get_origin(known.kind) is dict:
        return {"a": "b"}
    return known.default + 1 if known.kind is int else 0.25


@pytest.mark.parametrize("known", [s for s in SETTINGS.values() if s.name != "recipe"], ids=lambda known: known.name)
def test_the_digest_changes_with_what_shapes_the_numbers_and_with_nothing_else(known: Setting) -> None:
    given = {"arch": "resnet18", "recipe": "none", "image_size": 32}
    base, changed = TrainConfig.of(**given), TrainConfig.of(**{**given, known.name: another(known)})
    assert changed.value(known.name) != base.value(known.name)
    assert (identity.digest(changed) != identity.digest(base)) == (not known.place)
    assert identity.differing(base, changed) == ([] if known.place else [known.name])


def test_what_is_a_place_is_written_down_by_hand() -> None:
    # everything else shapes the numbers: a new setting is one or the other on purpose
    places = (
        "recipe data_dir cache_dir loader device backend threads dist_timeout output name resume checkpoint_every keep "
        "log_interval track max_time"
    )
    assert {name for name, known in SETTINGS.items() if known.place} == set(places.split())


def test_a_setting_with_its_default_is_no_part_of_what_a_run_is() -> None:
    bare = TrainConfig.of(arch="resnet18", recipe="none")
    assert identity.results(bare) == {"arch": "resnet18"}
    assert identity.results(TrainConfig.of(arch="resnet18", recipe="none", batch_size=128)) == {"arch": "resnet18"}


def test_a_short_form_and_its_whole_are_one_run() -> None:
    def digest(**settings: Any) -> str:
        return identity.digest(TrainConfig.of(**SMALL, **settings))

    assert digest(jitter="0.3") == digest(jitter=(0.3, 0.3, 0.3))
    assert digest(scale="0.35") == digest(scale="0.35,1")
    assert digest(affine="15") == digest(affine="15,0,0,0")
    assert digest(eval_every="1epoch") == digest(eval_every="1.0epochs") == digest()


def test_a_run_is_named_after_what_it_is() -> None:
    def name(**settings: Any) -> str:
        return identity.run_name(TrainConfig.of(recipe="none", **settings))

    assert re.fullmatch(r"resnet18-digits-[0-9a-f]{8}", name(arch="resnet18", dataset="digits"))
    assert re.fullmatch(r"nets-wide-birds-[0-9a-f]{8}", name(arch="./some/nets.py:wide", dataset="data/birds.tar.gz"))
    assert name(arch="resnet18", name="trial") == "trial"


# -- every setting stands in one place, and is used --------------------------------------------------------------------


def test_panels_can_be_made_alone_and_check_themselves() -> None:
    assert Augmentation(jitter=(0.2,)).jitter == (0.2, 0.2, 0.2)
    with pytest.raises(UsageError, match="--cutmix 101"):
        Augmentation(cutmix=101)


def attributes_read(tree: ast.AST) -> set[str]:
    """The names of all attributes that a module reads."""
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def test_every_setting_is_read_outside_of_the_settings() -> None:
    read: set[str] = set()
    for path in sorted((REPOSITORY / "dtrain").rglob("*.py")):
        if path.parent.name != "settings" or path.name in ("data.py", "augmentation.py", "layers.py", "identity.py"):
            read |= attributes_read(ast.parse(path.read_text(encoding="utf-8")))
    by_name = {"recipe"} | {name for record in RECORDS for name in record.settings}  # looked up, not spelled out
    assert [name for name in SETTINGS if name not in read | by_name] == []


def test_no_two_panels_have_a_setting_of_one_name() -> None:
    assert sum(len(dataclasses.fields(panel)) for panel in PANELS) == len(SETTINGS)


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_intervals_and_spans_have_units() -> None:
    assert Every.parse("500steps") == Every.parse("500 step") == Every(steps=500)
    assert Every.parse("1epoch") == Every.parse("1.0epochs") == Every(epochs=1.0)
    assert Every.parse("0.5epochs") == Every(epochs=0.5)
    assert Every.parse("10min") == Every(seconds=600.0)
    assert Every.parse("90s") == Every(seconds=90.0)
    assert Every.parse("end") == Every()
    assert [Span.parse(text).seconds for text in ("90s", "1.5min", "2h")] == [90.0, 90.0, 7200.0]
    for text in ("500steps", "1epoch", "0.5epoch", "90s", "end"):
        assert str(Every.parse(text)) == text


@pytest.mark.parametrize("text", ["500", "0steps", "1.5steps", "-1epoch", "steps", "10 minutes", "never"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(Unfit, match="not an interval"):
        Every.parse(text)
