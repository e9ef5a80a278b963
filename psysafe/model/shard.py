"""The frozen base spread over all ranks (torch's FSDP2), for GPUs smaller than the base: `train.py --shard`.

    model = load_model(source, shard=True)      # calls shard_blocks, then reads only this rank's rows
    adapters = attach(model, ...)               # afterwards, so that FSDP never sees them: whole on every rank

A rank keeps a slice of every block's weights by rows. Each pass through a block, forward and backward, gathers them
first and frees them afterwards. Gathering is collective: all ranks must run the same number of micro-batches
(`data.pack_share`). The gathered bytes are the weights' own, so a sharded run gives the bits of an unsharded one.

Embedding, final norm and head stay whole on every rank, because they are read outside the blocks: the head at the
moment when most memory is in use. `--embedding cpu` moves the embedding to host memory.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import Pending
from psysafe.model.decoder import Block, Qwen3_5
from psysafe.program import UserError

# Blocks in full at once: the one that computes and the next one on its way, each with the buffer it was gathered in.
GATHERED = 4


def shard_blocks(model: Qwen3_5, device: torch.device) -> None:
    """Spread the blocks of a model without memory (meta) over all ranks, then give it memory on the device.

    Weights are uninitialised: `local_part` says what to fill. The optimiser must not know a sharded weight.
    """
    # Here, because importing them costs every other program most of a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    assert model.norm.is_meta, "a model with memory would first hold all of it"
    ranks = rank_count()
    check_ranks(ranks)
    mesh = init_device_mesh(device.type, (ranks,))
    for block in model.layers:
        block.register_forward_hook(_no_parameter_out)
        fully_shard(block, mesh=mesh)
    # The model itself shares no weights, but as the blocks' common root it lets one gather while another computes.
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters(recurse=False)))
    _leave_inputs_alone(model)
    model.to_empty(device=device)


def rank_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_ranks(ranks: int) -> None:
    if ranks == 1:
        raise UserError("--shard spreads the base over ranks and there is one; leave it out, or start more (torchrun)")


def _no_parameter_out(block: Block, args: tuple, output: tuple[Tensor, Pending]) -> tuple[Tensor, Pending]:
    """Returns a copy of the adapter's B (a few KB) in place of the parameter.

    FSDP puts a hook on every tensor that a block returns. B is part of `Pending` and lives as long as the run, so its
    hooks would pile up step by step; those on the copy go with the step.
    """
    h, pending = output
    if pending.lora is not None:
        pending = pending._replace(lora=pending.lora._replace(B=pending.lora.B.clone()))
    return h, pending


def _leave_inputs_alone(model: Qwen3_5) -> None:
    """Keeps the inputs from FSDP's own hook on the model, which would move them to the GPU.

    Tokens for an embedding in host memory would have to come back, and that waits for the GPU in every micro-batch. One
    hook before FSDP's takes the inputs away, one after it puts them back.
    """
    hidden_inputs = []

    def hide(model: Qwen3_5, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden_inputs.append((args, kwargs))
        return (), {}

    model.register_forward_pre_hook(hide, prepend=True, with_kwargs=True)
    model.register_forward_pre_hook(lambda model, args, kwargs: hidden_inputs.pop(), with_kwargs=True)


def local_part(parameter: Tensor, begin: int, end: int) -> tuple[Tensor, int]:
    """(view, first): those of a parameter's rows [begin, end) that lie on this rank, and how many of them lie before.

    All of them, and 0, where the parameter is not sharded.
    """
    rows, offset = _local_rows(parameter)
    return rows[max(begin - offset, 0) : max(end - offset, 0)], max(offset - begin, 0)


def _local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """(the rows of a parameter that lie on this rank, the number of the first one).

    FSDP cuts as torch.chunk does: ceil(rows / ranks) each; the last ranks can have fewer, or none.
    """
    x = parameter.detach()
    if not hasattr(x, "to_local"):  # a DTensor has it; the class itself is slow to import
        return x, 0
    rows, ranks = x.shape[0], x.device_mesh.size()
    size = -(-rows // ranks)
    first = min(size * x.device_mesh.get_local_rank(), rows)
    local = x.to_local()
    assert len(local) == min(size, rows - first), "FSDP cuts the rows in another way"
    return local, first
