"""Options: what decides a default, what is refused, and one line for it."""

import dataclasses
import json
import pathlib
import re
import sys
from typing import get_args, get_type_hints

import pytest

from fasttrain.config import TrainConfig, load_config, make_config, parse_config
from fasttrain.engine.options import MachineOptions
from fasttrain.engine.ranks import Ranks
from fasttrain.presets import PRESETS
from fasttrain.run.earlier import named_now
from fasttrain.run.folder import FORMAT, prepare
from fasttrain.run.options import RunOptions
from fasttrain.system.durable import write_json
from fasttrain.system.errors import UserError
from fasttrain.system.options import Settings, flag, flat
from fasttrain.views.options import ViewOptions
from fasttrain.views.spec import RECIPES


def test_defaults_and_presets() -> None:
    assert parse_config(["--data", "x"]) == make_config(data="x")
    config = parse_config(["--preset", "cifar10", "--data", "x", "--batch-size", "256"])
    assert (config.encoder.arch, config.encoder.cifar_stem, config.optimisation.batch_size) == ("resnet18", True, 256)
    assert flat(config)["queue_size"] == 4096
    assert parse_config(["--data=x", "--preset=demo"]).encoder.arch == PRESETS["demo"]["arch"]


@pytest.mark.parametrize(
    ("arch", "stem"),
    [("resnet18", True), ("timm:resnet26", True), ("wide_resnet50_2", True), ("small", False), ("vit_tiny", False)],
)
def test_a_presets_stem_gives_way_to_an_encoder_that_can_have_none(arch: str, stem: bool) -> None:
    assert parse_config(["--data", "d", "--preset", "cifar10", "--arch", arch]).encoder.cifar_stem == stem
    assert parse_config(["--data", "d", "--preset", "cifar10", "--arch", arch, "--cifar-stem"]).encoder.cifar_stem


def test_the_last_method_and_preset_count_wherever_they_stand() -> None:
    config = parse_config(
        ["--preset", "demo", "--method=moco", "--data", "x", "--preset", "cifar10", "--method", "xmoco"]
    )
    assert config == make_config("xmoco", "cifar10", data="x")
    assert config.encoder.arch == "resnet18"
    underscored = parse_config(["--data=x", "--method", "moco", "--weight_decay=2", "--batch_size", "64"])
    assert underscored == make_config("moco", data="x", weight_decay=2.0, batch_size=64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x", "--batchsize", "3"], "Unrecognized options: --batchsize.*did you mean --batch-size"),
        (["--data", "x", "--gpu", "1", "--fast"], "Unrecognized options: --gpu, --fast "),
        (["--data", "x", "--gpu", "1", "--batchsize", "3"], "options: --gpu, --batchsize; did you mean --batch-size"),
        (["--data", "x", "stray", "words"], "Unrecognized options: stray"),
        (["--data", "x", "stray", "--run", "y"], "Unrecognized options: stray"),
        ([], "--data"),
        (["--data", "x", "--lr", "fast"], "--lr"),
        (["--data", "x", "--precision", "fp8"], "fp8.*bf16"),
    ],
)
def test_bad_command_lines_are_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(words)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


