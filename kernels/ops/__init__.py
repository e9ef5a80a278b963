"""One fused operation a file, named after it. This page explains the letters that all of these files use.

Sizes. They stand in shapes, `q (T, H, K)`, and are the compile-time constants of the Triton kernels:

    T   tokens: the rows of a packed batch, or those of them that the operation is given
    D   hidden size                                          5,120 in the 27B model
    F   features of a row that is neither D nor I wide: all that one GEMM puts out (q|gate|k|v: 14,336), or the joined
        heads that an output projection reads (6,144)
    I   intermediate size of the MLP                         17,408
    H   heads; the kind of which there are more: query heads in attention (24), value heads in the delta rule (48)
    G   heads that several of the H share: key/value heads in attention (4), key heads in the delta rule (16)
    K   size of a query or key head                          256 in attention, where v has it too; 128 in the delta rule
    V   size of a value head, where it may differ from K     128
    P   pairs of dimensions that RoPE rotates; half of the rotated part of a head             32
    r   rank of an adapter
    J   columns of u: r for each projection that shares an input (q, k and v at rank 1: 3)
    S   cached keys                                          more than T when a prompt is read in pieces
    C   channels of the convolution                          10,240
    M   taps of the convolution                              4
    N   documents of a packed batch; in decoding the sequences, each of which brings one token
    NC  chunks of the delta rule: BT = 64 tokens each, none lies in two documents

A size without a letter is written out: `vocab`, `rows`.

Adapters. A (J, D) and B (F, r) are a LoRA adapter's two matrices, s its scale alpha / r, u = x A^T (T, J), and
s u B^T (T, F) is the term that it adds to a projection's output. Where projections are fused in one GEMM, A and B hold
theirs one above the other.

Gradients. `d` in front of a name: dq is the gradient of the loss with respect to q. No size is called dk or dv.

Matrices of the gated delta rule, and only in its files: S (K, V) is the state of a head; D, L, M, P, X, Y, Z (BT, BT)
and E, R (BT, V) belong to one chunk. gated_delta_rule.py and docs/gated-delta-rule.md define them. No size of these
letters occurs there.

Names in Triton kernels:

    p_x     pointer                            i_t     number of a program, a tile or a loop step
    b_x     block of values in registers       T, K    sizes, as above; constants of the compilation except T
    o_t     offsets                            BT, BK  size of a block: so many of T, of K
    m_t     mask                               stride_x, s_x   elements from one row of x to the next
    B_ROWS  size of a block of what has no letter: rows, partial sums, the vocabulary
    desc_x  descriptor of a matrix, for loads by TMA: rows and columns instead of pointers and masks
    STAGES  how many steps of a loop are in flight: a step's loads are issued STAGES - 1 steps before they are used

A kernel keeps a number of blocks that is known when it is compiled (J rows of A, the pieces of a row) in a tuple. The
elements of a tuple cannot be assigned, so a loop that changes them builds the next tuple, b_new, which then takes the
old one's name.

`rstd` is 1 / sqrt(mean(x^2) + eps), the factor of an RMSNorm. `partial` holds the sums of single programs, which a
second pass adds in a fixed order: no kernel uses atomic additions, so that a run repeats bit for bit.

Every file has the same order: formulas, shapes, what is fused, rounding, bytes and saved tensors; the reference, which
is the definition; forward kernel; backward kernel; launchers; the autograd.Function; and the public Triton version,
`NAME_triton`, with the signature of `NAME_reference`. `kernels/__init__.py` chooses between the two.
"""
