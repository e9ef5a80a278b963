"""The base sharded over gloo ranks: what each rank loads and holds, its gradients, what FSDP leaves behind.

Whole runs are compared in test_ranks.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor

import train
from kernels.proof.closeness import relative_error
from psysafe import load_model
from psysafe.checkpoint import base as checkpoint
from psysafe.data.documents import PADDING_MICRO_BATCH, Dataset, Document, pack, pack_share
from psysafe.model import shard
from psysafe.model.lora import attach
from psysafe.model.recompute import STAGES, recompute
from psysafe.runtime import Runtime, memory_peak, start
from psysafe.training.config import TrainConfig
from psysafe.training.watchdog import Watchdog
from tests.stub_server import reserved_port

CONFIG = dict(
    model_type="qwen3_5_text", vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4,
    layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4, tie_word_embeddings=False,
    rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
)  # fmt: skip


def spawn(ranks: int, worker, *args) -> None:
    """worker(*args) on so many ranks of gloo, in processes of their own."""
    with reserved_port() as port:
        torch.multiprocessing.spawn(_rank, (ranks, port, worker, args), nprocs=ranks)


def _rank(rank, ranks, port, worker, args) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ |= {key: str(value) for key, value in place.items()}
    torch.set_num_threads(1)
    worker(*args)
    if ranks > 1:
        torch.distributed.barrier()  # a rank that ends early takes its connections from under the others
        torch.distributed.destroy_process_group()


def write_checkpoint(folder, **changes):
    """A checkpoint of random weights in fp32, two files."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    model = load_model(f"random:{folder}/config.json")
    tensors = {f"model.{name}": x.contiguous() for name, x in checkpoint.published_tensors(model).items()}
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def documents(lengths) -> list[Document]:
    random = np.random.default_rng(0)
    return [
        Document(random.integers(0, 97, n).astype(np.int32), np.arange(n) >= n // 3, f"row {i}")
        for i, n in enumerate(lengths)
    ]


def test_every_rank_gets_as_many_micro_batches():
    """Nothing is lost or doubled, spare ones weigh nothing, and one rank packs as before."""
    rows = documents((30, 31, 50, 5, 7, 64, 3))
    for ranks in (1, 2, 3, 5, 9):
        shares = [pack_share(rows, 64, rank, ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        real = [batch for share in shares for batch in share if batch.weight]
        assert sum(len(batch.labels) for batch in real) == sum(row.n_targets for row in rows)
        assert all(batch is PADDING_MICRO_BATCH for share in shares for batch in share if not batch.weight)
    alone = zip(pack_share(rows, 64), pack(rows, 64), strict=True)
    assert all(torch.equal(a.tokens, b.tokens) and a.weight == 1 for a, b in alone)
    assert [len(pack_share(rows[:1], 64, rank, 2)) for rank in (0, 1)] == [1, 1]


def test_one_rank_cannot_shard(tmp_path):
    write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="--shard spreads the base over ranks and there is one"):
        load_model(tmp_path, shard=True)


def test_only_sharding_pays_for_fsdp():
    """Loading a model on one rank imports neither FSDP nor DTensor, which take most of a second."""
    slow = "torch.distributed.fsdp", "torch.distributed.tensor"
    code = f"import sys, psysafe; psysafe.load_model('assets:tiny'); sys.exit(any(m in sys.modules for m in {slow}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def load_and_compare(folder, wrong: bool) -> None:
    """What a rank holds after a sharded load is its rows of what one rank loads."""
    start("cpu")
    if wrong:  # every rank reads the first rows
        checkpoint.local_part = lambda *args: (shard.local_part(*args)[0], 0)
    for source in (folder, f"random:{folder}/config.json"):
        whole = checkpoint.published_tensors(load_model(source))
        sharded = load_model(source, shard=True)
        checkpoint.local_part = shard.local_part
        for name, (view, first, shape) in checkpoint.destinations(sharded).items():
            assert shape == whole[name].shape, name
            assert torch.equal(view, whole[name][first : first + len(view)]), name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_loads_its_own_rows(ranks, tmp_path):
    """Also where fused projections meet within a shard, and where a rank gets no row (a decay of 4 heads, 3 ranks)."""
    spawn(ranks, load_and_compare, write_checkpoint(tmp_path), False)


@pytest.mark.slow
def test_rows_of_another_rank_are_caught(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="AssertionError"):
        spawn(2, load_and_compare, write_checkpoint(tmp_path), True)


WIDE = dict(vocab_size=97, hidden_size=512, intermediate_size=8192, num_hidden_layers=4, linear_num_value_heads=16)


def load_and_measure(folder, share: float) -> None:
    """Peak of a rank's resident memory over its share of the weights and one tensor."""
    start("cpu")
    torch.zeros(64, 64) @ torch.zeros(64, 64)
    load_model(folder.parent / "small", shard=True)  # what FSDP itself imports
    before = memory_peak(torch.device("cpu"))
    parts = checkpoint.destinations(load_model(folder, shard=True)).values()
    held = sum(part.view.nbytes for part in parts)
    largest = max(4 * np.prod(part.shape) for part in parts)
    total = sum(4 * np.prod(part.shape) for part in parts)
    grown = memory_peak(torch.device("cpu")) - before
    print(", ".join(f"{x / 1e6:.1f} MB" for x in (grown, held, total, largest)))
    assert held <= 0.52 * total
    assert grown <= 1.05 * (share * held) + largest


@pytest.mark.slow
def test_loading_holds_a_shard_and_one_tensor(tmp_path):
    for name, changes in (("small", {}), ("wide", WIDE)):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, **changes)
    spawn(2, load_and_measure, tmp_path / "wide", 1.0)
    # The same assertion with half a shard allowed: it does see the memory.
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="AssertionError"):
        spawn(2, load_and_measure, tmp_path / "wide", 0.5)


