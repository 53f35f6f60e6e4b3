"""Encoders of torchvision, of timm, and of one's own: at the sizes and with the options that each can have."""

import pathlib
import sys
from typing import Any

import pytest
import timm
import torch
import torchvision
from support.steps import build, make, sample, small, take
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from fasttrain.config import load_config, make_config, parse_config
from fasttrain.engine.networks import make_networks
from fasttrain.networks.batch_norm import convert_batch_norm
from fasttrain.networks.encoders import make_encoder, zero_init_residual
from fasttrain.networks.momentum import momentum_copy
from fasttrain.networks.options import EncoderOptions, VisionTransformerOptions, is_vision_transformer
from fasttrain.networks.recompute import checkpoint_activations, stages
from fasttrain.networks.vision_transformer import freeze_patches, patch_projection
from fasttrain.run.earlier import named_now
from fasttrain.run.folder import prepare
from fasttrain.system.errors import UserError
from fasttrain.system.options import Settings

TIMM_VIT = "timm:vit_tiny_patch16_224"
OWN = "support.own_encoders"


def encoder_of(arch: str, size: int = 32, **options: Any) -> Any:
    torch.manual_seed(0)
    return make_encoder(EncoderOptions(arch=arch, **options), size)[0]


def views(size: int = 32, count: int = 4) -> Tensor:
    values = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return values.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"arch": "timm:resnet18"}, 512),
        ({"arch": "timm:efficientnet_lite0", "size": 32}, 1280),
        ({"arch": TIMM_VIT, "size": 32, "precision": "bf16"}, 192),
        ({"arch": TIMM_VIT, "patch_size": 4, "drop_path": 0.2}, 192),
        pytest.param({"arch": "vit_b_16", "size": 64}, 768, marks=pytest.mark.slow),
        ({"arch": "convnext_tiny", "size": 32}, 768),
        ({"arch": f"{OWN}:plain"}, 6),
        ({"arch": f"{OWN}:Sized", "patch_size": 4, "batch_norm": "sync"}, 5),
    ],
)
def test_a_step_moves_every_parameter_of_the_encoder(changes: dict[str, Any], width: int) -> None:
    config = small("moco", **changes)
    method, step = make("moco", **changes)
    assert next(method.projector.parameters()).shape[1] == width
    start = {name: value.clone() for name, value in method.state_dict().items()}
    for number in range(2):
        terms = take(step, sample(8, number, config), number, 0.05)
    assert terms["loss"].isfinite()
    assert step.skips_3.tolist() == [0, 0, -1]
    for name, p in method.encoder.named_parameters():
        assert not torch.equal(p, start[f"encoder.{name}"]), name


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timm_s_resnet_has_torchvision_s_state_and_computes_the_same(name: str) -> None:
    ours, theirs = encoder_of(f"timm:{name}").eval(), encoder_of(name).eval()
    theirs.load_state_dict(ours.state_dict())
    assert [p.shape for p in ours.state_dict().values()] == [p.shape for p in theirs.state_dict().values()]
    assert torch.allclose(ours(views()), theirs(views()), atol=1e-5)


@pytest.mark.parametrize("kind", ["split", "sync"])
@pytest.mark.parametrize("arch", ["timm:resnet18", "timm:efficientnet_lite0", "timm:regnetx_002"])
def test_a_converted_encoder_of_timm_keeps_the_activations_in_its_batch_norms(
    monkeypatch: pytest.MonkeyPatch, arch: str, kind: str
) -> None:
    monkeypatch.setattr("fasttrain.networks.batch_norm.world_size", lambda: 2)
    plain = encoder_of(arch)
    for buffer in (module.running_var for module in plain.modules() if isinstance(module, nn.BatchNorm2d)):
        buffer.uniform_(0.5, 2)
    converted = convert_batch_norm(encoder_of(arch), kind)
    assert converted.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    converted.load_state_dict(plain.state_dict())
    assert torch.equal(converted.eval()(views()), plain.eval()(views()))


def test_a_converted_encoder_of_timm_trains_as_the_unconverted_one_does() -> None:
    """Of one group of images, whose statistics are those of the batch."""
    found = []
    for groups in (0, 1):
        encoder = encoder_of("timm:efficientnet_lite0", drop_path=0.0)
        if groups:
            convert_batch_norm(encoder, "split", groups)
        encoder(views()).square().mean().backward()
        found.append([p.grad for p in encoder.parameters()] + [encoder.bn1.running_mean, encoder.bn1.running_var])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


def test_a_batch_norm_that_computes_something_else_is_a_clear_error() -> None:
    with pytest.raises(
        UserError, match="--batch-norm plain is all that this encoder can have: its Counted is of anoth"
    ):
        build(small(arch=f"{OWN}:counted"))
    assert build(small(arch=f"{OWN}:counted", batch_norm="plain"))


