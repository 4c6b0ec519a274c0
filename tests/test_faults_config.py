"""Configurations that are no configurations: every fault is found before anything runs, in a sentence with its key."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cli_helpers import TINY, compose, run
from panoptic_ibs import expectations
from panoptic_ibs.configuration import arguments, checking, options, schema, translation
from panoptic_ibs.errors import ConfigError, DataError

COMMANDS = ("config", "evaluate", "predict", "convert", "export")


@functools.cache
def plain(command: str, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A composed configuration in plain containers, without and with its interpolations."""
    given = {"predict": ("ckpt_path=a", "input=b", "output=c"), "evaluate": ("ckpt_path=a",)}
    given["export"] = ("ckpt_path=a", "format=onnx", "out=b")
    given["convert"] = ("source=a", "out=b", "data=cityscapes", "head=mask2former")
    config = compose(*given.get(command, ()), *overrides, name=command)
    return tuple(OmegaConf.to_container(config, resolve=r) for r in (True, False))  # type: ignore[return-value]


def sentences(*overrides: str, command: str = "config") -> list[str]:
    """The faults of a configuration with these overrides, as ``python -m panoptic_ibs.COMMAND`` would tell them."""
    prepared = arguments.prepared(overrides, command, options.options)
    groups = [word for word in prepared if options.options(word.partition("=")[0])]
    config = OmegaConf.create(copy.deepcopy(plain(command, *groups)[1]))
    for word in prepared:
        if word not in groups:
            key, _, value = word.lstrip("+").partition("=")
            OmegaConf.update(config, key, arguments._parsed(value).value(), merge=False, force_add=True)
    raw = OmegaConf.to_container(config)
    resolved = OmegaConf.to_container(config, resolve=True)
    return [str(fault) for fault in checking.faults_in_configuration(resolved, raw, command)]