def first_steps(folder, out, sharded: bool, wrong: str = "") -> None:
    """A step over four documents in fp32 and in fp64; writes loss and gradients; looks at what FSDP saw and left."""
    if wrong == "hooks pile up":
        shard._no_parameter_out = lambda block, args, output: output
    if wrong == "inputs are moved":
        shard._leave_inputs_alone = lambda model: None
    for dtype in (torch.float32, torch.float64):
        tensors = first_step(folder, replace(start("cpu"), dtype=dtype), sharded)
        if start("cpu").is_main:
            save_file(tensors, f"{out}-{dtype}")


def first_step(folder, runtime: Runtime, sharded: bool) -> dict[str, torch.Tensor]:
    model = load_model(f"random:{folder}/config.json", dtype=runtime.dtype, shard=sharded)
    adapters = attach(model, 1, 3)
    adapters.param.copy_(0.05 * torch.randn(len(adapters.param), generator=torch.Generator().manual_seed(1)))
    gathered, inputs, begin = [], [], FSDPState._root_pre_forward

    def watched(state, module, args, kwargs):
        inputs.append((args, kwargs) if module is model else ((), {}))
        return begin(state, module, args, kwargs)

    FSDPState._root_pre_forward = watched  # where inputs go to the GPU, if there is one
    for i, block in enumerate(model.layers):
        recompute(block, STAGES if i % 2 and sharded else ())
        block.mlp.register_forward_pre_hook(lambda mlp, args: gathered.append(mlp.in_proj.weight))
    config = TrainConfig(batch_size=4, micro_batch_tokens=70, optimizer="adamw", warmup_steps=0)
    data = Dataset(documents((60, 33, 41, 1 + 3)), 60, 0, 0)
    optimizer = train.make_optimizer(adapters, config)
    run = train.Run(config, runtime, model, adapters, optimizer, data, None, 2, Watchdog(runtime, 600))
    loss = train.train_step(run).read()["loss"]
    if sharded:
        assert gathered and inputs
        assert not any(args or kwargs for args, kwargs in inputs), "inputs are moved"
        assert not any(isinstance(x, DTensor) or x.untyped_storage().size() for x in gathered), "still in memory"
        frozen = [p for block in model.layers for p in block.parameters() if not p.requires_grad]
        assert all(isinstance(p, DTensor) for p in frozen)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert not any(isinstance(p, DTensor) or p._backward_hooks for p in trained), "hooks pile up"
    grads = {name: g.clone() for name, g in adapters.tensors(adapters.grad).items()}
    return {"loss": torch.tensor(loss, dtype=torch.float64), **grads}


@pytest.mark.slow
def test_gradients_of_the_first_step(tmp_path):
    """Loss and every gradient by name: one rank, two, three (two of them with a spare micro-batch); sharded and not,
    with recomputation in every other sharded block."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    first_steps(tmp_path, tmp_path / "1", False)
    for ranks, sharded in ((2, False), (2, True), (3, True)):
        spawn(ranks, first_steps, tmp_path, tmp_path / f"{ranks}{sharded}", sharded)
        for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            alone, several = (load_file(f"{tmp_path / name}-{dtype}") for name in ("1", f"{ranks}{sharded}"))
            errors = {name: relative_error(x, alone[name]) for name, x in several.items()}
            print(ranks, sharded, dtype, max(errors.values()))
            assert all(error <= limit for error in errors.values()), errors  # max() can lose a NaN
            assert all(x.abs().max() > 0 for x in alone.values())


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["hooks pile up", "inputs are moved"])
def test_what_fsdp_does_unasked_is_caught(wrong, tmp_path):
    """Without the copy of B that a sharded block returns, every step leaves a hook on it for ever; inputs that FSDP
    moves to the GPU have to come back for an embedding in host memory."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=wrong):
        spawn(2, first_steps, tmp_path, tmp_path / "out", True, wrong)