@pytest.mark.parametrize(("arch", "own"), [("vit_b_16", 224), ("vit_b_32", 64)])
def test_torchvision_s_vision_transformer_computes_what_torchvision_s_does_and_takes_other_sizes(
    arch: str, own: int
) -> None:
    encoder = encoder_of(arch, own).eval()
    theirs = torchvision.models.get_model(arch, image_size=own).eval()
    theirs.heads = nn.Identity()
    theirs.load_state_dict(encoder.state_dict())
    assert torch.allclose(encoder(views(own, 1)), theirs(views(own, 1)), atol=1e-5)
    assert encoder(views(own // 2 + 32, 2)).shape == (2, 768)


def built_for(method: str, **changes: Any) -> Any:
    """As a run builds it: views of every epoch are tried."""
    config = small(method, epochs=4, warmup_epochs=0.0, **changes)
    parts = config.method, config.encoder, config.views, config.optimisation, config.machine
    return make_networks(*parts, torch.device("cpu"), 0)


@pytest.mark.parametrize("arch", [TIMM_VIT, "timm:deit3_small_patch16_224", "vit_tiny"])
@pytest.mark.parametrize(
    ("method", "changes", "smaller"),
    [("moco", {"resolution": "28:56", "size": 56}, 28), ("dino", {"size": 56, "recipe": "swav"}, 24)],
)
def test_views_that_grow_and_small_crops_are_taken_by_a_vision_transformer(
    arch: str, method: str, changes: dict[str, Any], smaller: int
) -> None:
    encoder = built_for(method, arch=arch, patch_size=4, **changes).encoder
    widths = {encoder(views(side, 2)).shape[1] for side in (smaller, 56)}
    assert widths == {384 if "small" in arch else 192}


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "moco",
            {"resolution": "56:64", "size": 64},
            "can't take views of 56 px: .*; --resolution comes to views of 56, where 48 or 64 px would do",
        ),
        (
            "dino",
            {"size": 128, "recipe": "swav"},
            "can't take views of 55 px: .*; these are small crops of --size 128, where 112 or 224 px would do",
        ),
    ],
)
@pytest.mark.parametrize("arch", [TIMM_VIT, "vit_b_16", "vit_tiny"])
def test_other_views_of_a_wrong_size_are_one_line_with_sizes_that_work(
    arch: str, method: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^--arch {arch} {message}$"):
        built_for(method, arch=arch, patch_size=16, **changes)


def test_features_whose_width_goes_by_the_size_of_views_are_one_line() -> None:
    line = (
        "can't take views of 32 px: it makes 64 features of them, and 100 of 40 px; --resolution comes to views of 32"
    )
    with pytest.raises(UserError, match=line):
        built_for("moco", arch=f"{OWN}:of_any_size", size=40, resolution="32:40")


@pytest.mark.parametrize(
    ("arch", "size", "would_do"),
    [
        (TIMM_VIT, 100, "96 or 112"), ("timm:vit_small_patch14_dinov2", 100, "98 or 112"), ("vit_h_14", 64, "56 or 70"),
        ("timm:swin_tiny_patch4_window7_224", 66, "64 or 68"), ("timm:maxvit_tiny_rw_224", 100, "96 or 128"),
        ("maxvit_t", 300, "224 or 448"), ("swin_t", 3, "4"), ("timm:convnext_atto", 2, "32"),
        ("inception_v3", 32, "96"), (f"{OWN}:Sized", 36, "32 or 40"),
    ],
)  # fmt: skip
def test_a_wrong_size_is_one_line_with_sizes_that_work(arch: str, size: int, would_do: str) -> None:
    with pytest.raises(
        UserError, match=rf"^--arch {arch} can't take views of {size} px: [^\n]*; {would_do} px would do$"
    ):
        make_encoder(EncoderOptions(arch=arch), size)
    for side in map(int, would_do.split(" or ")):
        with torch.device("cpu" if arch.startswith(OWN) else "meta"):
            make_encoder(EncoderOptions(arch=arch), side)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("timm:resnet1", {}, r"unknown --arch 'timm:resnet1': timm has others, such as resnet"),
        ("timm:hf_hub:timm/resnet18", {}, r"unknown --arch"),
        ("timm:resnet18.a1_in2k", {}, r"unknown --arch 'timm:resnet18.a1_in2k': timm has resnet18.a1_in1k, "),
        ("timm:resnet18", {"patch_size": 4}, "--patch-size 4 is not for --arch timm:resnet18"),
        ("timm:vgg11", {"drop_path": 0.1}, "--drop-path 0.1 is not for --arch timm:vgg11"),
        ("resnet18", {"drop_path": 0.1}, "--drop-path 0.1 is not for --arch resnet18"),
        ("small", {"patch_size": 4}, "--patch-size 4 is not for --arch small"),
        (TIMM_VIT, {"cifar_stem": True}, "--cifar-stem is for ResNets"),
        ("timm:resnet18d", {"cifar_stem": True}, "--cifar-stem is for ResNets whose stem is one convolution"),
        (TIMM_VIT, {"vit": VisionTransformerOptions(vit_heads=6)}, "--vit-heads 6 is not for --arch timm:vit"),
        (f"{OWN}:plain", {"patch_size": 4}, "--patch-size 4 is not for --arch support"),
        (f"{OWN}:plain", {"drop_path": 0.2}, "--drop-path 0.2 is not for --arch support"),
        (f"{OWN}:missing", {}, f"--arch {OWN}:missing: .*has no attribute 'missing'"),
        ("no_such_module:make", {}, "--arch no_such_module:make: No module named"),
        (f"{OWN}:number", {}, "it is no function"),
        (f"{OWN}:nothing", {}, "it gives no torch.nn.Module but NoneType"),
        (f"{OWN}:wanting", {}, "missing a required argument: 'depth'"),
        (f"{OWN}:maps", {}, r"gives \(1, 4, 30, 30\), not features of shape \(N, F\)"),
        (f"{OWN}:Pairs", {}, r"gives tuple, not features of shape \(N, F\)"),
    ],
)
def test_what_can_not_be_is_a_clear_error(arch: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_encoder(EncoderOptions(arch=arch, **options), 32)


def test_without_timm_its_encoders_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="--arch timm:resnet18 needs the package timm: pip install timm"):
        make_encoder(EncoderOptions(arch="timm:resnet18"), 32)


