"""The planner: exact bytes of small networks, the allocator's rules, links' formulas, the search, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from vitrail.tools._common.fake_gpu import Backward, LiveStorages, accumulate, pretended_gpu, row_sum_workspace
from vitrail.tools._common.gpu_allocator import CachingAllocator
from vitrail.tools._common.plan_links import (
    Cluster,
    all_gather,
    all_reduce,
    reduce_scatter,
    replicas_traffic,
    shards_traffic,
)
from vitrail.tools._common.plan_memory import Setting, Unit, build_model, find_units, gathered_bytes, measure_step
from vitrail.tools._common.plan_settings import find_largest_batch, recommend
from vitrail.tools.plan import main

MIB = 2**20
CPU = torch.device("cpu")


def test_small_allocations_share_segments_and_round_up() -> None:
    memory = CachingAllocator()
    first, second = memory.allocate(1), memory.allocate(513)
    assert (memory.allocated, memory.reserved) == (512 + 1024, 2 * MIB)
    memory.release(first)
    memory.release(second)
    assert (memory.allocated, memory.reserved, memory.peak_allocated) == (0, 2 * MIB, 1536)
    memory.allocate(MIB)  # what was freed is whole again
    memory.allocate(MIB)
    assert memory.reserved == 2 * MIB
    assert memory.allocate(0) is None


def test_large_allocations_split_only_what_is_worth_it() -> None:
    memory = CachingAllocator()
    memory.allocate(3 * MIB)
    assert (memory.allocated, memory.reserved) == (3 * MIB, 20 * MIB)
    memory.allocate(9 * MIB)  # from the rest of the same segment
    assert (memory.allocated, memory.reserved) == (12 * MIB, 20 * MIB)
    memory.allocate(7 * MIB + MIB // 2)  # the rest of half a MiB stays with it
    assert (memory.allocated, memory.reserved) == (20 * MIB, 20 * MIB)
    memory.allocate(11 * MIB)  # a segment of its own, of which 1 MiB is no rest either
    assert (memory.allocated, memory.reserved) == (32 * MIB, 32 * MIB)


def test_the_smallest_block_that_is_large_enough_serves() -> None:
    memory = CachingAllocator()
    blocks = [memory.allocate(size * MIB) for size in (30, 14, 22)]
    for block in blocks:
        memory.release(block)
    taken = memory.allocate(13 * MIB)
    assert taken.size == 14 * MIB
    assert memory.allocate(16 * MIB).size == 16 * MIB
    assert memory.reserved == 66 * MIB
    memory.allocate(23 * MIB)
    assert memory.reserved == 66 * MIB


def test_storages_count_once_from_first_to_last_tensor() -> None:
    with FakeTensorMode(), LiveStorages("cpu") as live:
        live.label = "first"
        a = torch.empty(1000)  # 4000 bytes: 8 blocks of 512
        view = a.view(10, 100)[2:]
        assert dict(live.live) == {"first": 4096}
        live.label = "second"
        b = view.sum(0)  # 400 bytes
        assert dict(live.live) == {"first": 4096, "second": 512}
        del a
        assert live.live["first"] == 4096  # its view still lives
        live.relabel(view, "renamed")
        del view
        assert dict(live.live) == {"first": 0, "second": 512, "renamed": 0}
        assert live.peak == {"first": 4096, "second": 512}
        assert live.peak_at == "aten.sum.dim_IntList"
        give_back = live.reserve(5000, "held", "by hand")
        assert live.live["held"] == 5120
        assert live.peak_at == "by hand"
        give_back()
        live.reset_peak()
        assert live.peak == {"second": 512}
        live.exclude(b)
        assert live.allocator.allocated == 0
        torch.empty(3, device="meta")  # another device's
        assert live.allocator.allocated == 0


class Branches(nn.Module):
    """Residuals, a shared weight, a weight without use in one branch, a checkpoint, an operator of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        from vitrail.kernels.strip_gate import strip_gate  # noqa: F401 -- registered

        x = self.first(x)
        y = x + F.gelu(self.second(x))
        y = y + checkpoint(self._block, y, use_reentrant=False)
        y = y.transpose(0, 1) * y.transpose(0, 1).sigmoid()
        return torch.cat([y, self.first(y)], dim=-1)

    def _block(self, x: Tensor) -> Tensor:
        return self.second(self.norm(x)) * x