VALUES = [
    (["--epochs", "0"], "--epochs must be above 0, not 0"),
    (["--batch-size", "-4"], "--batch-size must be above 0"),
    (["--temperature", "0"], "--temperature must be above 0"),
    (["--lr", "nan"], "--lr must be above 0"),
    (["--ema", "1"], "--ema must be at least 0 and below 1"),
    (["--cross-weight", "-1"], "--cross-weight must be at least 0"),
    (["--warmup-epochs", "200"], "leaves nothing"),
    (["--accumulate", "0"], "--accumulate must be above 0"),
    (["--clip-norm", "-1"], "--clip-norm must be at least 0"),
    (["--workers", "0"], "--workers must be at least 1, not 0"),
    (["--max-failed-fraction", "2"], "--max-failed-fraction must be at least 0 and at most 1"),
    (["--resolution", "256:224"], "--resolution '256:224' is not two sides of views such as 128:224"),
    (["--resolution", "128:224", "--size", "160"], "ends with views of 224 px, --size 160 is another"),
    (["--preset", "huge"], "unknown --preset 'huge'; choose from: imagenet, imagenet100, stl10, cifar10, demo"),
    (["--method", "mocko"], "unknown --method 'mocko'; choose from: moco, xmoco"),
    (
        ["--recipe", "swav"],
        "--recipe swav gives 2 views of full size and 6 views of 43 %; this method needs 2",
    ),
    (["--crop-scale", "0.5", "0.2"], "crop scale 0.5 0.2"),
    (["--blur", "2"], r"--blur must be at least 0 and at most 1, not \(2.0,\)"),
    (["--blur", "0.1", "0.2", "0.3"], "probability of blur 0.1 0.2 0.3"),
    (["--method", "swav", "--prototypes", "1"], "--prototypes must be at least 2, not 1"),
    (["--method", "dino", "--prototypes", "1"], "--prototypes must be at least 2, not 1"),
    (["--method", "ressl", "--queue-size", "1"], "--queue-size must be at least 2, not 1"),
]


