"""How long a kernel takes on paper: its machine code, run by a model of one quarter of a multiprocessor.

    python -m kernels.proof.sass                          every kernel of the 27B's two cores: cycles, waits, ms a step
    python -m kernels.proof.sass --kernel NAME --listing  one kernel's code with its control codes

How to read SASS, the machine code of an NVIDIA GPU. An instruction is 128 bits. Beside the operation it holds a
control code, because the hardware checks no dependencies by itself: the assembler (ptxas) counted the cycles, and wrote
down how long to wait. `--listing` prints it in front of every instruction:

    wait    write read stall
    [------  W0   --   S02]   LDS R4, [R8]              scoreboard 0 counts until R4 has arrived
    [------  --   --   S05]   FADD R2, R2, R3           fixed latency: the next instruction issues 5 cycles later
    [0-----  --   --   S04]   FMUL R4, R4, R2           waits until scoreboard 0 is empty

stall   cycles until this warp may issue its next instruction. How instructions of fixed latency (FADD, IADD3) are kept
        apart from those that use their result.
write   which of the warp's six scoreboards an instruction of variable latency (a load, MUFU) occupies until its result
        is there. ...
read    ... and which one until it has read its operands, so that they may be overwritten.
wait    which scoreboards must be empty before this instruction may issue.

Beyond the control codes, these instructions wait for each other:

    WARPGROUP.DEPBAR.LE gsb0, n     until at most n groups of this warp's wgmma (HGMMA ... gsb0) are unfinished
    LDGDEPBAR, DEPBAR.LE SB0, n     the same for cp.async (LDGSTS): groups of copies from global to shared memory
    SYNCS.PHASECHK                  until the bytes that a TMA load (UTMALDG) brings have arrived at an mbarrier
    BAR.SYNC                        until every warp of the block is there

hopper.py says what an instruction costs, listing.py reads the code, partition.py lets the warps of one quarter of a
multiprocessor run it cycle by cycle, programs.py says how often each kernel runs in a training step, estimate.py puts
them together. Nothing is executed: no register has a value, so branches and trip counts are given, not computed.

What the numbers are worth: see `estimate.ERROR`. They are predictions, made to compare two versions of a kernel and to
see what its warps wait for. A measurement replaces them.
"""
