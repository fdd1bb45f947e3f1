"""One update: accumulation, clipping, scaling, smoothing, decay and EMA do what their names say; sums are exact."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_network import small
from torch import Tensor, nn
from torch.nn import functional as F
from warm import Warm

from dtrain.data.batch import Batch
from dtrain.keyed import Stream, torch_seed
from dtrain.model.groups import grouped
from dtrain.model.learner import Learner
from dtrain.model.metrics import LOSS_UNIT, Sums, Tally, no_sums, sums_of
from dtrain.model.network import Average, Network
from dtrain.model.optimization import build_optimizer, chosen_optimizer, clip, pack, unpack
from dtrain.model.step import StepOptions, eval_step, loss_of, seed_step, train_step
from dtrain.plan import Share, shares_of
from dtrain.settings.optimization import Optimization

CPU = torch.device("cpu")
WHOLE, QUARTERS = Share(0, (24,), 24), Share(0, (6, 6, 6, 6), 24)


def plain() -> nn.Module:
    """No batch norm and no dropout, so that a batch in parts is the batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def batch(n: int = 24, classes: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 8, 8, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return Batch(images, labels, torch.arange(n), torch.tensor(77))


def stepped(
    module: nn.Module,
    options: StepOptions,
    share: Share = WHOLE,
    *,
    dtype: torch.dtype = torch.float32,
    scaler: torch.amp.GradScaler | None = None,
    ema: Average | None = None,
    lr: float = 0.1,
) -> tuple[nn.Module, Tensor]:
    """The module after one SGD step, and the sums."""
    network = Network(module, module, dtype, CPU)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return module, train_step(Learner(network, optimizer, scaler, ema), batch(), options, share).sums


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)


def test_four_micro_batches_are_the_big_batch_within_1e_6() -> None:
    big, sums = stepped(plain(), StepOptions(0.1, None))
    parts, sums_of_parts = stepped(plain(), StepOptions(0.1, None), QUARTERS)
    assert distance(big, plain()) > 0
    assert distance(big, parts) < 1e-6  # float32 rounding of gradients of about 0.1 times the rate of 0.1
    assert sums[:3].tolist() == sums_of_parts[:3].tolist()
    assert sums[3].item() == pytest.approx(sums_of_parts[3].item(), abs=24)  # units of 2^-20, one an image


def test_clipping_limits_the_norm_of_the_unscaled_gradient() -> None:
    clipped, _ = stepped(plain(), StepOptions(0.0, 0.01), lr=1.0)
    pairs = zip(clipped.parameters(), plain().parameters(), strict=True)
    moved = math.sqrt(sum(float((p - q).detach().pow(2).sum()) for p, q in pairs))
    assert moved == pytest.approx(0.01, rel=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, _ = stepped(plain(), StepOptions(0.0, 0.01), lr=1.0, scaler=scaler)
    assert distance(scaled, clipped) < 1e-6


def test_a_gradient_whose_norm_is_too_large_for_float32_is_clipped_and_keeps_its_direction() -> None:
    module = nn.Linear(2, 1)
    module.weight.grad, module.bias.grad = torch.tensor([[3e38, -3e38]]), torch.tensor([1.5e38])
    clip(module, 3.0)
    assert module.weight.grad.tolist() == [pytest.approx([2.0, -2.0])]  # (2, -2, 1) has norm 3
    assert module.bias.grad.tolist() == pytest.approx([1.0])
    module.weight.grad, module.bias.grad = torch.tensor([[3e38, torch.inf]]), torch.tensor([1.0])
    clip(module, 3.0)
    assert not module.weight.grad.isfinite().all()  # so that it is found


def test_an_ordinary_gradient_is_clipped_to_the_bits_of_torch() -> None:
    for largest in (1e-3, 0.7, 1e3):
        ours, torchs = plain(), plain()
        for number, (p, q) in enumerate(zip(ours.parameters(), torchs.parameters(), strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            q.grad = p.grad.clone()
        clip(ours, largest)
        nn.utils.clip_grad_norm_(torchs.parameters(), largest)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), torchs.parameters(), strict=True))