@pytest.mark.parametrize(("words", "message"), VALUES)
def test_values_no_run_could_use(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(["--data", "x", *words])


def test_values_are_checked_from_python_too() -> None:
    with pytest.raises(UserError, match="--workers must be at least 1"):
        MachineOptions(workers=0)
    with pytest.raises(UserError, match="--temperature must be above 0"):
        make_config(data="x", temperature=-1.0)
    with pytest.raises(UserError, match="moco has no option --batchsize"):
        make_config("moco", batchsize=3)
    for name, value, message in (
        ("optimizer", "adam", "can't be 'adam'; choose from: sgd, lars, adamw, lamb"), ("batch_size", 256.5, "256.5"),
        ("batch_size", "256", "'256'"), ("lr", float("inf"), "not inf"),
        ("cross", "qeue", "batch, batch-within, queue, queue-both, none"),
        ("blur", 0.5, "--blur can't be 0.5"), ("cifar_stem", 1, "--cifar-stem can't be 1"), ("preset", "huge", "huge"),
        ("arch", 3, "--arch can't be 3"), ("optimizer", ["sgd"], "--optimizer can't be"), ("recipe", 3, "--recipe"),
        ("epochs", "5", "--epochs can't be '5'"), ("method", 3, "unknown --method 3"), ("preset", [], "--preset \\[]"),
        ("resolution", 96, "--resolution 96 is not two sides"), ("data", 3, "--data can't be 3"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            make_config(**{"method": "moco", name: value})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "moco", "--clusters", "10"], "--clusters is of use only with --negatives meow$"),
        (["--method", "simclr", "--anchor-weight", "2"], "--anchor-weight is of use only with --anchor$"),
        (["--method", "moco", "--uniform-weight", "0.3"], "--uniform-weight is of use only with --uniform$"),
        (["--method", "moco", "--cross-features", "encoder"], "only with --cross batch or batch-within$"),
        (["--trust", "0.02"], "--trust is of use only with --optimizer lars$"),
        (["--init-partial"], "--init-partial is of use only with --init$"),
        (["--knn-k=20"], "--knn-k is of use only with --knn-every$"),
        (["--vit-positions", "learned"], "--vit-positions is of use only with --arch vit_tiny or vit_small or"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(["--data", "x", *words])


def test_an_option_is_of_use_once_the_other_is_on() -> None:
    for words in (
        ["--negatives", "meow", "--clusters", "10"], ["--uniform", "queue", "--uniform-weight", "0.3"],
        ["--optimizer", "lars", "--trust", "0.02"], ["--arch", "vit_tiny", "--vit-positions", "learned"], ["--lidar"],
        ["--uniform", "none", "--uniform-weight", "0.3"],  # one run of several, say
    ):  # fmt: skip
        parse_config(["--data", "x", "--method", "moco", *words])
    with pytest.raises(UserError, match="--clusters is of use only with --negatives meow"):
        make_config("moco", data="x", clusters=(10,))
    make_config("moco", data="x", clusters=(10,), negatives="meow")


def test_a_file_may_have_what_is_of_no_use(tmp_path: pathlib.Path) -> None:
    path, saved = str(tmp_path / "config.json"), flat(make_config("moco", data="x")) | {"trust": 2.0}
    write_json(tmp_path / "config.json", {"format": FORMAT, "config": saved})
    assert parse_config(["--config", path, "--data", "x", "--lr", "0.1"]).optimisation.trust == 2.0
    with pytest.raises(UserError, match="--trust is of use only"):
        parse_config(["--config", path, "--data", "x", "--trust", "3"])


def test_a_path_from_python_is_one_of_text() -> None:
    assert make_config(data=pathlib.Path("x"), run=pathlib.Path("y")) == make_config(data="x", run="y")


def test_options_of_another_method_are_no_configuration() -> None:
    with pytest.raises(UserError, match="--method moco has options of its own"):
        dataclasses.replace(make_config("moco", data="x"), method=make_config("simclr").method)


def test_an_option_of_other_methods_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttrain import config
    from fasttrain.methods.options.moco import MoCoOptions

    @dataclasses.dataclass(frozen=True)
    class CentredOptions(MoCoOptions):
        centre_momentum: float = 0.9

    monkeypatch.setitem(config.METHODS, "centred", CentredOptions)
    assert (
        flat(parse_config(["--data", "x", "--method", "centred", "--centre-momentum", "0.5"]))["centre_momentum"] == 0.5
    )
    with pytest.raises(UserError, match="--centre-momentum is an option of --method centred, not of moco"):
        parse_config(["--data", "x", "--method", "moco", "--centre-momentum", "0.5"])


def test_an_optimizer_brings_its_defaults() -> None:
    """MoCo v3's for LARS and AdamW; what is typed counts more, in any order."""
    config = parse_config(["--data", "x", "--optimizer", "lars"]).optimisation
    assert (config.lr, config.weight_decay) == (0.6, 1e-6)
    config = parse_config(["--lr", "0.001", "--data=x", "--preset=cifar10", "--optimizer=adamw"]).optimisation
    assert (config.lr, config.weight_decay, config.batch_size) == (0.001, 0.1, 512)
    own = parse_config(["--data", "x", "--preset", "cifar10", "--optimizer", "sgd"]).optimisation  # the method's anyway
    assert own == make_config("xmoco", "cifar10").optimisation


def test_another_optimizer_has_nothing_of_what_the_papers_own_is_given() -> None:
    """DINO's weight decay of a vision transformer ends at 0.4, Barlow's biases have a fortieth of LARS's rate."""
    sgd = make_config("dino", arch="vit_small", optimizer="sgd").optimisation
    assert (sgd.weight_decay, sgd.weight_decay_end, sgd.decay) == (1e-4, None, "auto")
    adamw = make_config("barlow", "imagenet100", optimizer="adamw").optimisation
    assert (adamw.vector_lr, adamw.trust, adamw.trust_clip, adamw.epochs) == (1.0, 1e-3, False, 400)
    assert make_config("barlow", optimizer="lars").optimisation.vector_lr == 0.024  # its own
    typed = make_config("dino", arch="vit_small", optimizer="lars", decay="all").optimisation
    assert (typed.lr, typed.decay) == (0.6, "all")


@pytest.mark.parametrize(("cross", "weight"), [("batch", 64), ("batch-within", 64), ("queue", 1), ("queue-both", 1)])
def test_a_consistency_brings_its_weight(cross: str, weight: float) -> None:
    """As --help shows and config.json keeps it; what is typed or kept in a file counts more."""
    for method in ("moco", "xmoco", "co2"):
        assert make_config(method, cross=cross).method.regularisers.cross_weight == weight  # type: ignore[attr-defined]
        config = parse_config(["--cross-weight", "3", "--data", "x", "--method", method, f"--cross={cross}"])
        assert config.method.regularisers.cross_weight == 3  # type: ignore[attr-defined]
    assert make_config("xmoco").method.regularisers.cross_weight == 64  # type: ignore[attr-defined]


def test_a_run_from_when_a_weight_was_not_written_down_has_the_same(tmp_path: pathlib.Path) -> None:
    for cross, weight in (("batch-within", 64), ("queue", 1)):
        settings = Settings.of(make_config("moco", data="x", cross=cross))
        assert settings.values["cross_weight"] == weight
        saved = {**settings.values, "cross_weight": None}
        assert settings.differences(named_now(saved)) == []
        assert settings.differences(named_now({**saved, "cross_weight": 5.0})) == [
            f"--cross-weight was 5.0, now {float(weight)}"
        ]
    old = {"method": "moco", "cross": "batch", "cross_weight": 5.0}
    write_json(tmp_path / "old.json", {"format": FORMAT, "config": old})
    kept = parse_config(["--data", "x", "--config", str(tmp_path / "old.json")]).method
    assert (kept.regularisers.cross, kept.regularisers.cross_weight) == ("batch", 5)  # type: ignore[attr-defined]
    for weight in (1.0, None):
        without = Settings.of(make_config("xmoco", data="x", cross="none"))
        assert without.differences(named_now({**without.values, "cross_weight": weight})) == []


@pytest.mark.parametrize("words", [["--preset", "cifar10"], ["--method", "co2"]])
def test_a_consistency_of_a_file_keeps_its_weight(tmp_path: pathlib.Path, words: list[str]) -> None:
    """Also where that is what the method has without one."""
    saved = Settings.of(make_config("moco", "demo", data="x", cross="batch", cross_weight=1.0)).values
    write_json(tmp_path / "old.json", {"format": FORMAT, "config": saved})
    kept = parse_config(["--data", "x", "--config", str(tmp_path / "old.json"), *words]).method
    assert (kept.regularisers.cross, kept.regularisers.cross_weight) == ("batch", 1)  # type: ignore[attr-defined]


def test_a_consistency_of_a_file_gives_way_to_one_that_is_typed(tmp_path: pathlib.Path) -> None:
    """Even where the method typed could not have had it."""
    saved = Settings.of(make_config("moco", data="x", cross="queue")).values
    write_json(tmp_path / "old.json", {"format": FORMAT, "config": saved})
    words = ["--data", "x", "--config", str(tmp_path / "old.json"), "--method", "simclr", "--cross"]
    for cross, weight in (("none", 1), ("batch", 64)):
        kept = parse_config([*words, cross]).method
        assert (kept.regularisers.cross, kept.regularisers.cross_weight) == (cross, weight)  # type: ignore[attr-defined]


def test_another_recipe_is_drawn_as_it_is() -> None:
    """What a preset changes in one recipe is not for another."""
    assert make_config("moco", "imagenet100").views.crop_scale == (0.08, 1.0)
    for views in (
        make_config("moco", "imagenet100", recipe="weak-key").views,
        parse_config(["--data", "x", "--method", "mocov3", "--arch=vit_small", "--recipe=weak-key"]).views,
        make_config("vicreg", "imagenet100", recipe="weak-key").views,
    ):
        assert views == ViewOptions(recipe="weak-key")
    assert make_config("moco", "imagenet100", recipe="cifar", crop_scale=(0.5, 1.0)).views.crop_scale == (0.5, 1.0)


def test_a_default_warm_up_never_leaves_nothing_of_a_run() -> None:
    short = make_config("mocov3", "demo", arch="vit_tiny").optimisation  # 12 epochs, of which 40 would warm up
    assert (short.epochs, short.warmup_epochs) == (12, 1.2)
    assert make_config("mocov3", arch="vit_tiny").optimisation.warmup_epochs == 40
    assert parse_config(["--data", "x", "--method", "dino", "--epochs", "2"]).optimisation.warmup_epochs == 0.2
    assert make_config("dino", epochs=2).optimisation.warmup_epochs == 0.2


def test_a_vision_transformer_of_torchvision_has_heads_of_its_own() -> None:
    """MoCo v3's twelve are for its vit_small; vit_l_16 has sixteen."""
    assert flat(make_config("mocov3", arch="vit_small"))["vit_heads"] == 12
    large = make_config("mocov3", arch="vit_l_16")
    assert (flat(large)["vit_heads"], large.optimisation.optimizer) == (0, "adamw")


def test_the_learning_rate_is_per_256_images() -> None:
    """Of MoCo's CIFAR-10 notebook, 0.06 at a batch of 512."""
    config = make_config("moco", "cifar10", data="x")
    assert config.optimisation.peak_lr == pytest.approx(0.06)
    assert make_config("moco", data="x", batch_size=1024).optimisation.peak_lr == pytest.approx(4 * 0.03)


def test_help_names_every_option_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in flat(make_config(data="x")):
        assert flag(name) in text
    for group in get_type_hints(TrainConfig):
        assert f"{group} options" in text


def test_differences_are_of_what_binds_a_run() -> None:
    saved = Settings.of(make_config(data="x", workers=3)).values
    assert Settings.of(make_config(data="y", workers=1, max_steps=9)).differences(saved) == []
    assert Settings.of(make_config(data="x", lr=0.5)).differences(saved) == ["--lr was 0.03, now 0.5"]
    other = Settings.of(make_config(data="x", crop_scale=(0.1, 1.0))).differences(saved)
    assert other == ["--crop-scale was None, now [0.1, 1.0]"]
    alike = make_config("moco", data="x", cross="batch-within", cross_features="encoder", uniform="batch")
    assert Settings.of(alike).differences(saved) == ["--method was 'xmoco', now 'moco'"]


def test_what_a_run_folder_says_is_not_enough_to_import_code(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a stranger's, and the module lie in it."""
    prepare(tmp_path / "run", Settings.of(make_config("moco", data="x")), False).close()
    path = tmp_path / "run/config.json"
    path.write_text(path.read_text().replace('"moco"', '"module_of_a_stranger:Options"'))
    (tmp_path / "run/module_of_a_stranger.py").write_text(
        "from fasttrain.methods.options.moco import MoCoOptions as Options"
    )
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for attempt in (
        lambda: load_config(tmp_path / "run"),
        lambda: parse_config(["--config", str(path)]),
        lambda: parse_config(["--config", str(path), "--method", "moco"]),
    ):
        with pytest.raises(UserError, match="wants the code of module_of_a_stranger:Options"):
            attempt()
        assert "module_of_a_stranger" not in sys.modules
    named = "module_of_a_stranger:Options"
    assert parse_config(["--config", str(path), "--method", named]).run.method == named
    assert load_config(tmp_path / "run", named).run.method == named
    del sys.modules["module_of_a_stranger"]


def test_a_saved_configuration_is_a_start_for_another_run(tmp_path: pathlib.Path) -> None:
    config = make_config("moco", "demo", data="x", blur=(0.1, 0.2), lr=0.5, run="runs/first", crop_scale=(0.3, 1.0))
    prepare(tmp_path / "run", Settings.of(config), False).close()
    assert load_config(tmp_path / "run") == config
    path = str(tmp_path / "run" / "config.json")
    again = parse_config(["--config", path, "--lr", "0.7"])
    assert again == make_config("moco", "demo", data="x", blur=(0.1, 0.2), lr=0.7, config=path, crop_scale=(0.3, 1.0))
    other = parse_config([f"--config={path}", "--method", "xmoco", "--data", "y"])
    assert (other.run.method, other.data.data, other.optimisation.lr) == ("xmoco", "y", 0.5)
    assert (flat(other)["cross"], flat(other)["uniform"]) == ("batch-within", "batch")  # the new method's own
    large = flat(parse_config([f"--config={path}", "--preset", "cifar10"]))
    assert (large["arch"], large["queue_size"], large["lr"]) == ("resnet18", 4096, 0.5)
    (tmp_path / "old.json").write_text(json.dumps({"config": {"method": "moco"}}))
    with pytest.raises(UserError, match="by an earlier version of fasttrain"):
        parse_config(["--config", str(tmp_path / "old.json")])
    with pytest.raises(UserError, match="No such file"):
        parse_config(["--config", str(tmp_path / "none.json")])


def test_what_is_typed_may_replace_a_saved_value_that_another_method_refuses(tmp_path: pathlib.Path) -> None:
    saved = make_config("dino", data="x", recipe="swav", accumulate=2, optimizer="adamw", epochs=5, warmup_epochs=1.0)
    prepare(tmp_path / "run", Settings.of(saved), False).close()
    start = ["--config", str(tmp_path / "run/config.json"), "--method"]
    config = parse_config([*start, "simclr", "--recipe", "mocov2", "--accumulate", "1", "--warmup-epochs", "0.5"])
    assert (config.views.recipe, config.optimisation.accumulate, config.optimisation.epochs) == ("mocov2", 1, 5)
    assert config.optimisation.warmup_epochs == 0.5
    barlow = parse_config([*start, "barlow", "--recipe", "mocov2", "--accumulate", "1"]).optimisation
    assert (barlow.optimizer, barlow.lr, barlow.vector_lr) == ("adamw", 1.5e-4, 1.0)
    with pytest.raises(UserError, match="--recipe swav gives 2 views of full size and 6"):
        parse_config([*start, "moco"])
    prepare(tmp_path / "queue", Settings.of(make_config("moco", data="x", cross="queue")), False).close()
    start[1] = str(tmp_path / "queue/config.json")
    assert flat(parse_config([*start, "byol", "--cross", "batch"]))["cross"] == "batch"
    with pytest.raises(UserError, match="--cross can't be 'queue'; choose from: batch, batch-within, none"):
        parse_config([*start, "byol"])


def test_the_run_folder_may_be_given_by_place() -> None:
    expected = make_config("moco", data="x", run="runs/first", fresh=True)
    for words in (
        "runs/first --data x --fresh --method moco", "--data x --fresh runs/first --method moco",
        "--data x --method moco --fresh runs/first", "--method moco --data=x --fresh --run runs/first",
    ):  # fmt: skip
        assert parse_config(words.split()) == expected, words
    assert parse_config(["x", "--data", "x"]) == make_config(data="x", run="x")


def test_workers_are_a_number_or_all_the_cores() -> None:
    assert parse_config(["--data", "x"]).machine == parse_config(["--data", "x", "--workers", "auto"]).machine
    assert parse_config(["--data", "x", "--workers", "3"]).machine.workers == 3
    ranks = Ranks("cpu")
    assert (ranks.threads("auto"), ranks.threads(3)) == (ranks.cores, 3)


def test_a_resolution_sets_the_first_and_the_final_side() -> None:
    views = parse_config(["--data", "x", "--resolution", "96:160"]).views
    assert (views.start_size, views.size) == (96, 160)
    assert parse_config(["--data", "x", "--resolution", "96:160", "--size", "160"]).views.size == 160
    assert make_config(data="x", resolution="96:160").views == views
    assert parse_config(["--data", "x"]).views.start_size == 224


def test_views_grow_linearly_in_steps_of_the_stride() -> None:
    views = make_config(resolution="128:224").views
    sizes = [views.size_at(epoch, 100) for epoch in range(100)]
    assert sizes[0] == 128
    assert set(sizes[75:]) == {224}
    assert sorted(sizes) == sizes
    assert set(sizes) == {128, 160, 192, 224}
    assert {make_config().views.size_at(epoch, 100) for epoch in range(100)} == {224}
    assert make_config(resolution="100:224").views.size_at(0, 100) == 100
    small = make_config(resolution="16:32").views
    assert {small.size_at(epoch, 100) for epoch in range(100)} == {16, 24, 32}


def test_the_choices_of_an_option_are_all_there_are() -> None:
    for options, name, choices in ((RunOptions, "preset", PRESETS), (ViewOptions, "recipe", {"method", *RECIPES})):
        assert set(get_args(get_type_hints(options)[name])) == set(choices)
