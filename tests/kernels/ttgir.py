"""Questions to a compiled kernel's TTGIR (`kernels.proof.compile.ttgir_of`) that a test can assert.

Hopper, Triton 3.4 to 3.7.0: `tl.dot(tl.trans(x), y)` with x from another dot gives wrong numbers at block width 64
(flash-linear-attention #640 and #984). Loaded tiles may be transposed, accumulators may not.
"""

import tempfile

DOTS = ("tt.dot", "ttng.warp_group_dot")
TRANSPOSES = ("tt.trans", "ttg.memdesc_trans")
# Their results are no longer the tile: a row's maximum, a number read through a computed address.
BARRIERS = ("tt.reduce", "tt.scan", "tt.load", "tt.descriptor_load", "tt.gather", "tt.descriptor_gather")
DIRECT, TRANSPOSED = 1, 2  # how much of an accumulator is in a value; 0 is nothing


def transposed_accumulators(ttgir: str) -> list[str]:
    """The dots that take an accumulator's transpose as an operand, one line each; empty is what a kernel should be.

    A dot's result is followed through arithmetic, casts, layouts, shared memory, loops and branches. What a dot merely
    adds to (its third operand) does not count.
    """
    operations, parents = _parse(ttgir)
    level: dict[int, int] = {}

    def raise_to(value: int, new: int) -> bool:
        if new <= level.get(value, 0):
            return False
        level[value] = new
        return True

    changed = True
    while changed:  # loops carry values backwards: repeat until nothing moves
        changed = False
        for op in operations:
            for value, new in _flow(op, parents, level):
                changed |= raise_to(value, new)
    return [
        f"{op.name} takes a transposed accumulator as operand {'ab'[i]}: {op.location}"
        for op in operations
        if op.name in DOTS
        for i in (0, 1)
        if level.get(op.operands[i], 0) == TRANSPOSED
    ]


class _Operation:
    def __init__(self, op):
        self.name: str = op.get_name()
        self.operands = [op.get_operand(i).id() for i in range(op.get_num_operands())]
        self.results = [op.get_result(i).id() for i in range(op.get_num_results())]
        block = op.get_block()
        self.region = block.get_parent().id() if block is not None else None
        self.regions = [op.get_region(i).id() for i in range(op.get_num_regions())]
        arguments = range(block.get_num_arguments()) if block is not None else ()
        self.block_arguments = [block.get_argument(i).id() for i in arguments]
        self.location = str(op.get_result(0).get_loc()) if self.results else ""


def _parse(ttgir: str) -> tuple[list[_Operation], dict[int, _Operation]]:
    """All operations in order, and which operation owns each region."""
    from triton._C.libtriton import ir, nvidia

    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(ttgir)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    operations: list[_Operation] = []
    module.walk(lambda op: operations.append(_Operation(op)))
    return operations, {region: op for op in operations for region in op.regions}


def _flow(op: _Operation, parents: dict, level: dict[int, int]) -> list[tuple[int, int]]:
    """Which values this operation gives which level."""
    get = lambda value: level.get(value, 0)  # noqa: E731
    if op.name in DOTS:
        return [(result, DIRECT) for result in op.results]
    if op.name in BARRIERS or op.name.startswith("tt.reduce."):
        return []
    if op.name == "ttg.local_store":  # value, buffer
        return [(op.operands[1], get(op.operands[0]))]
    moved = []
    owner = parents.get(op.region)
    if owner is not None and owner.name == "scf.for":
        # Arguments of the body: the induction variable, then the carried values; operands: three bounds, then these.
        moved += [(a, get(v)) for a, v in zip(op.block_arguments[1:], owner.operands[3:], strict=True)]
    if op.name == "scf.yield":
        moved += [(result, get(v)) for result, v in zip(owner.results, op.operands, strict=False)]
        if owner.name == "scf.for":
            moved += [(a, get(v)) for a, v in zip(op.block_arguments[1:], op.operands, strict=True)]
    if owner is not None and owner.name == "scf.while" and op.name in ("scf.yield", "scf.condition"):
        carried = op.operands[op.name == "scf.condition" :]
        moved += [(v, max(map(get, carried), default=0)) for v in (*owner.results, *op.block_arguments)]
    if not op.regions:
        new = max(map(get, op.operands), default=0)
        if op.name in TRANSPOSES and new:
            new = TRANSPOSED
        moved += [(result, new) for result in op.results]
        if op.name.startswith("ttg.memdesc_") and op.name not in TRANSPOSES:
            # A view and its buffer share memory: what is stored through one shows in the other.
            moved += [(op.operands[0], max(map(get, op.results)))]
    return moved