# (argument, what is said of it): the value that was typed stands in it, and what is expected
REFUSED = [
    ("trainer.max_steps=-3", "trainer.max_steps is -3; expected: a whole number >= 1 or -1"),
    ("trainer.max_steps=-1", "trainer.max_steps is -1; expected: .*as trainer.max_epochs is -1, too"),
    ("trainer.max_steps=0", "trainer.max_steps is 0; expected: a whole number >= 1"),
    ("trainer.max_steps=many", 'trainer.max_steps is "many"; expected: a whole number >= 1'),
    ("trainer.max_steps=null", "trainer.max_steps is null; expected: a whole number >= 1"),
    ("sampling.batch_size=2.0", "sampling.batch_size is 2.0; expected: a whole number >= 1"),
    ("sampling.batch_size=true", "sampling.batch_size is true; expected: a whole number >= 1"),
    ("optim.lr=nan", "optim.lr is nan; expected: a number >= 0"),
    ("optim.lr=inf", "optim.lr is inf; expected: a number >= 0"),
    ("optim.lr=-0.1", "optim.lr is -0.1; expected: a number >= 0"),
    ("optim.lr=fast", 'optim.lr is "fast"; expected: a number >= 0'),
    ("optim.lr=null", "optim.lr is null; expected: a number >= 0"),
    ("optim.lr='1e-3'", 'optim.lr is "1e-3"; expected: a number >= 0'),
    ("optim.power=-1", "optim.power is -1; expected: a number >= 0"),
    ("+optim.optimizer.momentun=0.9", "optim.optimizer.momentun is unknown: torch.optim.AdamW has no such option"),
    ("+trainer.max_step=5", "trainer.max_step is unknown: .*did you mean max_steps"),
    ("+sampling.sampler.foo=1", "sampling.sampler.foo is unknown: .*PairedCropSampler has no such option"),
    ("+data.presets.resize.longst=3", "data.presets.resize.longst is unknown: .*did you mean longest"),
    ("trainer.precision=bf16-mix", 'trainer.precision is "bf16-mix"; expected: 64-true, 32-true, .*bf16-mixed'),
    ("trainer.precision=7", "trainer.precision is 7; expected: 64-true"),
    ("trainer.accelerator=quantum", 'trainer.accelerator is "quantum"; expected: auto, cpu, gpu'),
    ("trainer.strategy=telepathy", 'trainer.strategy is "telepathy"; expected: auto, .*ddp'),
    ("trainer.devices=0", "trainer.devices is 0; expected: "),
    ("trainer.devices=two", 'trainer.devices is "two"; expected: '),
    ("trainer.val_check_interval=0", "trainer.val_check_interval is 0; expected: a whole number >= 1 or a number > 0"),
    ("trainer.val_check_interval=-5", "trainer.val_check_interval is -5; expected: "),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches is 0; expected: a whole number >= 1"),
    ("trainer.limit_val_batches=2.5", "trainer.limit_val_batches is 2.5; expected: a whole number >= 0 or a number"),
    ("seed=-1", "seed is -1; expected: a whole number >= 0 and <= 4294967295"),
    ("seed=99999999999999999999", "seed is 99999999999999999999; expected: a whole number >= 0 and <= 4294967295"),
    ("seed=1.5", "seed is 1.5; expected: a whole number"),
    ("seed=abc", 'seed is "abc"; expected: a whole number'),
    ("seed=null", "seed is null; expected: a whole number"),
    ("data.num_workers=-1", "data.num_workers is -1; expected: a whole number >= 0"),
    ("data.num_workers=two", 'data.num_workers is "two"; expected: a whole number >= 0'),
    ("data.num_workers=null", "data.num_workers is null; expected: a whole number >= 0"),
    ("data.memory_mb=nan", "data.memory_mb is nan; expected: a number >= 0"),
    ("+data.size_divisor=0", "data.size_divisor is 0; expected: a whole number >= 1"),
    ("data.synthetic.num_train=many", 'data.synthetic.num_train is "many"; expected: a whole number >= 1'),
    ("data.synthetic.size=[64.5,64]", r"data.synthetic.size\[0\] is 64.5; expected: a whole number >= 32"),
    ("data.eval_resize=5", "data.eval_resize is 5; expected: an object with _target_ or null"),
    ("data.presets.resize.longest=nan", "data.presets.resize.longest is nan; expected: a number >= 1"),
    ("data.presets.pair_scales.longest=nan", "data.presets.pair_scales.longest is nan; expected: a number >= 1"),
    ("data.presets.full_resize.longest=nan", "data.presets.full_resize.longest is nan"),
    ("ibs.weight=high", 'ibs.weight is "high"; expected: a number >= 0'),
    ("ibs.weight=-1", "ibs.weight is -1; expected: a number >= 0"),
    ("ibs.gamma=-2", "ibs.gamma is -2; expected: a number >= 0"),
    ("ibs.partners=both", 'ibs.partners is "both"; expected: random or paired'),
    ("sampling.target_sizes=[nan]", r"sampling.target_sizes\[0\] is nan; expected: a number > 0"),
    ("sampling.crop_size=[nan,64]", r"sampling.crop_size\[0\] is nan; expected: a whole number >= 1"),
    ("sampling.crop_size=[64.5,64]", r"sampling.crop_size\[0\] is 64.5; expected: a whole number >= 1"),
    ("sampling.crop_size=[64]", r"sampling.crop_size is \[64\]; expected: a list of 2 values"),
    ("data.presets.crop_size=[64.5,64]", r"data.presets.crop_size\[0\] is 64.5; expected: a whole number >= 1"),
    ("callbacks.checkpoint.every_n_steps=0", "callbacks.checkpoint.every_n_steps is 0; expected: a whole number >= 1"),
    ("model.pixel_mean=[1,2]", r"model.pixel_mean is \[1, 2\]; expected: a list of 3 values"),
    ("model.channel_order=BGR", 'model.channel_order is "BGR"; expected: rgb or bgr'),
    ("+model.test_size=[0,null]", r"model.test_size\[0\] is 0; expected: a whole number >= 1 or null"),
    ("head.channels=0", "head.channels is 0; expected: a whole number >= 1"),
    ("head.depth=-1", "head.depth is -1; expected: a whole number >= 0"),
    ("head.inference.mask_threshold=nan", "head.inference.mask_threshold is nan; expected: a number >= 0 and <= 1"),
    ("head.inference.stuff_area=-1", "head.inference.stuff_area is -1; expected: a whole number >= 0"),
    ("data.presets.stuff_area=-1", "data.presets.stuff_area is -1; expected: a whole number >= 0"),
    ("backbone._target_=nowhere.Net", 'backbone._target_ is "nowhere.Net"; expected: what can be imported'),
    ("evaluation.limit=0", "evaluation.limit is 0; expected: a whole number >= 1 or null"),
    ("evaluation.limit=-1", "evaluation.limit is -1; expected: a whole number >= 1 or null"),
    ("evaluation.limit=all", 'evaluation.limit is "all"; expected: a whole number >= 1 or null'),
    ("+evaluation.foo=1", "evaluation.foo is unknown: .*limit, baselines"),
    ("+foo=1", "foo is unknown: the configuration has no such option"),
    ("+sead=1", "sead is unknown: .*did you mean seed"),
    ("run_dir=null", "run_dir is null; expected: text that is not empty"),
    ("run_dir=", 'run_dir is ""; expected: text that is not empty'),
    ("+logger.wandb.colour=red", "logger.wandb.colour is unknown"),
]