def test_one_s_own_encoder_is_given_what_it_has_parameters_for() -> None:
    encoder = encoder_of(f"{OWN}:Sized", 32, patch_size=16, drop_path=0.25)
    assert (encoder.patches.kernel_size, encoder.drop_path) == ((16, 16), 0.25)
    assert encoder_of(f"{OWN}:Sized", 32).patches.kernel_size == (8, 8)


def test_paths_are_dropped_in_training_and_never_in_momentum_copies() -> None:
    for arch, options in ((TIMM_VIT, {}), ("vit_b_16", {}), ("swin_t", {}), ("vit_tiny", {"patch_size": 16})):
        encoder = encoder_of(arch, drop_path=0.5, **options)
        average = momentum_copy(encoder)
        assert not torch.allclose(encoder(views()), encoder(views()), atol=1e-4), arch
        assert torch.equal(average(views()), average(views())), arch
        assert torch.equal(average(views()), encoder.eval()(views())), arch


def test_rates_of_dropped_paths_grow_to_the_one_asked_for() -> None:
    found = encoder_of(TIMM_VIT, drop_path=0.22)
    rates = [module.drop_prob for module in found.modules() if hasattr(module, "drop_prob")]
    assert rates == pytest.approx([0.02 * block for block in range(1, 12) for _branch in range(2)])
    found = encoder_of("convnext_tiny", drop_path=0.34)
    rates = [module.p for module in found.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0.02 * block for block in range(18)])
    assert encoder_of("swin_t", drop_path=0.0)
    assert encoder_of("resnet18", drop_path=0.0)


@pytest.mark.parametrize("arch", [TIMM_VIT, "vit_b_16", "vit_tiny"])
def test_dino_drops_a_tenth_of_a_vision_transformer_s_paths_but_not_the_teacher_s(arch: str) -> None:
    sizes = {"size": 32, "recipe": "byol", "batch_size": 8, "patch_size": 16}
    assert make_config("dino", arch=arch).encoder.drop_path == 0.1
    assert make_config("dino", arch="timm:resnet50").encoder.drop_path is None
    method: Any = build(small("dino", arch=arch, **sizes))
    for network, most in ((method.encoder, 0.1), (method.momentum_encoder, 0.0)):
        rates = [getattr(m, "drop_prob", getattr(m, "p", 0.0)) for m in network.modules() if "D" in type(m).__name__]
        assert max(rates) == pytest.approx(most)


def test_vision_transformers_of_every_library_are_told_by_name() -> None:
    names = ["vit_b_16", TIMM_VIT, "timm:deit3_small_patch16_224", "timm:eva02_tiny_patch14_224", "timm:flexivit_small"]
    assert all(map(is_vision_transformer, names))
    assert not any(map(is_vision_transformer, ["timm:resnet50", "timm:swin_tiny_patch4_window7_224", "vit_mine:make"]))
    theirs = {name for name in timm.list_models() if is_vision_transformer(f"timm:{name}")}
    assert len(theirs) > 150
    config: Any = make_config("mocov3", arch=TIMM_VIT)
    assert (config.optimisation.optimizer, config.optimisation.lr, config.encoder.vit.vit_heads) == ("adamw", 1.5e-4, 0)