def test_momentum_is_none_though_the_first_update_under_float16_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    # what fused SGD allocates for its momentum is then left as it was in memory: here a large number
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda of: empty_like(of).fill_(7e5))
    module = plain()
    network = Network(module, module, torch.float16, CPU)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, fused=True)
    learner = Learner(network, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**60), None)
    train_step(learner, batch(), StepOptions(0.0, None), WHOLE)
    assert distance(module, plain()) == 0
    learner.scaler.update(2.0**8)
    train_step(learner, batch(), StepOptions(0.0, None), WHOLE)
    usual, _ = stepped(plain(), StepOptions(0.0, None))
    assert 0 < distance(module, usual) < 1e-3  # the first step with momentum is one without


def test_float16_steps_by_scaled_losses_and_leaves_out_a_step_that_overflows() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    half, _ = stepped(plain(), StepOptions(0.0, None), dtype=torch.float16, scaler=scaler)
    full, _ = stepped(plain(), StepOptions(0.0, None))
    assert 0 < distance(half, full) < 1e-3
    too_large = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    left_out, _ = stepped(plain(), StepOptions(0.0, None), dtype=torch.float16, scaler=too_large)
    assert distance(left_out, plain()) == 0
    assert too_large.get_scale() == 2.0**59


def test_smoothing_spreads_its_share_evenly_over_the_classes() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    losses, _ = loss_of(logits, torch.tensor([0]), 0.3)
    log_p = torch.log_softmax(logits, 1)[0]
    by_hand = -(0.8 * log_p[0] + 0.1 * log_p[1] + 0.1 * log_p[2])  # 0.7 + 0.3 / 3 for the right one
    assert losses.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_mixed_labels_weigh_the_losses_of_their_classes() -> None:
    logits, mixed = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.25, 0.0, 0.75]])
    first, third = (loss_of(logits, torch.tensor([label]), 0.3)[0].item() for label in (0, 2))
    assert loss_of(logits, mixed, 0.3)[0].item() == pytest.approx(0.25 * first + 0.75 * third, rel=1e-6)
    whole = torch.tensor([[0.0, 0.0, 1.0]])
    assert loss_of(logits, whole, 0.3)[0].item() == pytest.approx(third, rel=1e-6)


def test_of_mixed_labels_the_heavier_counts_and_at_a_tie_both() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
    shares = torch.tensor([[0.75, 0.25, 0.0], [0.75, 0.25, 0.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]])
    sums = Sums.of(sums_of(torch.ones(4), logits, shares, top5=False).tolist())
    assert (sums.images, sums.hits) == (4, 2)  # the first and the third


def test_a_step_takes_mixed_labels_in_micro_batches() -> None:
    plain_batch = batch()
    shares = 0.75 * F.one_hot(plain_batch.labels, 5) + 0.25 * F.one_hot(plain_batch.labels.flip(0), 5)
    moved = []
    for share in (WHOLE, QUARTERS):
        module = plain()
        optimizer, scaler = torch.optim.SGD(module.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False)
        mixed = Batch(plain_batch.images, shares, plain_batch.indices, plain_batch.checksum)
        network = Network(module, module, torch.float32, CPU)
        learner = Learner(network, optimizer, scaler, None)
        sums = train_step(learner, mixed, StepOptions(0.1, None), share).sums
        moved.append((module, sums))
    (one, sums_of_one), (parts, sums_of_parts) = moved
    assert distance(one, plain()) > 0
    assert distance(one, parts) < 1e-6
    assert sums_of_one[:3].tolist() == sums_of_parts[:3].tolist()


def test_auxiliary_logits_count_a_third_or_so_and_only_the_first_are_counted_as_hits() -> None:
    main, extra, label = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([0])
    losses, logits = loss_of((main, extra), label, 0.0)
    assert losses.item() == pytest.approx(
        F.cross_entropy(main, label).item() + 0.3 * F.cross_entropy(extra, label).item()
    )
    assert torch.equal(logits, main)