@pytest.mark.parametrize(("argument", "sentence"), REFUSED, ids=[a for a, _ in REFUSED])
def test_a_bad_value_is_one_sentence_with_its_key(argument: str, sentence: str) -> None:
    more = ["logger=wandb"] if "wandb" in argument else []
    found = sentences(*more, argument)
    assert len(found) == 1, found
    assert re.search(f"^{sentence}", found[0]), found


def test_all_faults_are_told_at_once_and_an_interpolated_value_where_it_stands() -> None:
    found = sentences("data.presets.crop_size=[0,1.5]", "seed=-1", "+trainer.max_stepz=1")
    keys = [sentence.split()[0] for sentence in found]
    assert keys == ["seed", "data.presets.crop_size[0]", "data.presets.crop_size[1]", "trainer.max_stepz"]


SOUND = """
sampling=random_crop optim.lr=1 trainer.max_epochs=2 ibs=none trainer.devices=[0,1] trainer.limit_val_batches=0.5
data.train=null callbacks=ema weigh=uncertainty +trainer.detect_anomaly=true trainer.precision=32 head.norm_groups=8
callbacks.progress=null
"""


@pytest.mark.parametrize("argument", SOUND.split())
def test_sound_values_pass(argument: str) -> None:
    assert sentences(argument) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_of_every_command_are_sound(command: str) -> None:
    resolved, raw = plain(command)
    assert checking.faults_in_configuration(resolved, raw, command) == []


def test_a_key_of_a_user_s_own_that_others_refer_to_is_welcome() -> None:
    assert sentences("+mine=3", "sampling.batch_size=${mine}") == []
    assert [s.split()[0] for s in sentences("+mine=3.5", "sampling.batch_size=${mine}")] == ["mine"]


# --- any value at any key

VALUES = [None, float("nan"), float("inf"), -1, 0, 0.5, 1e30, 2**70, "", "text", "a/b", [], [1], [[None]], {},
          {"a": 1}, {"_target_": 3}, {"_target_": "os.path.join"}, True, False, [float("nan")]]  # fmt: skip


def leaves(node: Any, steps: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if steps:
        yield steps
    if isinstance(node, dict):
        for key, child in node.items():
            yield from leaves(child, (*steps, key))


@functools.cache
def keys(command: str) -> list[tuple[Any, ...]]:
    """All keys, groups as well, but those inside of an interpolated group."""
    return list(leaves(plain(command)[1]))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_any_value_at_any_key_gives_sentences_and_never_an_exception(data: st.DataObject) -> None:
    command = data.draw(st.sampled_from(COMMANDS))
    steps = data.draw(st.sampled_from(keys(command)))
    value = data.draw(st.sampled_from(VALUES) | st.text(max_size=5) | st.integers() | st.floats())
    resolved, raw = (copy.deepcopy(c) for c in plain(command))
    for content in (resolved, raw):
        parent: Any = content
        for step in steps[:-1]:
            parent = parent[step]
        if isinstance(parent, str):  # an interpolated group
            return
        parent[steps[-1]] = copy.deepcopy(value)
    found = checking.faults_in_configuration(resolved, raw, command)
    dotted = ".".join(map(str, steps))
    for fault in found:
        assert str(fault).startswith(fault.path)
        assert re.search(r"is .*; expected: |is unknown: |is missing|no such device", str(fault)), str(fault)
    if isinstance(value, float) and not math.isfinite(value):  # NaN and infinity are good nowhere
        assert any(fault.path.startswith(dotted) for fault in found), (dotted, value, found)


# --- names and paths

NAMES = ["IMG (1).jpg", "Straße", "epoch=1-step=2.ckpt", "a&b", "it's", 'say "hi"', "a,b", "2024_05_01", "2024_05",
         "1e3", "true", "1.5", "[draft]", "{x}", "a b  c ", "日本", "#1", "a;b", "50%", "x\\", "\\'", "*?.png", "-x",
         "@home", "a:b", "$HOME", "a\tb"]  # fmt: skip


def reread(command: str, word: str) -> Any:
    """What the composed configuration holds of an argument."""
    key, _, value = word.partition("=")
    config = OmegaConf.create(copy.deepcopy(plain(command)[1]))
    OmegaConf.update(config, key, arguments._parsed(value).value())
    return OmegaConf.select(config, key)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_taken_as_they_are_typed(name: str) -> None:
    for command, key in (("predict", "input"), ("config", "data.root"), ("evaluate", "predictions")):
        if key == "predictions" and name == "[draft]":
            continue  # a list of one
        prepared = arguments.prepared([f"{key}={name}"], command, options.options)
        assert reread(command, prepared[0]) == name


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12))
def test_any_text_comes_back_from_hydra(text: str) -> None:
    assert arguments._parsed(arguments.quote(text)).value() == text
    if text not in ("null", "???") and not text.startswith(("'", '"', "~")) and "\\" not in text:
        (word,) = arguments.prepared([f"input={text}"], "predict", options.options)
        assert arguments._parsed(word.partition("=")[2]).value() == text


