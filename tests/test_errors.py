"""Claims about errors: the exit codes of the design, and the nearest name."""

from __future__ import annotations

import inspect
import pickle
import re

from dtrain import errors
from dtrain.errors import nearest


def test_exit_codes_are_those_that_scripts_rely_on() -> None:
    codes = {
        "UsageError": 2,
        "PluginError": 2,
        "DataError": 3,
        "ProcessError": 4,
        "DivergedError": 5,
        "StorageError": 6,
        "ProofError": 7,
        "Stopped": 75,
    }
    assert {name: getattr(errors, name).exit_code for name in codes} == codes
    assert (errors.ExitCode.DONE, errors.ExitCode.DEFECT, errors.ExitCode.STOPPED_UNSAVED) == (0, 1, 130)


def test_every_error_is_a_dtrain_error_and_stands_in_the_drawing_with_its_code() -> None:
    drawn = dict(re.findall(r"-- (\w+) *(\d*)", errors.__doc__ or ""))
    defined = {
        name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)
    }
    assert defined.keys() == drawn.keys() | {"DtrainError"}
    assert all(issubclass(kind, errors.DtrainError) for kind in defined.values())
    assert {name: str(int(defined[name].exit_code)) for name, code in drawn.items() if code} == {
        name: code for name, code in drawn.items() if code
    }


def test_an_error_keeps_its_fields_on_the_way_to_another_process() -> None:
    sent = errors.StorageError("the disk is full", table="a table", told_elsewhere=True)
    got = pickle.loads(pickle.dumps(sent))
    assert (type(got), str(got)) == (errors.StorageError, "the disk is full")
    assert (got.exit_code, got.table, got.told_elsewhere) == (errors.ExitCode.STORAGE, "a table", True)


def test_an_error_may_carry_the_exit_code_of_another_process() -> None:
    error = errors.ProcessError("a loss is not finite", errors.ExitCode.DIVERGED)
    assert (error.exit_code, errors.exit_code_of(error)) == (5, 5)
    assert errors.ProcessError("gone").exit_code == 4
    assert errors.exit_code_of(ValueError()) == 1


def test_who_prints_an_error_is_decided_without_losing_its_stack_and_cause() -> None:
    try:
        raise errors.DataError("no such file", table="a table") from KeyError("x")
    except errors.DataError as error:
        told, was = error.told(elsewhere=False), error
    assert (was.told_elsewhere, told.told_elsewhere) == (None, False)
    assert (type(told), str(told), told.table) == (errors.DataError, "no such file", "a table")
    assert told.__cause__ is was.__cause__
    assert told.__traceback__ is was.__traceback__


def test_a_slip_is_answered_with_the_nearest_name_and_a_guess_with_all_of_them() -> None:
    assert nearest("adamv", ["sgd", "adam"]) == "did you mean 'adam'?"
    assert nearest("resnet-18", ["resnet18", "allcnn_c"]) == "did you mean 'resnet18'?"
    assert nearest("xyz", ["sgd", "adam", "sgd"]) == "choose from: adam, sgd"
    assert nearest("xyz", []) == "there are none"