def test_mocov3_freezes_the_patches_of_timm_s_vision_transformer_and_deepens_its_heads() -> None:
    ours: Any = build(small("mocov3", arch="vit_tiny", patch_size=16))
    theirs: Any = build(small("mocov3", arch=TIMM_VIT))
    assert [p.shape for p in theirs.projector.parameters()] == [p.shape for p in ours.projector.parameters()]
    frozen = {name for name, p in theirs.encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    swin = encoder_of("timm:swin_tiny_patch4_window7_224")
    assert patch_projection(swin) is None
    freeze_patches(swin)
    assert all(p.requires_grad for p in swin.parameters())


def test_residual_blocks_of_timm_begin_as_their_shortcuts() -> None:
    found = encoder_of("timm:resnet18")
    for block in (block for block in found.modules() if hasattr(block, "zero_init_last")):
        nn.init.ones_(block.bn2.weight)
    zero_init_residual(found)
    assert not any(block.bn2.weight.any() for block in found.layer1)


def test_cifar_stem_of_timm_s_resnet_is_that_of_torchvision_s() -> None:
    ours, theirs = (encoder_of(arch, cifar_stem=True).eval() for arch in ("timm:resnet18", "resnet18"))
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours(views()), theirs(views()), atol=1e-5)


@pytest.mark.parametrize(
    "arch", [TIMM_VIT, "timm:eva02_tiny_patch14_224", "timm:efficientnet_lite0", "timm:resnet18", "vit_b_16"]
)
def test_activations_are_recomputed_to_the_same_gradients(arch: str) -> None:
    size, found = 28 if "patch14" in arch else 32, []
    for recompute in (False, True):
        encoder = convert_batch_norm(encoder_of(arch, size, drop_path=0.2), "split")
        if recompute:
            assert len(stages(encoder)) >= 4
            checkpoint_activations(encoder)
        torch.manual_seed(2)
        encoder(views(size)).square().sum().backward()
        found.append([p.grad for p in encoder.parameters()] + list(encoder.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("arch", [TIMM_VIT, "timm:resnet18", "vit_b_32"])
def test_it_is_one_graph_for_a_compiler_at_each_size(arch: str) -> None:
    encoder = convert_batch_norm(encoder_of(arch, drop_path=0.3 if "vit" in arch else None), "split")
    compiled = torch.compile(encoder, fullgraph=True, dynamic=False, backend="eager")
    for size in (32, 64):
        found = []
        for network in (encoder, compiled):
            torch.manual_seed(2)
            found.append(network(views(size)))
        assert torch.allclose(*found, atol=1e-4)


def test_a_run_folder_s_own_encoder_runs_only_where_it_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = "encoder_of_a_stranger:make"
    config = make_config("moco", data="x", arch=named)
    assert "encoder_of_a_stranger" not in sys.modules  # options alone import nothing
    prepare(tmp_path / "run", Settings.of(config), False).close()
    path = tmp_path / "run/config.json"
    for attempt in (lambda: load_config(tmp_path / "run"), lambda: parse_config(["--config", str(path)])):
        with pytest.raises(UserError, match=f"wants the code of {named}, which runs only where --arch names it, too"):
            attempt()
    assert load_config(tmp_path / "run", arch=named) == config
    assert parse_config(["--config", str(path), "--arch", named]).encoder.arch == named
    timm_s = make_config("moco", data="x", arch="timm:resnet18")
    prepare(tmp_path / "timm", Settings.of(timm_s), False).close()
    assert load_config(tmp_path / "timm") == timm_s


def test_a_run_from_before_patches_of_all_encoders_had_one_name_is_read(tmp_path: pathlib.Path) -> None:
    config = make_config("moco", data="x", arch="vit_tiny", patch_size=8)
    settings = Settings.of(config)
    prepare(tmp_path / "run", settings, False).close()
    path = tmp_path / "run/config.json"
    path.write_text(path.read_text().replace('"patch_size"', '"vit_patch"'))
    assert load_config(tmp_path / "run") == config
    prepare(tmp_path / "run", settings, False).close()  # goes on
    saved = {"vit_patch" if name == "patch_size" else name: value for name, value in settings.values.items()}
    assert settings.differences(named_now(saved)) == []  # as a checkpoint holds them
    assert settings.differences(named_now({**saved, "vit_patch": 4})) == ["--patch-size was 4, now 8"]
