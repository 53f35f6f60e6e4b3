"""log_sum_exp's versions against fp64, with every gradient on both sides, and what else its contract promises."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from support.similarity import SLACK, VERSIONS, Largest, assert_maximum, device_of, plain, rows

from fasttrain.kernels.similarity import cpu, log_sum_exp, log_sum_exp_with_maximum

NEEDS = ["x", "keys", "both"]  # which side takes a gradient
SIZES = [(1, 2, 8), (3, 7, 16), (17, 63, 100), (33, 257, 128), (40, 40, 256), (130, 135, 64)]  # R, K, D


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def everything(
    function: Callable[..., torch.Tensor], x: torch.Tensor, keys: torch.Tensor, temperature: torch.Tensor, needs: str
) -> dict[str, torch.Tensor]:
    """By name: lse, and the gradients that a weighted sum of it gives to what needs one. The weights change sign."""
    x, keys = x.detach().requires_grad_(needs != "keys"), keys.detach().requires_grad_(needs != "x")
    temperature = temperature.detach().requires_grad_(needs != "keys")
    lse = function(x, keys, temperature)
    total = (lse * torch.linspace(-1, 2, len(lse), device=lse.device).to(lse.dtype)).sum()
    wanted = {"x": x, "keys": keys, "temperature": temperature}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(total, list(wanted.values()))
    return {"lse": lse.detach(), **dict(zip(wanted, gradients, strict=True))}


def among(function: Callable[..., torch.Tensor], x: torch.Tensor, temperature: torch.Tensor) -> list[torch.Tensor]:
    """As `everything`, where rows and keys are one tensor."""
    x, temperature = x.detach().requires_grad_(), temperature.detach().requires_grad_()
    lse = function(x, x, temperature)
    total = (lse * torch.linspace(-1, 2, len(lse)).to(lse.dtype)).sum()
    return [lse.detach(), *torch.autograd.grad(total, (x, temperature))]


def lse_of_plain(x: torch.Tensor, keys: torch.Tensor, t: torch.Tensor, own: int | None) -> torch.Tensor:
    return plain(x, keys, t.expand(len(x)), own)[0]


@pytest.mark.parametrize(("impl", "dtype"), VERSIONS)
@pytest.mark.parametrize(("r", "k", "d"), SIZES)
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("last", [None, False, True])
def test_values_and_gradients_against_fp64(
    impl: str, dtype: torch.dtype, r: int, k: int, d: int, needs: str, last: bool | None
) -> None:
    own = None if last is None else k - r if last else 0
    temperature, device = 0.1, device_of(impl)
    x, keys = rows(r, d, 1, dtype, device), rows(k, d, 2, dtype, device)
    t = torch.linspace(temperature, 1.5 * temperature, r, dtype=torch.float32, device=device)

    def of_plain(*a: torch.Tensor) -> torch.Tensor:
        return lse_of_plain(*a, own)

    truth = everything(of_plain, x.double(), keys.double(), t.double(), needs)
    eager = everything(of_plain, x, keys, t, needs)
    ours = everything(lambda *a: log_sum_exp(*a, own=own, impl=impl), x, keys, t, needs)
    assert ours["lse"].dtype == torch.float32
    # Where plain torch happens to be exact, roundings of the largest number are still allowed; in fp32 also those of
    # an exponent, which is as large as 1/τ.
    floor = torch.finfo(dtype).eps * (2 / temperature if dtype == torch.float32 else 2)
    for name, true in truth.items():
        error, eagers = ((values[name].double() - true).abs().max() for values in (ours, eager))
        assert error <= SLACK * eagers + floor * max(1.0, float(true.abs().max())), name
        assert name == "lse" or ours[name].dtype == (torch.float32 if name == "temperature" else dtype)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(("r", "k"), [(3, 5), (cpu.ROWS + 3, cpu.KEYS + 600), (700, 1500)])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("place", [None, 0, 0.5, 1])
def test_fp64_is_as_autograd_has_it_whatever_the_tiles(
    impl: str, r: int, k: int, needs: str, place: float | None
) -> None:
    own = None if place is None else int(place * (k - r))
    x, keys, t = rows(r, 24, 1), rows(k, 24, 2), torch.tensor(0.07, dtype=torch.float64)
    truth = everything(lambda *a: lse_of_plain(*a, own), x, keys, t, needs)
    ours = everything(lambda *a: log_sum_exp(*a, own=own, impl=impl), x, keys, t, needs)
    for name, true in truth.items():
        assert torch.allclose(ours[name], true, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("r", [2, 3, cpu.SIDE - 1, cpu.SIDE, cpu.SIDE + 1, 2 * cpu.SIDE + 88])
@pytest.mark.parametrize("own", [None, 0])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_rows_among_themselves(impl: str, r: int, own: int | None) -> None:
    x = 3 * rows(r, 24, 1)  # of norms that are not 1
    for t in (torch.tensor(0.3).double(), torch.linspace(0.3, 0.9, r).double()):  # one serves both sides, many do not
        truth = among(lambda *a: lse_of_plain(*a, own), x, t)
        ours = among(lambda *a: log_sum_exp(*a, own=own, impl=impl), x, t)
        for true, value in zip(truth, ours, strict=True):
            assert torch.allclose(value, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("impl", "dtype"), [("reference", torch.float32), *VERSIONS])
@pytest.mark.parametrize(("r", "k", "d"), [*SIZES, (cpu.ROWS + 3, cpu.KEYS + 9, 16)])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("own", [None, 0])
def test_the_maximum_is_the_nearest_key_of_those_that_are_read(
    impl: str, dtype: torch.dtype, r: int, k: int, d: int, needs: str, own: int | None
) -> None:
    x, keys, t = rows(r, d, 1, dtype, device_of(impl)), rows(k, d, 2, dtype, device_of(impl)), torch.tensor(0.1)
    keys[:r] = x  # own keys are the nearest
    x, keys, t = x.requires_grad_(needs != "keys"), keys.requires_grad_(needs != "x"), t.to(x.device)
    lse, maximum = log_sum_exp_with_maximum(x, keys, t, own=own, impl=impl)
    assert_maximum(maximum, x.detach(), keys.detach(), t.expand(r), own)
    assert lse.requires_grad
    assert torch.equal(lse, log_sum_exp(x, keys, t, own=own, impl=impl))


@pytest.mark.parametrize("r", [2, 3, cpu.SIDE - 1, cpu.SIDE + 1, 2 * cpu.SIDE + 88])
@pytest.mark.parametrize("own", [None, 0])
def test_the_maximum_among_rows_themselves(r: int, own: int | None) -> None:
    x, t = rows(r, 24, 1, torch.float32).requires_grad_(), torch.tensor(0.3)
    _, maximum = log_sum_exp_with_maximum(x, x, t, own=own)
    assert_maximum(maximum, x.detach(), x.detach(), t.expand(r), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_among_themselves_in_low_precision(dtype: torch.dtype) -> None:
    x, t = rows(300, 64, 1, dtype), torch.tensor(0.1)
    truth = among(lambda *a: lse_of_plain(*a, 0), x.double(), t.double())
    eager = among(lambda *a: lse_of_plain(*a, 0), x, t)
    ours = among(lambda *a: log_sum_exp(*a, own=0), x, t)
    assert [value.dtype for value in ours] == [torch.float32, dtype, torch.float32]
    for true, value, eagers in zip(truth, ours, eager, strict=True):
        error, most = (float((found.double() - true).abs().max()) for found in (value, eagers))
        assert error <= SLACK * most + torch.finfo(dtype).eps * max(1.0, float(true.abs().max()))


def test_half_of_the_similarities_serve_where_both_sides_are_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("all of them")

    for name in ("readout", "keys_backward"):
        monkeypatch.setattr(cpu, name, refuse)
    x = rows(5, 16, 1).requires_grad_()
    log_sum_exp(x, x, 0.2, own=0).sum().backward()
    assert x.grad is not None
    for keys, own in ((x.detach(), 0), (rows(9, 16, 2), 0), (rows(9, 16, 2), 4)):
        with pytest.raises(AssertionError, match="all of them"):
            log_sum_exp(x, keys, 0.2, own=own, impl="cpu")


def test_similarities_that_fill_no_tile_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, whole = [], cpu.readout
    monkeypatch.setattr(cpu, "readout", lambda *a: passes.append(a) or whole(*a))
    x = rows(cpu.ROWS, 16, 1)
    for more in (0, 1):
        log_sum_exp(x, rows(cpu.KEYS + more, 16, 2), 0.2)
        assert len(passes) == more


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("apart", [False, True])
def test_equal_rows_in_closed_form(impl: str, apart: bool) -> None:
    """Each row has the others with equal weight, and they have it: 2x/τ, and of the temperature −R/τ²."""
    x = rows(1, 32, 1, torch.float32, device_of(impl)).repeat(70, 1).requires_grad_()
    t = torch.tensor(0.02, device=x.device, requires_grad=True)
    lse = log_sum_exp(x, x.view_as(x) if apart else x, t, own=0, impl=impl)
    assert torch.allclose(lse, torch.full_like(lse, 1 / 0.02 + math.log(69)), rtol=1e-5)
    by_x, by_t = torch.autograd.grad(lse.sum(), (x, t))
    assert torch.allclose(by_x, 2 * x / 0.02, rtol=1e-4)
    assert torch.allclose(by_t, torch.full_like(t, -70 / 0.02**2), rtol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_row_with_one_key_left_gives_all_of_its_gradient_to_it(impl: str) -> None:
    """The masked similarity is minus infinity, and must not become a NaN on the way back."""
    x, keys = (rows(2, 16, seed, torch.float32, device_of(impl)).requires_grad_() for seed in (1, 2))
    by_x, by_keys = torch.autograd.grad(log_sum_exp(x, keys, 0.01, own=0, impl=impl).sum(), (x, keys))
    assert torch.allclose(by_x, keys.flip(0) / 0.01, rtol=1e-4)
    assert torch.allclose(by_keys, x.flip(0) / 0.01, rtol=1e-4)


@pytest.mark.parametrize("weight", [1e-6, 100.0])
@pytest.mark.parametrize(("impl", "dtype"), VERSIONS)
def test_many_small_shares_add_up(impl: str, dtype: torch.dtype, weight: float) -> None:
    """One key has nearly all of every row: the others have 1e-7 of it, where fp16 has one digit left or none."""
    x, keys = rows(1, 16, 1, dtype, device_of(impl)).repeat(500, 1), rows(130, 16, 2, dtype, device_of(impl))
    keys[0] = 16 * x[0]
    keys.requires_grad_()
    exact = keys.detach().double().requires_grad_()
    t = torch.ones(500, dtype=torch.float64, device=x.device)
    lse, true_lse = log_sum_exp(x, keys, 1.0, impl=impl), plain(x.double(), exact, t, None)[0]
    by_keys = torch.autograd.grad(weight * lse.sum(), keys)[0].double() / weight
    true = torch.autograd.grad(true_lse.sum(), exact)[0]
    # Of fp32, roundings of the exponent; in fp16 the result itself is rounded to multiples of 6e-8.
    relative = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    allowed = relative * true.abs().amax(1, keepdim=True) + (6e-8 / weight if dtype == torch.float16 else 0)
    assert ((by_keys - true).abs() < allowed).all()


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("needs", NEEDS)
def test_no_rows_give_the_keys_no_gradient(impl: str, needs: str) -> None:
    x, keys = rows(0, 16, 1, torch.float32, device_of(impl)), rows(5, 16, 2, torch.float32, device_of(impl))
    gradients = everything(lambda *a: log_sum_exp(*a, impl=impl), x, keys, torch.tensor(0.1, device=x.device), needs)
    assert all(not value.any() for value in gradients.values())


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_no_weight_gives_no_gradient(impl: str) -> None:
    x, keys = (rows(7, 16, seed, torch.float32, device_of(impl)).requires_grad_() for seed in (1, 2))
    gradients = torch.autograd.grad(0 * log_sum_exp(x, keys, 0.1, impl=impl).sum(), (x, keys))
    assert all(not value.any() for value in gradients)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["row", "keys", "weight"])
def test_bad_numbers_do_not_come_out_plausible(impl: str, bad: float, where: str) -> None:
    device = device_of(impl)
    x, keys = rows(3, 16, 1, torch.float32, device), rows(300, 16, 2, torch.float32, device)
    weight = torch.ones(3, device=device)
    {"row": x[1], "keys": keys[1], "weight": weight}[where][2] = bad
    x.requires_grad_()
    keys.requires_grad_()
    lse = log_sum_exp(x, keys, 0.1, impl=impl)
    by_x, by_keys = torch.autograd.grad((lse * weight).sum(), (x, keys))
    if where == "keys" and not math.isnan(bad):  # of minus infinity it takes no part; its 0 · inf shows in the average
        assert not by_x.isfinite().all(1).any()
        assert not by_keys[1].isfinite().all()
    else:
        assert not by_keys.isfinite().all(1).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_show_among_rows_that_are_both_sides(bad: float) -> None:
    x = rows(300, 16, 1, torch.float32)
    x[280, 2] = bad
    x.requires_grad_()
    by_x = torch.autograd.grad(log_sum_exp(x, x, 0.1, own=0).sum(), x)[0]
    assert not by_x.isfinite().all(1).any()


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("one", [False, True])
def test_the_same_from_run_to_run(impl: str, one: bool) -> None:
    x = rows(300, 64, 1, torch.float32, device_of(impl))
    keys = x if one else rows(700, 64, 2, torch.float32, device_of(impl))
    function = (
        (lambda *a: log_sum_exp(a[0], a[0], a[2], own=0, impl=impl)) if one else (lambda *a: log_sum_exp(*a, impl=impl))
    )
    first, second = (everything(function, x, keys, torch.tensor(0.1, device=x.device), "x") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    if not one:
        first, second = (everything(function, x, keys, torch.tensor(0.1, device=x.device), "keys") for _ in range(2))
        assert torch.equal(first["keys"], second["keys"])


@pytest.mark.parametrize("version", ["cpu", "triton"])
def test_the_average_is_made_only_for_rows_that_take_a_gradient(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from fasttrain.kernels.similarity import gpu

    module = cpu if version == "cpu" else gpu
    made, whole = [], module.readout

    def seen(*arguments: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lse, out, maximum = whole(*arguments)
        made.append(len(out) > 0)
        return lse, out, maximum

    monkeypatch.setattr(module, "readout", seen)
    x, keys, t = (rows(count, 16, count, torch.float32, device_of(version)) for count in (3, 9, 1))
    t = t[0, 0].abs()
    for needs, inputs in (
        (False, (x, keys, t)),
        (False, (x, keys.requires_grad_(), t)),
        (True, (x, keys, t.clone().requires_grad_())),
        (True, (x.clone().requires_grad_(), keys, t)),
    ):
        log_sum_exp(*inputs, impl=version)
        assert made.pop() == needs
        with torch.no_grad():
            log_sum_exp(*inputs, impl=version)
        assert not made.pop()


def test_the_cpu_version_holds_one_tile() -> None:
    x, keys = rows(600, 16, 1).requires_grad_(), rows(20000, 16, 2).requires_grad_()
    one = rows(4000, 16, 3).requires_grad_()
    saved = []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
        ),
    ):
        (log_sum_exp(x, keys, 0.1).sum() + log_sum_exp(one, one, 0.1, own=0).sum()).backward()
        lse = cpu.readout(x.detach(), keys.detach(), torch.full((600,), 0.1).double(), -1)[0]
        cpu.keys_backward(x.detach(), keys.detach(), torch.full((600,), 0.1).double(), -1, lse, lse)
        t = torch.tensor(0.1).double()
        lse, _ = cpu.symmetric(one.detach(), t, True)
        cpu.symmetric_backward(one.detach(), t, True, lse, lse)
    assert largest.numbers <= max(cpu.ROWS * cpu.KEYS, keys.numel())
    assert max(saved) <= keys.numel()


def test_operators_are_registered_correctly() -> None:
    x, keys = rows(4, 16, 1), rows(9, 16, 2)
    t = torch.full((4,), 0.2, dtype=torch.float64)
    for average in (False, True):
        inputs = (x.clone().requires_grad_(average), keys.clone().requires_grad_(), t.clone().requires_grad_(average))
        torch.library.opcheck(torch.ops.fasttrain.readout.default, (*inputs, 5, average, "cpu"))
    both = x.clone().requires_grad_(), t[0].clone().requires_grad_()
    torch.library.opcheck(torch.ops.fasttrain.symmetric_log_sum_exp.default, (*both, True))


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("needs", NEEDS)
def test_it_compiles_whole(needs: str, one: bool) -> None:
    x, keys, t = rows(4, 16, 1), rows(9, 16, 2), torch.tensor(0.2, dtype=torch.float64)

    def function(x: torch.Tensor, keys: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        keys = x if one and x.requires_grad else keys
        return log_sum_exp(x, keys, t, own=0, impl="cpu") + 0 * keys.sum()

    if one and needs == "both":
        return
    expected = everything(function, x, keys, t, needs if not one or needs == "keys" else "x")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found = everything(compiled, x, keys, t, needs if not one or needs == "keys" else "x")
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-12), name


def test_what_does_not_go_together_is_refused() -> None:
    x, keys = rows(2, 4, 1, torch.float32), rows(3, 4, 2, torch.float32)
    with pytest.raises(ValueError, match="must be"):
        log_sum_exp(x, keys.double(), 0.1)
    with pytest.raises(ValueError, match="own 2"):
        log_sum_exp(x, keys, 0.1, own=2)
    with pytest.raises(ValueError, match="none to compare"):
        log_sum_exp(x[:1], x[:1], 0.1, own=0)
    with pytest.raises(ValueError, match="temperature has shape"):
        log_sum_exp(x, keys, torch.ones(3))


@pytest.mark.gpu
def test_memory_on_a_gpu_stays_proportional_to_the_rows() -> None:
    x = rows(8192, 128, 1, torch.bfloat16, "cuda").requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_sum_exp(x, x, 0.2, own=0).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 32 * x.numel() * 4