def test_biases_and_norms_do_not_decay() -> None:
    module = small(10)
    choice = chosen_optimizer(Optimization(opt="sgd", lr=0.1, weight_decay=0.25))
    decayed = build_optimizer(choice, grouped(module, lr=0.1), module).param_groups
    of = {id(p): group["weight_decay"] for group in decayed for p in group["params"]}
    decays = {name: of[id(p)] for name, p in module.named_parameters()}
    assert decays == {
        "0.weight": 0.25,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "4.weight": 0.25,
        "4.bias": 0.0,
        "5.weight": 0.0,
        "5.bias": 0.0,
        "9.weight": 0.25,
        "9.bias": 0.0,
    }


def test_the_ema_is_its_formula() -> None:
    module = plain()
    ema = Average(module, 0.9)
    first, _ = stepped(module, StepOptions(0.0, None), ema=ema)
    after_first = [p.detach().clone() for p in first.parameters()]
    stepped(module, StepOptions(0.0, None), ema=ema)
    for average, one, two in zip(ema.module.parameters(), after_first, module.parameters(), strict=True):
        torch.testing.assert_close(average.detach(), 0.9 * one + 0.1 * two.detach())  # torch begins with the first


def test_the_ema_averages_statistics_and_copies_counts() -> None:
    module = nn.BatchNorm1d(1, momentum=0.5)
    ema = Average(module, 0.75)
    for value in (4.0, 12.0):  # running means 0.5 * 4 = 2, then 0.5 * 2 + 0.5 * 12 = 7
        module(torch.full((3, 1), value))
        ema.update()
    assert ema.module.running_mean.item() == 0.75 * 2 + 0.25 * 7
    assert ema.module.num_batches_tracked.item() == 2


def test_the_ema_follows_a_buffer_that_the_network_replaces() -> None:
    class Replaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(1))

    module = Replaces()
    ema = Average(module, 0.75)
    for value in (2.0, 6.0):
        module.mean = torch.tensor([value])
        ema.update()
    assert ema.module.mean.item() == 0.75 * 2 + 0.25 * 6


def test_an_update_of_the_ema_reads_nothing_from_a_device() -> None:
    from test_nonfinite import Reads

    module = small(5)
    ema = Average(module, 0.9)
    with Reads() as reads:
        ema.update()
        ema.update()
    assert reads.count == 0


def test_sums_of_a_batch_in_any_cut_are_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    losses, logits = torch.rand(97, generator=generator) * 9, torch.randn(97, 7, generator=generator)
    labels = torch.randint(7, (97,), generator=generator)
    whole = sums_of(losses, logits, labels, top5=True)
    for size in (1, 10, 32, 96):
        cuts = [slice(at, at + size) for at in range(0, 97, size)]
        parts = [sums_of(losses[c], logits[c], labels[c], top5=True) for c in reversed(cuts)]
        assert torch.equal(torch.stack(parts).sum(0), whole)
    assert whole[1].item() == int((logits.argmax(1) == labels).sum())
    in_five = [
        int(label) in row.argsort(descending=True)[:5].tolist() for row, label in zip(logits, labels, strict=True)
    ]
    assert whole[2].item() == sum(in_five)
    assert Sums.of(whole.tolist()).loss == pytest.approx(losses.mean().item(), abs=LOSS_UNIT)


def test_a_loss_that_is_not_finite_is_counted_and_added_to_nothing() -> None:
    losses = torch.tensor([1.0, math.nan, math.inf])
    sums = Sums.of(sums_of(losses, torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), top5=False).tolist())
    assert (sums.images, sums.nonfinite, sums.loss) == (3, 2, 1.0)


def test_a_loss_too_large_for_the_sums_counts_as_one_that_is_not_finite() -> None:
    losses = torch.tensor([1.0, 2.0**20, 2.0**20 + 1, 8.8e12, 3e38])
    sums = Sums.of(sums_of(losses, torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64), top5=False).tolist())
    assert (sums.images, sums.nonfinite, sums.loss) == (5, 3, (1 + 2**20) / 2)
    million = torch.full((2**20,), 2.0**20)
    whole = sums_of(million, torch.zeros(2**20, 1), torch.zeros(2**20, dtype=torch.int64), top5=False)
    assert Sums.of((7 * whole).tolist()).loss == 2.0**20  # 7 x 2^20 images with the largest loss that counts