def test_what_hydra_means_by_quotes_lists_null_and_sweeps_stays() -> None:
    def one(argument: str, *more: str, command: str = "config") -> str:
        (word,) = [w for w in arguments.prepared([argument, *more], command, options.options) if w not in more]
        return word

    for argument in ("data.root='IMG (1)'", "data.train=null", "run_dir=${paths.cache}/x", "data.root=plain/path",
                     "run_dir=runs/${now:%Y-%m-%d}", "data.root=a\\,b", "seed=1,2", "+optim.x=[1,2]"):  # fmt: skip
        assert one(argument) == argument
    assert one("predictions=[a.json,b (1).json]", command="evaluate") == "predictions=[a.json,'b (1).json']"
    assert one("data.root=a,b") == "data.root='a,b'"
    assert one("data.root=a,b (1)", "-m") == "data.root=a,'b (1)'"
    assert one("data.root=a,b", "sweep=ibs_weight") == "data.root=a,b"
    assert one("data.root=~/x") == f"data.root={os.path.expanduser('~/x')}"
    assert one("data.root=null") == "data.root=null"
    assert one("data.root=./null") == "data.root=./null"
    assert arguments.prepared(["seed=1", "--cfg", "job", "-m"], "config", options.options) == [
        "--cfg",
        "job",
        "-m",
        "seed=1",
    ]


@pytest.mark.parametrize("word", ["/", "foo", "=3", "optim.lr=(1", "data.root=\udce4"])
def test_a_word_that_is_no_argument_is_named(word: str) -> None:
    with pytest.raises(ConfigError, match=r"is not understood|no text in UTF-8"):
        arguments.prepared([word], "config", options.options)


def test_keys_that_hold_text_are_those_of_the_signatures() -> None:
    """The list that spares the imports says what the constructors say."""
    targets = {"data": "panoptic_ibs.data.datamodule.PanopticDataModule",
               "backbone": "panoptic_ibs.backbones.TimmBackbone"}  # fmt: skip
    known = set()
    for key, target in targets.items():
        module, _, name = target.rpartition(".")
        fields = expectations.fields_of(getattr(importlib.import_module(module), name))
        known |= {f"{key}.{field}" for field, a in fields.items() if expectations.takes_text(a)}
    assert known == set(arguments.TEXT_IN_COMPONENTS)
    assert {"run_dir", "ckpt_path", "init_from", "paths.cache", "roots.vistas"} <= set(arguments.text_keys("config"))
    assert arguments.text_keys("evaluate")["predictions"]


# --- errors of others


def raised(kind: type[BaseException], *values: Any) -> BaseException:
    return kind(*values)


class MisconfigurationException(Exception):
    pass


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "run_dir=/runs/a: a file could not be .*the disk is full. Free"),
        (OSError(28, "No space left on device", "/runs/a/x"), "run_dir=/runs/a: /runs/a/x: the disk is full. Free"),
        (OSError(30, "Read-only file system", "/runs/a"), "run_dir=/runs/a: the file system is read-only"),
        (OSError(36, "File name too long", "/elsewhere"), "/elsewhere: a name is too long"),
        (FileExistsError(17, "File exists", "/runs/a"), "run_dir=/runs/a: there is a file of this name"),
        (NotADirectoryError(20, "Not a directory", "/runs/a/b"), "a part of the path is a file"),
        (PermissionError(13, "Permission denied", "/runs/a"), "permission is missing"),
        (FileNotFoundError(2, "No such file or directory"), "the folder that this command was started in was deleted"),
        (OSError(24, "Too many open files"), "too many files are open. Raise the limit"),
        (MemoryError(), "the memory is used up .*Lower sampling.batch_size"),
        (OutOfMemoryError("CUDA out of memory. Tried"), "the memory is used up .*Lower sampling.batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the memory is used up"),
        (RuntimeError("PytorchStreamWriter failed writing file data/1"), "run_dir=/runs/a: .*the disk is full"),
        (MisconfigurationException("No supported gpu\n backend"), "trainer: No supported gpu backend"),
        (DataError("x.json: torn"), "^x.json: torn$"),
    ],
)
def test_errors_of_libraries_and_the_system_are_one_sentence(error: Exception, sentence: str) -> None:
    found = translation.sentence(error, {"run_dir": "/runs/a", "data": {"root": "/data"}})
    assert found is not None
    assert re.search(sentence, found), found
    assert "\n" not in found