def test_the_backward_pass_gives_autograds_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Branches().double(), torch.randn(4, 6, 8, dtype=torch.float64)
    model(x).square().mean().backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 0)
    losses = [model(x).square().mean()]
    Backward(accumulate, {}).run(losses)
    assert losses == []
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        assert parameter.grad.stride() == parameter.stride()


def test_a_loss_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="depends on no parameter"):
        Backward(accumulate, {}).run([torch.ones(())])


def _network() -> nn.Module:
    """Every tensor's size is a multiple of 512 bytes for batches of 64 images of 16 x 16."""
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 512), nn.GELU(), nn.Linear(512, 128))


PARAMETERS = 4 * (768 * 512 + 512 + 512 * 128 + 128)
BATCH = 64 * 768 * 4 + 64 * 8
STEPS = 4 * 512  # AdamW's count for each parameter, which is always on the CPU


def test_a_step_in_float32_by_hand() -> None:
    found = measure_step(_network(), Setting(64, (16, 16), None), CPU)
    hidden, logits = 64 * 512 * 4, 64 * 128 * 4
    assert found.before == 3 * PARAMETERS + STEPS + BATCH
    # GELU's input and output, the log-probabilities, the loss and the sum of its weights.
    assert found.after_forward == found.before + 2 * hidden + logits + 512 + 512
    assert found.after_backward == found.before + PARAMETERS
    # AdamW's roots of the second moments, while the gradients are there.
    assert found.peak == found.before + 2 * PARAMETERS
    assert found.parts == {
        "parameters": PARAMETERS, "optimizer state": 2 * PARAMETERS + STEPS, "batch": BATCH,
        "gradients": PARAMETERS, "passing": PARAMETERS,
    }  # fmt: skip
    assert found.flops == 2 * 64 * (2 * 768 * 512 + 3 * 512 * 128)  # no gradient of the images


def test_a_step_in_bfloat16_on_a_gpu_by_hand() -> None:
    found = measure_step(_network(), Setting(64, (16, 16), "bf16"))
    assert found.before == 3 * PARAMETERS + BATCH + 2 * 32 * MIB
    # Input, GELU's input and output, the second weight: in bfloat16. The rest as above.
    kept = 64 * 768 * 2 + 2 * 64 * 512 * 2 + 512 * 128 * 2 + 64 * 128 * 4 + 512 + 512
    assert found.after_forward == found.before + kept
    assert found.after_backward == found.before + PARAMETERS


def test_replicas_hold_two_sets_of_gradients_all_the_time() -> None:
    one = measure_step(_network(), Setting(64, (16, 16)))
    many = measure_step(_network(), Setting(64, (16, 16), mode="replicas", gpus=4))
    assert many.before == one.before + 2 * PARAMETERS
    assert many.after_backward == one.after_backward + PARAMETERS


def test_shards_hold_their_part_and_the_rest_gathered() -> None:
    found = measure_step(_network(), Setting(64, (16, 16), None, "shards", gpus=4), CPU)
    # There are no blocks here: all weights stay gathered between the passes.
    part = PARAMETERS // 4 + 384  # the smallest bias leaves most of a block empty
    assert found.before == PARAMETERS + 3 * part + STEPS + BATCH
    assert found.after_backward == found.before + part