def test_a_step_adds_the_checksum_of_its_batch_once() -> None:
    _, sums = stepped(plain(), StepOptions(0.0, None), QUARTERS)
    assert Sums.of(sums.tolist()).checksum == 77
    assert no_sums(CPU).shape == sums.shape


def test_an_evaluation_counts_in_evaluation_mode_and_changes_nothing() -> None:
    module = small(5).eval()
    before = copy.deepcopy(module.state_dict())
    sums, right = eval_step(Network(module, module, torch.float32, CPU), module, batch())
    by_hand = module(batch().images).argmax(1) == batch().labels
    assert torch.equal(right, by_hand)
    assert sums[1].item() == int(by_hand.sum())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_what_a_network_draws_depends_on_seed_step_and_rank_alone() -> None:
    def drawn(seed: int, step: int, rank: int) -> list[float]:
        seed_step(seed, step, rank, CPU)
        return torch.rand(3).tolist()

    assert drawn(0, 5, 1) == drawn(0, 5, 1)
    others = [drawn(0, 5, 1), drawn(1, 5, 1), drawn(0, 6, 1), drawn(0, 5, 2)]
    assert len({tuple(values) for values in others}) == 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_a_network_draws_is_what_it_draws_after_torchs_own_seeding(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    at = torch.device(device)
    torch.manual_seed(torch_seed(3, Stream.DROPOUT, 5, 1))
    wanted = [torch.rand(7, device=at), F.dropout(torch.ones(50, device=at), 0.5), torch.rand(3)]
    seed_step(3, 5, 1, at)
    drawn = [torch.rand(7, device=at), F.dropout(torch.ones(50, device=at), 0.5), torch.rand(3)]
    assert all(torch.equal(one, other) for one, other in zip(wanted, drawn, strict=True))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_restored_state_lies_in_memory_as_its_parameter_does(kind: Any) -> None:
    def trained(module: nn.Module) -> torch.optim.Optimizer:
        arguments = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return kind(module.parameters(), lr=0.1, **arguments)  # type: ignore[no-any-return]

    module = small(5).to(memory_format=torch.channels_last)
    optimizer = trained(module)
    F.cross_entropy(module(batch().images), batch().labels).backward()
    optimizer.step()
    packed = pack(optimizer, module)
    flat = type(packed)({name: value.contiguous() for name, value in packed.tensors.items()}, packed.scalars)
    other = trained(module)
    unpack(other, module, flat)
    states = [(p, value) for p, state in other.state.items() for value in state.values() if isinstance(value, Tensor)]
    shaped = [(p, value) for p, value in states if value.shape == p.shape]
    assert len(shaped) >= len(list(module.parameters()))
    assert all(value.stride() == p.stride() for p, value in shaped)
    again = pack(other, module)
    assert all(torch.equal(again.tensors[name], value) for name, value in packed.tensors.items())


def test_state_comes_back_in_its_own_type() -> None:
    module = nn.Linear(3, 2)
    types = (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64, torch.float32)
    optimizer, again = (torch.optim.SGD(module.parameters(), lr=0.1) for _ in range(2))
    state = optimizer.state[module.weight]
    for dtype in types:
        state[f"shaped {dtype}"] = torch.ones(2, 3, dtype=dtype)
        state[f"alone {dtype}"] = torch.ones((), dtype=dtype)
    unpack(again, module, pack(optimizer, module))
    found = {key: value.dtype for key, value in again.state[module.weight].items()}
    assert found == {key: value.dtype for key, value in state.items()}
    assert all(again.state[module.weight][key] is not value for key, value in state.items())
    assert module.bias not in again.state


def test_how_the_machine_computes_is_not_restored() -> None:
    module = nn.Linear(3, 2)
    fused, plain_one = (torch.optim.Adam(module.parameters(), lr=0.1, fused=fused) for fused in (True, False))
    module(torch.ones(1, 3)).sum().backward()
    fused.step()
    unpack(plain_one, module, pack(fused, module))
    assert plain_one.param_groups[0]["fused"] is False
    assert plain_one.param_groups[0]["betas"] == (0.9, 0.999)
    assert plain_one.param_groups[0]["params"] == list(module.parameters())


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "size"), [(2, 64), (3, 64), (3, 7), pytest.param(5, 64, marks=pytest.mark.slow)], ids=str
)
def test_gradients_of_any_shares_are_those_of_the_mean_over_the_whole_batch_within_1e_6(
    ranks: Warm, world: int, size: int
) -> None:
    module = plain()
    F.cross_entropy(module(batch(size).images), batch(size).labels, label_smoothing=0.1).backward()
    wanted = gradient(module)
    assert wanted.abs().max() > 0.01
    for accumulation in (1, 2):
        kwargs = {"size": size, "accumulation": accumulation}
        (one,) = ranks.call("test_step:shares", 1, kwargs)
        many = ranks.call("test_step:shares", world, kwargs)
        assert [one["reduces"], *(each["reduces"] for each in many)] == [0] + [1] * world  # sent once, at the end
        for each in (one, *many):
            torch.testing.assert_close(torch.tensor(each["gradient"]), wanted, atol=1e-6, rtol=0)
        assert all(each["gradient"] == many[0]["gradient"] for each in many)
        assert [sum(values) for values in zip(*(each["sums"][:3] for each in many), strict=True)] == one["sums"][:3]
        assert one["sums"][0] == size


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def shares(size: int, accumulation: int) -> dict[str, Any]:
    """The gradient from this process's share of a batch, in micro-batches, through DDP where there are others."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from dtrain.model.network import wrap
    from dtrain.model.step import backward
    from dtrain.world import World, place

    torch.set_num_threads(1)
    at = place()
    world = World(at, 30)
    if at.size > 1:
        world.meet()
        world.join("gloo")
    network = wrap(plain(), device=CPU, dtype=torch.float32, world_size=at.size)
    reduces = 0
    if at.size > 1:

        def counting(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations in quotes
            nonlocal reduces
            reduces += 1
            return allreduce_hook(state, bucket)

        network.trained.register_comm_hook(None, counting)  # type: ignore[operator]
    whole = batch(size)
    share = shares_of(size, world_size=at.size, grad_accum_steps=accumulation, unit=1)[at.rank]
    mine = Batch(*(part[share.positions] for part in (whole.images, whole.labels, whole.indices)), whole.checksum)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    sums, _ = backward(network, scaler, mine, StepOptions(0.1, None), share)
    found = gradient(network.module).tolist()
    world.leave()
    return {"gradient": found, "sums": sums.tolist(), "reduces": reduces}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("skip", [False, True])
def test_a_step_on_cuda_does_not_wait_for_the_device(skip: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    module = plain().cuda().to(memory_format=torch.channels_last)
    network = Network(module, module, torch.bfloat16, torch.device("cuda"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    cpu = batch()
    there = Batch(cpu.images.cuda(), cpu.labels.cuda(), cpu.indices, cpu.checksum.cuda())
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    tally, options = Tally(torch.device("cuda"), 24), StepOptions(0.1, 5.0, skip_nonfinite=skip)
    learner = Learner(network, optimizer, scaler, Average(module, 0.9))
    tally += train_step(learner, there, options, WHOLE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tally += train_step(learner, there, options, WHOLE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_checkout_is_what_is_tested() -> None:
    import dtrain

    assert Path(dtrain.__file__).parents[1] == Path(__file__).parents[1]


def test_the_mean_of_no_finite_loss_is_no_number() -> None:
    losses = torch.tensor([math.nan, math.inf])
    sums = Sums.of(sums_of(losses, torch.zeros(2, 3), torch.tensor([0, 1]), top5=False).tolist())
    assert math.isnan(sums.loss)
    assert sums.nonfinite == 2