def test_a_defect_of_the_program_is_none_of_them() -> None:
    assert translation.sentence(KeyError("x")) is None
    assert translation.sentence(RuntimeError("shapes differ")) is None


# --- the commands


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("train", ["/"], "'/' is not understood: an argument is KEY=VALUE"),
        ("train", ["experiment=3"], "experiment=3: there is no such option; choose one of"),
        ("train", ["head=pf"], "head=pf: there is no such option; choose one of .*ciae, .*mask2former, panoptic_fcn"),
        ("train", ["trainer.max_step=5"], "there is no key 'trainer.max_step'; did you mean trainer.max_steps"),
        ("train", ["run_dir=${nothing}"], "run_dir=.*nothing.*not found"),
        ("train", ["run_dir="], 'run_dir is ""'),
        ("train", ["data.root=${nothing}"], "data.root.*nothing"),
        ("predict", ["ckpt_path=a", "input=", "output=o"], 'input is ""; expected: text that is not empty'),
        (
            "predict",
            ["ckpt_path=a", "input=b", "output=o", "labels=maybe"],
            'labels is "maybe"; expected: true or false',
        ),
        ("predict", ["ckpt_path=a", "input=b", "output=null"], "output is null; expected: text"),
        ("predict", ["input=b", "output=o"], "ckpt_path is not set: give ckpt_path=VALUE"),
        ("predict", ["ckpt_path=a", "input=b", "output=o", "+overrides.head.x=nan"], "overrides.head.x is nan"),
        ("evaluate", ["predictions=3", "evaluation.bootstrap=-1"], "evaluation.bootstrap is -1; expected: a whole"),
        ("convert", ["source=a", "out=b", "head=ciae"], "You must specify 'data'"),
        ("prepare", ["check", "data=vistas", "data.root="], "data.root= has no value"),
        ("prepare", ["check", "dta=vistas"], "'dta=vistas' is not understood. Did you mean data"),
        ("report", ["runs"], "'runs' is not understood"),
    ],
)
def test_commands_say_it_in_one_sentence(
    command: str, words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(command, *words)
    assert (result.code, result.err.startswith("error: ")) == (2, True), result.err
    assert re.search(sentence, result.err), result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []  # nothing was made


def test_a_file_in_place_of_the_folder_and_too_long_a_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for folder, reason in ((file, "there is a file of this name"), (tmp_path / ("x" * 300), "a name is too long"),
                           (file / "below", "a part of the path is a file")):  # fmt: skip
        train = run("train", *TINY, f"run_dir={folder}")
        check = run("prepare", "check", "data=vistas", f"data.root={tmp_path}", f"run_dir={folder}")
        for result in (train, check):
            assert result.code == 2, result.err
            assert f"run_dir={str(folder)[:40]}" in result.message
            assert reason in result.message
    assert file.read_text() == "kept"
    result = run("prepare", "check", "data=vistas", f"data.root={tmp_path / ('x' * 300)}")
    assert (result.code, "a name is too long" in result.message) == (2, True), result.err


def test_changes_of_a_checkpoint_s_options_are_checked_with_their_key() -> None:
    description = {"backbone": plain("config")[0]["backbone"], "head": plain("config")[0]["head"]}
    description["head"].pop("name", None)
    head = copy.deepcopy(description["head"])
    head["inference"]["mask_threshold"] = 1.5
    with pytest.raises(ConfigError, match=r"overrides.head.inference.mask_threshold is 1.5; expected: a number >= 0"):
        checking.check_changes({**description, "head": head}, {"head": {"inference": {"mask_threshold": 1.5}}})
    with pytest.raises(ConfigError, match=r"overrides.test_size\[0\] is 0"):
        checking.check_changes({**description, "test_size": [0, 0]}, {"test_size": [0, 0]})
    checking.check_changes({**description, "test_size": [0, 0]}, {"head": {"inference": {"top_num": 3}}})


def test_every_command_has_a_schema() -> None:
    assert set(schema.COMMANDS) == set(COMMANDS)
    for command in COMMANDS:
        assert set(plain(command)[0]) <= set(expectations.fields_of(schema.COMMANDS[command]))