def test_units_are_those_of_training() -> None:
    model = build_model("biformer_n", (64, 64))
    units = find_units(model, "bf16")
    names = [name for unit in units for name in unit.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(unit.dtype == torch.float32 for unit in units if not unit.reshard and len(unit.names) == 2)  # norms
    blocks = [unit for unit in units if unit.reshard]
    assert {unit.dtype for unit in blocks} == {torch.bfloat16}
    assert all(name.startswith("stages.") for unit in blocks for name in unit.names)
    assert units[-1].dtype == torch.bfloat16
    assert not units[-1].reshard


def test_checkpointing_keeps_less_and_computes_more() -> None:
    plain, again = (
        measure_step(build_model("test_vit", (160, 160), checkpointing), Setting(64, (160, 160)))
        for checkpointing in (False, True)
    )
    assert again.after_forward - again.before < (plain.after_forward - plain.before) / 4
    assert again.peak < plain.peak
    assert plain.flops < again.flops < 1.4 * plain.flops


def test_workspaces_of_triton_kernels_count() -> None:
    pytest.importorskip("triton")
    with pretended_gpu(132), FakeTensorMode(), LiveStorages("cuda") as live:
        live.label = "inputs"
        qkv = torch.empty(2, 14, 14, 3, 2, 32, dtype=torch.bfloat16, device="cuda")
        bias = torch.empty(2, 49, 49, dtype=torch.bfloat16, device="cuda")
        grad = torch.empty(2, 14, 14, 2, 32, dtype=torch.bfloat16, device="cuda")
        live.label = "results"
        results = torch.ops.vitrail.window_attention_packed_backward(
            grad, qkv, bias, None, None, (7, 7), (0, 0), 1.0, False
        )
        assert [result.shape for result in results[:2]] == [qkv.shape, bias.shape]
        taken = live.live["results"]
        assert taken == -(-qkv.nbytes // 512) * 512 + -(-bias.nbytes // 512) * 512
        assert live.peak["results"] > taken + 4 * bias.numel()  # partial sums of the bias, in float32


def test_attention_is_the_gpus_fused_one() -> None:
    with pretended_gpu(132), FakeTensorMode(), LiveStorages("cuda") as live:
        q = torch.empty(2, 4, 1000, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        live.label = "attention"
        out = F.scaled_dot_product_attention(q, q, q)
        assert out.shape == q.shape
        assert live.live["attention"] <= q.nbytes + 4 * 2 * 4 * 1024 + 4096  # no weights, which would be 16 MB
        losses = [out.sum()]
        del out
        Backward(accumulate, {}).run(losses)
        assert q.grad.shape == q.shape
        assert live.peak_at == "aten._scaled_dot_product_cudnn_attention_backward.default"
        single = q.detach().float().requires_grad_()
        mask = torch.empty(1000, 1000, device="cuda")
        masked = F.scaled_dot_product_attention(single, single, single, attn_mask=mask)
        assert "Efficient" in type(masked.grad_fn).__name__


@pytest.mark.parametrize(
    ("rows", "columns", "nbytes"),
    [
        (50176, 384, 138_412_032),  # as seen on an H100, where a bias's gradient is summed
        (12544, 1536, 138_412_032),
        (3136, 3072, 77_070_336),
        (200, 64, 0),
    ],
)
def test_sums_over_rows_take_partial_sums(rows: int, columns: int, nbytes: int) -> None:
    assert row_sum_workspace(rows, columns, 132) == nbytes


ONE_HOST = Cluster(gpus=8, per_host=8, inside=100e9, between=10e9)
EIGHT_HOSTS = Cluster(gpus=64, per_host=8, inside=100e9, between=10e9)


def test_bytes_of_collectives() -> None:
    assert all_reduce(800, ONE_HOST).inside == pytest.approx(2 * 7 / 8 * 800)
    assert all_reduce(800, ONE_HOST).between == 0
    both = all_reduce(800, EIGHT_HOSTS)
    assert both.inside == pytest.approx(2 * 7 / 8 * 800)
    assert both.between == pytest.approx(2 * 7 / 8 * 100)  # an eighth of the gradients a GPU
    assert both.collectives == 1
    for one_way in (all_gather, reduce_scatter):
        assert one_way(800, EIGHT_HOSTS).inside == pytest.approx(700)
        assert one_way(800, EIGHT_HOSTS).between == pytest.approx(87.5)
    assert all_gather(800, Cluster(1, 1, 1.0, 1.0)).inside == 0
    assert both.seconds(EIGHT_HOSTS) == pytest.approx(max(1400 / 100e9, 175 / 10e9))
    # Whatever the hosts: what arrives in all is what a ring would bring.
    assert all_gather(640, EIGHT_HOSTS).inside + all_gather(640, EIGHT_HOSTS).between == pytest.approx(640 * 63 / 64)


def test_traffic_of_a_step() -> None:
    replicas = replicas_traffic(100 * MIB, 25 * MIB, ONE_HOST)
    assert replicas.collectives == 1 + 4  # 1 MiB, then 99 MiB in pieces of 25
    assert replicas.inside == pytest.approx(2 * 7 / 8 * 100 * MIB)
    units = [Unit(("a",), 800, torch.bfloat16, True), Unit(("b",), 80, torch.float32, False)]
    shards = shards_traffic(units, 4, ONE_HOST)
    assert shards.inside == pytest.approx(7 / 8 * (2 * 1600 + 3200 + 320 + 320))
    assert shards.collectives == 3 + 2
    assert gathered_bytes(units) == 2 * 1600 + 4 * 800
    assert gathered_bytes([]) == 0


@pytest.mark.parametrize(
    ("start", "bytes_of", "wanted"),
    [
        (8, lambda n: 100 + 10 * n, 990),
        (5000, lambda n: 100 + 10 * n, 990),
        (8, lambda n: 1000 * n, 10),
        (8, lambda n: 20_000 + n, 0),
        (1, lambda n: 9_999 + n, 1),
        (64, lambda n: 100 + n * n, 99),
    ],
)
def test_the_largest_batch_is_found_in_few_steps(start: int, bytes_of: Callable[[int], int], wanted: int) -> None:
    calls = []

    def measure(n: int) -> int:
        calls.append(n)
        return bytes_of(n)

    found = find_largest_batch({start: bytes_of(start)}, measure, 10_000)
    assert found <= wanted
    assert found >= wanted * 0.97 - 1e-9
    assert len(calls) <= 8


def _row(setting: str, fits: bool, largest: int) -> dict:
    return {"setting": setting, "fits": fits, "largest_batch": largest, "batch_per_gpu": 96, "gpus": 8,
            "communication_ms": 1.0, "arithmetic_ms": 2.0}  # fmt: skip


def test_recommendations() -> None:
    rows = [_row("replicas", False, 40), _row("shards", True, 100), _row("replicas, checkpointing", True, 200)]
    assert recommend(rows).startswith("train with shards, 96 images a GPU")
    rows = [_row("replicas", False, 40), _row("shards", False, 50)]
    assert "train with shards and accumulate the gradients of 2 times 48" in recommend(rows)
    assert "can hide behind" in recommend(rows)
    assert "not even one image" in recommend([_row("replicas", False, 0)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def search(known: dict[int, int], measure: Callable[[int], int], memory: float) -> int:
        assert list(known) == [4]
        assert memory == 0.5e9
        assert measure(5) >= known[4]
        return 5

    monkeypatch.setattr("vitrail.tools._common.plan_settings.find_largest_batch", search)
    file = tmp_path / "plan.json"
    arguments = ["test_vit", "--gpus", "16", "--batch", "64", "--img-size", "32", "--amp", "bf16", "--checkpointing",
                 "--memory-gb", "1", "--other-gb", "0.5", "--images-per-s", "1000", "--json", str(file)]  # fmt: skip
    assert main(arguments) == 0
    rows = json.loads(file.read_text())
    assert [row["setting"] for row in rows] == ["replicas, checkpointing", "shards, checkpointing"]
    for row in rows:
        assert row["fits"]
        assert (row["batch_per_gpu"], row["largest_batch"]) == (4, 5)
        assert sum(row["parts"].values()) == row["peak_bytes"] <= row["reserved_bytes"]
        assert row["efficiency"][0] <= row["efficiency"][1] <= 1
    text = capsys.readouterr().out
    assert "computed, not measured" in text
    assert "test_vit: train with replicas, checkpointing, 4 images a GPU" in text
    assert main([*arguments, "--no-search"]) == 0
    rows = json.loads(file.read_text())
    assert [row["largest_batch"] for row in rows] == [None, None]
    assert all(row["torch"] == torch.__version__ for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_vitt", "--batch", "8"], "test_vit"),
        (["test_vit", "--batch", "0"], "--batch is 0; allowed: at least 1"),
        (["test_vit", "--batch", "9", "--gpus", "2"], "--batch is 9; allowed: multiples of --gpus 2"),
        (["test_vit", "--batch", "12", "--gpus", "12"], "--gpus is 12; allowed: multiples of --gpus-per-node 8"),
        (["test_vit", "--batch", "8", "--sharded"], "--sharded needs --gpus of at least 2"),
        (["test_vit", "--batch", "8", "--memory-gb", "-1"], "--memory-gb is -1.0; allowed: more than 0"),
        (["test_vit", "--batch", "8", "--other-gb", "90"], "--other-gb is 90.0; allowed: 0 to less than"),
        (["test_vit", "--batch", "8", "--link-gbps", "0", "1"], "--link-gbps is [0.0, 1.0]; allowed"),
        (["test_vit", "--batch", "8", "--img-size", "8", "8", "8"], "--img-size is [8, 8, 8]; allowed"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
